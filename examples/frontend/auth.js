/**
 * The browser's side of Latchkey. Copy this file; it needs nothing else.
 *
 *     import { createAuth } from './auth.js';
 *
 *     const auth = createAuth({ baseURL: 'https://api.example.com' });
 *     auth.onchange((user) => render(user));     // {id, email} or null, in every tab
 *     render(await auth.resume());               // still logged in from last time?
 *     await auth.login(email, password);
 *     const res = await auth.fetch('/auth/me');  // fetch with the token, refreshed when that is due
 *
 * The access token is kept in memory and nowhere else: what is in storage, any injected script can take away. The refresh
 * token is an HttpOnly cookie, which no script sees. It works once, so all callers in all tabs share one refresh: a Web
 * Lock lets one tab do it, and a BroadcastChannel hands the others what it got. (Web Locks need https or localhost.)
 */

/**
 * What the server, or the way to it, had against a request: switch on `code`, show `message`, put `details` (field name
 * to message) next to the fields, and wait `retryAfter` seconds if it is not 0. Without an answer `status` is 0 and `code`
 * is `network`, which is also all that a script is told when CORS refuses its origin, or `user_changed`.
 */
export class AuthError extends Error {
  constructor({ error = 'The server cannot be reached', code = 'network', details = {}, requestId }, response) {
    super(error);
    this.name = 'AuthError';
    this.status = response?.status ?? 0;
    this.code = code;
    this.details = details;
    this.requestId = requestId;
    this.retryAfter = Number(response?.headers.get('Retry-After')) || 0; // a proxy may give a date
  }
}

/** The JSON in one part of a token. */
function decode(part) {
  const base64 = part.replaceAll('-', '+').replaceAll('_', '/');
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))));
}

/** The claims of a JWT. Only the server can verify them; here they only say who is logged in and for how long. */
const claimsOf = (token) => decode(token.split('.')[1]);

/** The email address in the token of a link, to be shown to whoever opened it, or ''. Only the server can verify it. */
export function emailOf(linkToken) {
  try {
    const { email } = decode(linkToken.split('.')[0]);
    return typeof email === 'string' ? email : '';
  } catch {
    return '';
  }
}

/**
 * A client for the Latchkey server at `baseURL`; one per page is enough. What is asked of the server comes as a promise,
 * which rejects with an AuthError.
 */
export function createAuth({ baseURL }) {
  const base = new URL(baseURL);
  const lock = `latchkey ${base.origin}`;
  const tabs = new BroadcastChannel(lock);
  const voice = new BroadcastChannel(lock); // unlike what is posted to tabs itself, this tab hears it too
  const listeners = new Set();
  let token = null; // the access token
  let claims = null; // what it says
  let user = null; // who it says is logged in: the same object until that changes
  let due = 0; // when to refresh it
  let refreshing = null; // the refresh in flight, which all callers of this tab await

  /** Takes over a new access token, or null for logged out. */
  function adopt(next) {
    const before = claims;
    token = next;
    claims = next && claimsOf(next);
    // At nine tenths of its life, counted from now: the clocks of browser and server need not agree.
    due = claims ? Date.now() + (claims.exp - claims.iat) * 900 : 0;
    if (claims?.userId === before?.userId && claims?.email === before?.email) return;
    user = claims && { id: claims.userId, email: claims.email };
    listeners.forEach((listener) => queueMicrotask(() => listener(user))); // what they throw is nobody else's
  }

  /** Does the same in the other tabs, which share the cookie and so the session. */
  function announce(next) {
    adopt(next);
    tabs.postMessage({ token: next });
  }
  tabs.onmessage = ({ data }) => { if ('token' in data) adopt(data.token); };

  /** Waits until all is heard that was said before: messages come in order, so the echo of one's own comes last. */
  const listen = () => new Promise((resolve) => {
    const echo = crypto.randomUUID();
    const hear = ({ data }) => { if (data.echo === echo) resolve(tabs.removeEventListener('message', hear)); };
    tabs.addEventListener('message', hear);
    voice.postMessage({ echo });
  });

  /**
   * Whatever sets the cookie holds this lock, so that no answer overtakes another one's cookie; and it first hears what
   * the tab that had the lock before has to say, for the lock may be quicker than the message.
   */
  const locked = (work) => navigator.locks.request(lock, () => listen().then(work));

  const open = (path, init) => fetch(new URL(path, base), { ...init, credentials: 'include' });

  /** JSON there and back through `send`; any answer but 2xx becomes an AuthError. */
  async function json(send, method, path, body, headers = {}) {
    // A page that is left must not lose the new cookie; a request that hangs must not keep the lock.
    const init = { method, headers, keepalive: true, signal: AbortSignal.timeout(15_000) };
    if (body) {
      init.body = JSON.stringify(body);
      init.headers = { ...headers, 'Content-Type': 'application/json' };
    }
    const lost = (error) => { throw error instanceof AuthError ? error : new AuthError({}); };
    const response = await send(path, init).catch(lost);
    if (response.ok) return response.json().catch(lost);
    const answer = await response.json().catch(() => null); // of a proxy, maybe, in a form of its own
    const said = typeof answer?.error === 'string' ? answer : { error: `HTTP ${response.status}` };
    throw new AuthError({ code: 'unknown', ...said }, response);
  }

  /** Exchanges the refresh cookie, unless the token in hand is no longer `stale`: then another tab has just done it. */
  function refresh(stale) {
    refreshing ??= locked(async () => {
      if (token !== stale) return;
      const exchange = () => json(open, 'POST', '/auth/refresh');
      try {
        const { accessToken } = await exchange().catch(async (error) => {
          if (error.code !== 'refresh_reused') throw error;
          // A race was lost to someone without the lock, as a page of another origin is. The new cookie comes with the
          // answer that they get, which may still be on its way.
          await new Promise((resolve) => { setTimeout(resolve, 1000); });
          return exchange();
        });
        announce(accessToken);
      } catch (error) {
        // Of a lost race only this tab knows; any other 401 has cleared the cookie of all.
        if (error.status === 401 && token === stale) (error.code === 'refresh_reused' ? adopt : announce)(null);
        throw error;
      }
    }).finally(() => { refreshing = null; });
    return refreshing;
  }

  /**
   * `fetch` with the access token, for paths of the server. Refreshes before the token runs out, and when the server
   * refuses it; `init.body` may have to be sent twice, so it must not be a stream. Like `fetch` it resolves to whatever
   * answer comes, and rejects where none does; with an AuthError if that was a refresh, as when nobody is logged in, or if
   * that found somebody else logged in: what one user asked for is never sent as another.
   */
  async function authFetch(path, init = {}) {
    const url = new URL(path, base);
    if (url.origin !== base.origin) throw new TypeError(`auth.fetch sends the token to ${base.origin} only`);
    const before = claims?.userId;
    const renew = async (stale) => {
      await refresh(stale);
      if (before && claims?.userId !== before) throw new AuthError({ error: 'Somebody else is logged in now', code: 'user_changed' });
    };
    if (Date.now() >= due) await renew(token);
    const send = () => {
      const headers = new Headers(init.headers);
      if (token) headers.set('Authorization', `Bearer ${token}`);
      return open(url, { ...init, headers });
    };
    const used = token;
    const response = await send();
    if (response.status !== 401) return response;
    const { code } = await response.clone().json().catch(() => ({}));
    // A revoked session may be an older one: if the cookie is of a newer login, the refresh carries on with that.
    if (!['token_expired', 'invalid_token', 'session_revoked'].includes(code)) return response;
    await renew(used);
    return send();
  }

  const call = (method, path, body) => json(authFetch, method, path, body);

  const enter = (path) => (email, password) => locked(async () => {
    const answer = await json(open, 'POST', path, { email, password });
    announce(answer.accessToken);
    return answer.user;
  });

  /**
   * Sends the token of a link from a mail. What it does may concern the user who is logged in here, or another one, and
   * only the server knows: so a refresh follows, which tells all tabs that their session has ended, or their new address.
   * The lock makes sure that no refresh is under way whose answer is from before.
   */
  async function follow(path, body) {
    const answer = await locked(() => json(open, 'POST', path, body));
    await refresh(token).catch(() => {}); // the link has worked, whatever comes of this
    return answer;
  }

  // A page that comes back from the history as it was left may have missed what the other tabs said.
  addEventListener('pageshow', ({ persisted }) => { if (persisted) refresh(token).catch(() => {}); });

  return {
    /** Who is logged in: `{id, email}`, or null. It is the same object until that changes. */
    get user() { return user; },
    /**
     * Calls `listener(user)` whenever someone logs in or out or has a new address, in this tab or another; returns what
     * ends that.
     */
    onchange(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    /** Takes up the session of the refresh cookie, if there is one: call it when the page loads. */
    async resume() {
      await refresh(token).catch((error) => { if (error.status !== 401) throw error; });
      return user;
    },
    signup: enter('/auth/signup'),
    login: enter('/auth/login'),
    /** Ends this session. Rejects if the server cannot be asked, for then the cookie is still there. */
    logout: () => locked(async () => {
      const headers = token ? { Authorization: `Bearer ${token}` } : {};
      await json(open, 'POST', '/auth/logout', null, headers).catch((error) => {
        if (error.status !== 401) throw error; // 401: it was over already
      });
      announce(null);
    }),
    fetch: authFetch,
    me: async () => (await call('GET', '/auth/me')).user,
    sessions: async () => (await call('GET', '/auth/sessions')).sessions,
    async revokeSession(id) {
      const own = id === claims?.sid;
      await call('DELETE', `/auth/sessions/${encodeURIComponent(id)}`);
      if (own) announce(null);
    },
    /** Logs out everywhere, here too. */
    async revokeAll() {
      await call('DELETE', '/auth/sessions');
      announce(null);
    },
    /** Ends every other session; this one goes on. */
    changePassword: (currentPassword, newPassword) => call('PUT', '/auth/password', { currentPassword, newPassword }),
    async deleteAccount(password) {
      await call('DELETE', '/auth/me', { password });
      announce(null);
    },

    // Links by mail. Each leads to a page of the frontend and has its token in the fragment: take the token out of the
    // address at once, and send it after a click, since mail scanners open links too. No link logs anybody in.

    /** Has a link mailed that sets a new password. It succeeds as well if the address has no account. */
    forgotPassword: (email) => json(open, 'POST', '/auth/password/forgot', { email }),
    /** Sets the password by such a link, which ends every session of the link's user; then log in with the new one. */
    resetPassword: (linkToken, newPassword) => follow('/auth/password/reset', { token: linkToken, newPassword }),
    /** Has the link that verifies the user's address mailed once more; `me` tells whether the address is verified. */
    sendVerification: () => call('POST', '/auth/email/verification'),
    /** Has a link mailed to a new address, which becomes the user's once that link has been verified. */
    changeEmail: (newEmail, password) => call('PUT', '/auth/email', { newEmail, password }),
    /** Verifies an address by the link that was mailed to it; resolves to its user, `{id, email, emailVerified}`. */
    verifyEmail: async (linkToken) => (await follow('/auth/email/verify', { token: linkToken })).user,
  };
}
