// The page for login, signup and the account: which view is shown, and what each form does.
import { $, attempt, auth, handle, say, show } from './common.js';

// ---- Views

// The id of the user whose account the page shows.
let shown = null;

const showForm = (status) => show(location.hash === '#signup' ? 'signup' : 'login', status);

addEventListener('hashchange', () => {
  if (!auth.user) showForm();
});

/** render shows the account of a user, or a form to log in if there is none. */
async function render(user) {
  if (user && user.id === shown) return renderEmail(user.email);
  const status = !user && shown ? 'You have been logged out.' : '';
  shown = user && user.id;
  clear();
  setEmail(user ? user.email : '');
  if (!user) return showForm(status);
  // After the next logout, the form is the one to log in.
  history.replaceState(null, '', location.pathname);
  show('account');
  await attempt($('#refresh'), () => Promise.all([profile(), list()]));
}

/**
 * clear leaves nothing of the last user's: no text, and no answer that the next one would have to
 * wait for.
 */
function clear() {
  document.querySelectorAll('form').forEach((form) => form.reset());
  document.querySelectorAll('button').forEach((button) => {
    button.disabled = false;
  });
  document.querySelectorAll('#since, #sessions').forEach((node) => node.replaceChildren());
  $('#verification').hidden = true;
}

/**
 * renderEmail shows the new address of the user whose account is shown already. What they have
 * typed stays.
 */
async function renderEmail(email) {
  setEmail(email);
  await attempt($('#refresh'), profile);
  if (auth.user?.email === email) say(`Your email is ${email} now.`);
}

function setEmail(email) {
  $('#who').textContent = email;
  $('#email').textContent = email;
  /** @type {NodeListOf<HTMLInputElement>} */
  const names = document.querySelectorAll('input[name=username]');
  for (const input of names) input.defaultValue = email;
}

/** profile shows what only the server knows of the user. */
async function profile() {
  const { id, createdAt, emailVerified } = await auth.me();
  if (auth.user?.id !== id) return;
  $('#since').textContent = when(createdAt, { dateStyle: 'long' });
  $('#verification').hidden = emailVerified;
}

// The link of the mail is opened in another tab, or on another device. When the user comes back,
// the page asks whether the address is verified. If that fails, it asks the next time.
addEventListener('focus', async () => {
  if ($('#verification').hidden) return;
  await profile().catch(() => {});
  if (auth.user && $('#verification').hidden) say('Your email is verified.');
});

// ---- The list of sessions

/** @type {(time: string, style?: Intl.DateTimeFormatOptions) => string} */
const when = (time, style = { dateStyle: 'medium', timeStyle: 'short' }) =>
  new Intl.DateTimeFormat(undefined, style).format(new Date(time));

/** device is like "Firefox on Linux", or the beginning of what the browser calls itself. */
function device(userAgent) {
  const find = (names) => names.find((name) => userAgent.includes(name));
  const browser = find(['Edg', 'Firefox', 'Chrome', 'Safari']);
  const system = find(['Android', 'iPhone', 'iPad', 'Windows', 'Mac OS', 'Linux']);
  if (browser && system) return `${browser.replace('Edg', 'Edge')} on ${system}`;
  return userAgent.slice(0, 60) || 'Unknown device';
}

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** list shows the sessions, unless somebody else is logged in by the time they come. */
async function list() {
  const id = auth.user?.id;
  const sessions = await auth.sessions();
  if (auth.user?.id !== id) return;
  $('#sessions').replaceChildren(...sessions.map(sessionItem));
}

/**
 * sessionItem is the line of a session: where it is, and what ends it.
 *
 * @param {import('./auth.js').Session} session
 */
function sessionItem(session) {
  const { id, userAgent, ip, lastUsedAt, current } = session;
  const name = device(userAgent);
  const used = element('time', { dateTime: lastUsedAt }, when(lastUsedAt));
  const about = element(
    'div',
    {},
    element('strong', {}, name),
    element('small', {}, `${ip} · last used `, used),
  );
  if (current) {
    const badge = element('span', { className: 'badge' }, 'This browser');
    return element('li', {}, about, badge);
  }

  const form = element(
    'form',
    { noValidate: true },
    element('p', { className: 'problem', role: 'alert', tabIndex: -1 }),
    element('button', { ariaLabel: `Log out ${name}, ${ip}` }, 'Log out'),
  );
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    attempt(form, async () => {
      await auth.revokeSession(id);
      await list();
      // The button that had the focus is gone.
      $('#sessions-title').tabIndex = -1;
      $('#sessions-title').focus();
      say(`${name} has been logged out.`);
    });
  });
  return element('li', {}, about, form);
}

// ---- Forms

/** leave ends the session by an action and says so. If it ends otherwise, render says so. */
async function leave(text, action) {
  await action();
  say(text);
}

const actions = {
  resume: start,
  login: ({ email, password }) => auth.login(email, password),
  signup: ({ email, password }) => auth.signup(email, password),
  logout: () => leave('You are logged out.', () => auth.logout()),
  async verification() {
    await auth.sendVerification();
    say('A mail is on its way. Open the link in it.');
  },
  async refresh() {
    await list();
    say('The list is up to date.');
  },
  'revoke-all': () => leave('You are logged out everywhere.', () => auth.revokeAll()),
  async 'change-email'({ newEmail, password }) {
    await auth.changeEmail(newEmail, password);
    $('#change-email').reset();
    say(`A mail is on its way to ${newEmail}. Open the link in it to change your email.`);
  },
  async password({ currentPassword, newPassword }) {
    await auth.changePassword(currentPassword, newPassword);
    $('#password').reset();
    await list();
    say('Your password is changed, and your other devices are logged out.');
  },
  delete: ({ password }) => leave('Your account is deleted.', () => auth.deleteAccount(password)),
};

handle(actions);

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
