// What all pages share: the client of the server, the views, and the forms with their errors.
import { AuthError, createAuth } from './auth.js';

/** @type {(selector: string, root?: ParentNode) => any} */
export const $ = (selector, root = document) => root.querySelector(selector);

export const auth = createAuth({ baseURL: $('meta[name=latchkey-api]').content });

/** say shows what has happened, which a screen reader reads out. */
export const say = (text) => {
  $('#status').textContent = text;
};

/**
 * show shows one view and moves the focus to its heading, so that keyboard and screen reader start
 * there.
 */
export function show(view, status = '') {
  /** @type {NodeListOf<HTMLElement>} */
  const views = document.querySelectorAll('[id^=view-]');
  for (const each of views) each.hidden = each.id !== `view-${view}`;
  document.querySelectorAll('form').forEach(clean);
  say(status);
  const heading = $(`#view-${view} h1`);
  document.title = `${heading.textContent} · Latchkey`;
  heading.focus();
}

/**
 * handle runs the action that has a form's id whenever the form is submitted, with the values of
 * its fields.
 */
export function handle(actions) {
  for (const [id, action] of Object.entries(actions)) {
    const form = document.getElementById(id);
    form.addEventListener('submit', (event) => {
      event.preventDefault();
      attempt(form, action);
    });
  }
}

/** clean takes back what the last attempt said. */
function clean(form) {
  form.querySelectorAll('.problem, .error').forEach((node) => {
    node.textContent = '';
  });
  form.querySelectorAll('[aria-invalid]').forEach((input) => {
    input.removeAttribute('aria-invalid');
  });
}

/** attempt does what a form is for, once at a time, and shows what became of it. */
export async function attempt(form, action) {
  const button = $('button', form);
  if (button.disabled) return;
  clean(form);
  say('');
  // A button loses the focus while it is disabled.
  const focused = document.activeElement === button;
  button.disabled = true;
  let wait = 0;
  try {
    await action(Object.fromEntries(new FormData(form)));
  } catch (error) {
    wait = error.retryAfter ?? 0;
    explain(form, error);
  } finally {
    button.disabled = wait > 0;
    if (focused && document.activeElement === document.body) button.focus();
  }
  if (wait > 0) countdown(form, button, wait);
}

/**
 * explain shows an error next to the field it is about, or else at the head of the form, and moves
 * the focus there. A field's data-code names an error that is about it, and its data-message says
 * what to show then, if that is not the server's message.
 */
function explain(form, error) {
  // Any other error is a bug, which the console shows.
  if (!(error instanceof AuthError)) throw error;
  const details = { ...error.details };
  const about = [...form.elements].find((input) => input.dataset.code === error.code);
  if (about) details[about.name] = about.dataset.message ?? error.message;
  const inputs = Object.keys(details).map((name) => form.elements[name]).filter(Boolean);
  for (const input of inputs) {
    input.setAttribute('aria-invalid', 'true');
    $(`#${input.id}-error`).textContent = details[input.name];
  }
  if (inputs.length > 0) return inputs[0].focus();
  const wait = error.retryAfter > 0 ? ` Try again in ${span(error.retryAfter)}.` : '';
  complain(form, `${error.message.replace(/\.$/, '')}.${wait}`);
}

/** complain shows a problem at the head of a form. */
export function complain(form, text) {
  const problem = $('.problem', form);
  problem.textContent = text;
  problem.focus();
}

/** span is a time to wait, for people. */
const span = (seconds) => (seconds < 120 ? `${seconds} s` : `${Math.ceil(seconds / 60)} min`);

/**
 * countdown counts down on the button. The message itself stays as it is, or a screen reader would
 * read it every second. Another input ends the wait, because the limit may be that of one account.
 * So does another user.
 */
function countdown(form, button, seconds) {
  const label = button.textContent;
  const end = Date.now() + seconds * 1000;
  const over = new AbortController();
  const stop = () => {
    clearInterval(timer);
    over.abort();
    button.textContent = label;
    button.disabled = false;
    clean(form);
  };
  const tick = () => {
    const left = Math.ceil((end - Date.now()) / 1000);
    if (left <= 0) return stop();
    button.textContent = `${label} (in ${span(left)})`;
  };
  const timer = setInterval(tick, 250);
  tick();
  for (const event of ['input', 'reset']) {
    form.addEventListener(event, stop, { signal: over.signal });
  }
}
