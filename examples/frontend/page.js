// The page around auth.js: which view is shown, what each form does, and where an error goes.
import { createAuth } from './auth.js';

const auth = createAuth({ baseURL: document.querySelector('meta[name=latchkey-api]').content });
const $ = (selector, root = document) => root.querySelector(selector);

// ---- Views

const say = (text) => { $('#status').textContent = text; };

let wasIn = false; // is someone logged in, as far as the page shows

/** Shows one view and moves the focus to its heading, so that keyboard and screen reader start there. */
function show(view, status = '') {
  for (const each of document.querySelectorAll('[id^=view-]')) each.hidden = each.id !== `view-${view}`;
  document.querySelectorAll('form').forEach(clean);
  say(status);
  $('#who').hidden = view !== 'account';
  document.title = `${$(`#view-${view} h1`).textContent} · Latchkey`;
  $(`#view-${view} h1`).focus();
}

const showForm = (status) => show(location.hash === '#signup' ? 'signup' : 'login', status);

addEventListener('hashchange', () => { if (!auth.user) showForm(); });

async function render(user) {
  const status = !user && wasIn ? 'You have been logged out.' : '';
  wasIn = Boolean(user);
  // Nothing of the last user's is left: no text, no answer that the next one would have to wait for.
  document.querySelectorAll('form').forEach((form) => form.reset());
  document.querySelectorAll('button').forEach((button) => { button.disabled = false; });
  document.querySelectorAll('#who, #email, #since, #sessions').forEach((node) => node.replaceChildren());
  if (!user) return showForm(status);
  history.replaceState(null, '', location.pathname); // after the next logout the form is the one to log in
  $('#who').textContent = $('#email').textContent = user.email;
  document.querySelectorAll('input[name=username]').forEach((input) => { input.value = user.email; });
  show('account');
  await attempt($('#refresh'), () => Promise.all([since(), list()]));
}

async function since() {
  const { id, createdAt } = await auth.me();
  if (auth.user?.id === id) $('#since').textContent = when(createdAt, { dateStyle: 'long' });
}

// ---- The list of sessions

const when = (time, style = { dateStyle: 'medium', timeStyle: 'short' }) =>
  new Intl.DateTimeFormat(undefined, style).format(new Date(time));

/** "Firefox on Linux", or the beginning of what the browser calls itself. */
function device(userAgent) {
  const find = (names) => names.find((name) => userAgent.includes(name));
  const browser = find(['Edg', 'Firefox', 'Chrome', 'Safari']);
  const system = find(['Android', 'iPhone', 'iPad', 'Windows', 'Mac OS', 'Linux']);
  return browser && system ? `${browser.replace('Edg', 'Edge')} on ${system}` : userAgent.slice(0, 60) || 'Unknown device';
}

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Lists the sessions, unless somebody else is logged in by the time they come. */
async function list() {
  const id = auth.user?.id;
  const sessions = await auth.sessions();
  if (auth.user?.id !== id) return;
  $('#sessions').replaceChildren(...sessions.map((session) => {
    const name = device(session.userAgent);
    const used = element('time', { dateTime: session.lastUsedAt }, when(session.lastUsedAt));
    const about = element('div', {}, element('strong', {}, name), element('small', {}, `${session.ip} · last used `, used));
    if (session.current) return element('li', {}, about, element('span', { className: 'badge' }, 'This browser'));
    const button = element('button', { ariaLabel: `Log out ${name}, ${session.ip}` }, 'Log out');
    const form = element('form', { noValidate: true }, element('p', { className: 'problem', role: 'alert', tabIndex: -1 }), button);
    form.addEventListener('submit', (event) => {
      event.preventDefault();
      attempt(form, async () => {
        await auth.revokeSession(session.id);
        await list();
        $('#sessions-title').tabIndex = -1; // the button that had the focus is gone
        $('#sessions-title').focus();
        say(`${name} has been logged out.`);
      });
    });
    return element('li', {}, about, form);
  }));
}

// ---- Forms and their errors

/** Takes back what the last attempt said. */
function clean(form) {
  form.querySelectorAll('.problem, .error').forEach((node) => { node.textContent = ''; });
  form.querySelectorAll('[aria-invalid]').forEach((input) => input.removeAttribute('aria-invalid'));
}

/** Runs what a form is for, once at a time, and shows what became of it. */
async function attempt(form, action) {
  const button = $('button', form);
  if (button.disabled) return;
  clean(form);
  say('');
  const focused = document.activeElement === button; // which it loses while it is disabled
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

/** An error goes next to the field it is about, or else to the head of the form; the focus goes there too. */
function explain(form, error) {
  if (error.name !== 'AuthError') throw error; // a bug: let the console have it
  const details = { ...error.details };
  if (error.code === 'email_exists') details.email = error.message;
  if (error.code === 'invalid_credentials' && form.id === 'password') details.currentPassword = 'This is not your password';
  if (error.code === 'invalid_credentials' && form.id === 'delete') details.password = 'This is not your password';
  const inputs = Object.keys(details).map((name) => form.elements[name]).filter(Boolean);
  for (const input of inputs) {
    input.setAttribute('aria-invalid', 'true');
    $(`#${input.id}-error`).textContent = details[input.name];
  }
  if (inputs.length > 0) return inputs[0].focus();
  const wait = error.retryAfter > 0 ? ` Try again in ${span(error.retryAfter)}.` : '';
  const problem = $('.problem', form);
  problem.textContent = `${error.message.replace(/\.$/, '')}.${wait}`;
  problem.focus();
}

const span = (seconds) => (seconds < 120 ? `${seconds} s` : `${Math.ceil(seconds / 60)} min`);

/**
 * Counts down on the button: the message itself stays as it is, or a screen reader would read it every second. Another
 * input ends the wait, for the limit may be that of one account; so does another user.
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
  for (const event of ['input', 'reset']) form.addEventListener(event, stop, { signal: over.signal });
}

/** Ends the session by `action` and says so; of one that ends otherwise render() has said so. */
async function leave(text, action) {
  await action();
  say(text);
}

const actions = {
  resume: start,
  login: ({ email, password }) => auth.login(email, password),
  signup: ({ email, password }) => auth.signup(email, password),
  logout: () => leave('You are logged out.', () => auth.logout()),
  async refresh() {
    await list();
    say('The list is up to date.');
  },
  'revoke-all': () => leave('You are logged out everywhere.', () => auth.revokeAll()),
  async password({ currentPassword, newPassword }) {
    await auth.changePassword(currentPassword, newPassword);
    $('#password').reset();
    await list();
    say('Your password is changed, and your other devices are logged out.');
  },
  delete: ({ password }) => leave('Your account is deleted.', () => auth.deleteAccount(password)),
};

for (const [id, action] of Object.entries(actions)) {
  const form = document.getElementById(id);
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    attempt(form, action);
  });
}

// ---- Start: take up the session of the refresh cookie

async function start() {
  try {
    if (!(await auth.resume())) showForm();
  } catch (error) {
    show('offline');
    throw error;
  }
}

auth.onchange(render);
attempt($('#resume'), start);
