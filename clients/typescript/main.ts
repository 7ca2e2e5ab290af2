// This program is a client of Latchkey by what openapi-typescript generates from openapi.yaml. It
// signs up, logs in, refreshes the session, and prints whose it is. Its arguments are the URL of a
// server and an email address without an account.

import createClient, { type Middleware } from 'openapi-fetch';
import type { paths } from './latchkey.js';

const [baseUrl = '', email = ''] = process.argv.slice(2);
const password = 'correct horse battery';

// A browser keeps the refresh token and sends it by itself where the client is created with
// `credentials: 'include'`. Node.js has no cookies, so it is carried by hand here.
let cookie = '';
const carryCookie: Middleware = {
  onRequest({ request }) {
    request.headers.set('Cookie', cookie);
  },
  onResponse({ response }) {
    cookie = response.headers.getSetCookie()[0]?.split(';')[0] ?? cookie;
  },
};

const client = createClient<paths>({ baseUrl });
client.use(carryCookie);

const signup = await client.POST('/auth/signup', { body: { email, password } });
if (signup.error) {
  throw new Error(signup.error.error);
}

const wrong = await client.POST('/auth/login', { body: { email, password: 'a wrong guess' } });
switch (wrong.error?.code) {
  case 'invalid_credentials':
    break;
  case 'account_disabled':
    throw new Error('This account is disabled.');
  case 'too_many_attempts':
    throw new Error(`Try again in ${wrong.response.headers.get('Retry-After')} seconds.`);
  default:
    throw new Error(wrong.error?.error ?? 'A wrong password opens a session.');
}

const login = await client.POST('/auth/login', { body: { email, password } });
if (login.error) {
  throw new Error(login.error.error);
}

const refresh = await client.POST('/auth/refresh');
if (refresh.error) {
  throw new Error(refresh.error.error);
}

const me = await client.GET('/auth/me', {
  headers: { Authorization: `Bearer ${refresh.data.accessToken}` },
});
if (me.error) {
  throw new Error(me.error.error);
}
console.log(me.data.user.email);
