/**
 * The browser's side of Latchkey. Copy this file. It needs nothing else, and it brings its types:
 * TypeScript reads them where tsconfig.json has `allowJs`.
 *
 *     import { createAuth } from './auth.js';
 *
 *     const auth = createAuth({ baseURL: 'https://api.example.com' });
 *     auth.onchange((user) => render(user));     // {id, email} or null, in every tab
 *     render(await auth.resume());               // still logged in from last time?
 *     await auth.login(email, password);
 *     const res = await auth.fetch('/auth/me');  // fetch with the token, which it keeps fresh
 *
 * The access token is kept in memory and nowhere else, because injected scripts can read whatever
 * is in storage. The refresh token is an HttpOnly cookie, which no script sees. It works once, so
 * all callers in all tabs share one refresh: a Web Lock lets one tab do it, and a BroadcastChannel
 * gives the result to the others. Web Locks need https or localhost.
 */

/**
 * A User is somebody who is logged in.
 *
 * @typedef {{ readonly id: string, readonly email: string }} User
 */

/**
 * A Profile is what the server knows of a user. Times are RFC 3339 in UTC.
 *
 * @typedef {User & { createdAt: string, emailVerified: boolean }} Profile
 */

/**
 * A Session is one login of the user. The one that asks is `current`.
 *
 * @typedef {object} Session
 * @property {string} id
 * @property {string} createdAt
 * @property {string} lastUsedAt
 * @property {string} ip
 * @property {string} userAgent
 * @property {boolean} current
 */

/** @typedef {{ message: string }} Message */

/**
 * An ErrorCode is the `code` of an answer of the server, or one of auth.js itself:
 *
 * - `network`: no answer came. Scripts are told no more if CORS refuses their origin.
 * - `user_changed`: somebody else is logged in now. The request was not sent as that user.
 * - `unknown`: the answer has no code. It may be a proxy's.
 *
 * @typedef {'network' | 'user_changed' | 'unknown'
 *   | 'invalid_json' | 'validation_failed' | 'email_exists' | 'invalid_link'
 *   | 'invalid_credentials' | 'missing_token' | 'token_expired' | 'invalid_token'
 *   | 'session_revoked' | 'refresh_reused' | 'cross_origin' | 'account_disabled'
 *   | 'not_found' | 'user_not_found' | 'session_not_found' | 'method_not_allowed'
 *   | 'request_timeout' | 'body_too_large' | 'unsupported_media_type'
 *   | 'rate_limited' | 'too_many_attempts' | 'internal' | 'unavailable' | 'overloaded'
 * } ErrorCode
 */

/**
 * @typedef {object} ErrorBody
 * @property {string} [error]
 * @property {ErrorCode} [code]
 * @property {Record<string, string>} [details]
 * @property {string} [requestId]
 */

/** @typedef {{ userId: string, email: string, sid: string, iat: number, exp: number }} Claims */

/** @typedef {ReturnType<typeof createAuth>} Auth */

/**
 * An AuthError says why a request failed. Switch on `code`, show `message`, put `details` (from
 * field name to message) next to the fields, and wait `retryAfter` seconds if it is not 0. If no
 * answer came, `status` is 0.
 */
export class AuthError extends Error {
  /**
   * @param {ErrorBody} body
   * @param {Response} [response]
   */
  constructor(body, response) {
    super(body.error ?? 'The server cannot be reached');
    this.name = 'AuthError';
    this.status = response?.status ?? 0;
    this.code = body.code ?? 'network';
    this.details = body.details ?? {};
    this.requestId = body.requestId;
    // A proxy may give a date, which counts as no time.
    this.retryAfter = Number(response?.headers.get('Retry-After')) || 0;
  }
}

/**
 * decode returns the JSON in one part of a token.
 *
 * @param {string | undefined} part
 */
function decode(part = '') {
  const base64 = part.replaceAll('-', '+').replaceAll('_', '/');
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  return JSON.parse(new TextDecoder().decode(bytes));
}

/**
 * claimsOf returns what a JWT says. Only the server can verify it. Here it only tells who is logged
 * in, and for how long.
 *
 * @type {(token: string) => Claims}
 */
const claimsOf = (token) => decode(token.split('.')[1]);

/**
 * emailOf returns the email address in the token of a link, or ''. Show it to whoever has opened
 * the link. Only the server can verify it.
 *
 * @param {string} linkToken
 * @returns {string}
 */
export function emailOf(linkToken) {
  try {
    const { email } = decode(linkToken.split('.')[0]);
    return typeof email === 'string' ? email : '';
  } catch {
    return '';
  }
}

/**
 * createAuth makes a client for the Latchkey server at `baseURL`. One client per page is enough.
 * What it asks of the server is a promise, which rejects with an AuthError.
 *
 * @param {{ baseURL: string | URL }} options
 */
export function createAuth({ baseURL }) {
  const base = new URL(baseURL);
  const lock = `latchkey ${base.origin}`;

  // A channel does not hear itself. What this tab says by `voice`, it hears by `tabs`.
  const tabs = new BroadcastChannel(lock);
  const voice = new BroadcastChannel(lock);

  /** @type {Set<(user: User | null) => void>} */
  const listeners = new Set();

  /** @type {string | null} the access token */
  let token = null;

  /** @type {Claims | null} what the access token says */
  let claims = null;

  /** @type {User | null} the same object until the user or the address changes */
  let user = null;

  // When the access token is to be refreshed.
  let due = 0;

  /** @type {Promise<void> | null} the refresh in flight, which all callers of this tab await */
  let refreshing = null;

  /**
   * adopt takes over a new access token, or null for logged out.
   *
   * @param {string | null} next
   */
  function adopt(next) {
    token = next;
    claims = next === null ? null : claimsOf(next);
    // Nine tenths of the token's life, counted from now: the clocks of browser and server may
    // differ.
    due = claims ? Date.now() + (claims.exp - claims.iat) * 900 : 0;
    if (claims?.userId === user?.id && claims?.email === user?.email) return;
    user = claims && { id: claims.userId, email: claims.email };
    // Each listener has a task of its own, so that one that throws does not stop the others.
    for (const listener of listeners) queueMicrotask(() => listener(user));
  }

  /**
   * announce does the same in all tabs, which share the cookie and so the session.
   *
   * @param {string | null} next
   */
  function announce(next) {
    adopt(next);
    tabs.postMessage({ token: next });
  }

  tabs.onmessage = ({ data }) => {
    if ('token' in data) adopt(data.token);
  };

  /**
   * listen waits until this tab has heard all that other tabs have said so far. Messages come in
   * order, so the tab's own echo comes last.
   *
   * @returns {Promise<void>}
   */
  function listen() {
    return new Promise((resolve) => {
      const echo = crypto.randomUUID();
      /** @param {MessageEvent} event */
      const hear = ({ data }) => {
        if (data.echo !== echo) return;
        tabs.removeEventListener('message', hear);
        resolve();
      };
      tabs.addEventListener('message', hear);
      voice.postMessage({ echo });
    });
  }

  /**
   * locked does what sets the cookie, while no other tab does, so that no answer overtakes another
   * one's cookie. It first hears what the tab that had the lock before has to say, because the lock
   * may come sooner than the message.
   *
   * @template T
   * @param {() => Promise<T>} work
   * @returns {Promise<T>}
   */
  async function locked(work) {
    return navigator.locks.request(lock, () => listen().then(work));
  }

  /**
   * open is `fetch` with the cookie.
   *
   * @param {string | URL} path
   * @param {RequestInit} init
   */
  const open = (path, init) => fetch(new URL(path, base), { ...init, credentials: 'include' });

  /**
   * json sends and receives JSON by `send`. Any answer but 2xx becomes an AuthError.
   *
   * @param {typeof open} send
   * @param {string} method
   * @param {string} path
   * @param {object | null} [body]
   * @param {Record<string, string>} [headers]
   */
  async function json(send, method, path, body, headers = {}) {
    /** @type {RequestInit} */
    const init = {
      method,
      headers,
      // A page that is left must not lose the new cookie.
      keepalive: true,
      // A request that hangs must not keep the lock.
      signal: AbortSignal.timeout(15_000),
    };
    if (body) {
      init.body = JSON.stringify(body);
      init.headers = { ...headers, 'Content-Type': 'application/json' };
    }
    /** @param {unknown} error */
    const lost = (error) => {
      throw error instanceof AuthError ? error : new AuthError({});
    };
    const response = await send(path, init).catch(lost);
    if (response.ok) return response.json().catch(lost);
    // A proxy may answer in a form of its own.
    const answer = await response.json().catch(() => null);
    const said = typeof answer?.error === 'string' ? answer : { error: `HTTP ${response.status}` };
    throw new AuthError({ code: 'unknown', ...said }, response);
  }

  /**
   * exchange exchanges the refresh cookie, and returns the new access token.
   *
   * @returns {Promise<string>}
   */
  async function exchange() {
    const attempt = async () => (await json(open, 'POST', '/auth/refresh')).accessToken;
    try {
      return await attempt();
    } catch (error) {
      if (!(error instanceof AuthError) || error.code !== 'refresh_reused') throw error;
    }
    // Somebody without the lock, for example a page of another origin, has won a race. The new
    // cookie comes with the answer to them, which may still be on its way.
    await new Promise((resolve) => {
      setTimeout(resolve, 1000);
    });
    return attempt();
  }

  /**
   * refresh gets a new access token, unless the one in hand is no longer `stale`: then another tab
   * has just done it.
   *
   * @param {string | null} stale
   */
  function refresh(stale) {
    refreshing ??= locked(async () => {
      if (token !== stale) return;
      try {
        announce(await exchange());
      } catch (error) {
        if (error instanceof AuthError && error.status === 401 && token === stale) {
          // Only this tab knows of a lost race. Any other 401 has cleared the cookie of all tabs.
          const tell = error.code === 'refresh_reused' ? adopt : announce;
          tell(null);
        }
        throw error;
      }
    }).finally(() => {
      refreshing = null;
    });
    return refreshing;
  }

  /**
   * authFetch is what `auth.fetch` is. See there.
   *
   * @param {string | URL} path
   * @param {RequestInit} [init]
   */
  async function authFetch(path, init = {}) {
    const url = new URL(path, base);
    if (url.origin !== base.origin) {
      throw new TypeError(`auth.fetch sends the token to ${base.origin} only`);
    }

    const before = user?.id;
    /** @param {string | null} stale */
    const renew = async (stale) => {
      await refresh(stale);
      if (before && user?.id !== before) {
        throw new AuthError({ error: 'Somebody else is logged in now', code: 'user_changed' });
      }
    };
    const send = () => {
      const headers = new Headers(init.headers);
      if (token) headers.set('Authorization', `Bearer ${token}`);
      return open(url, { ...init, headers });
    };

    if (Date.now() >= due) await renew(token);
    const used = token;
    const response = await send();
    if (response.status !== 401) return response;
    const said = await response.clone().json().catch(() => null);
    // The session that was revoked may be an older one. If the cookie is of a newer login, the
    // refresh carries on with that.
    const stale = ['token_expired', 'invalid_token', 'session_revoked'].includes(said?.code);
    if (!stale) return response;
    await renew(used);
    return send();
  }

  /**
   * call asks the server for something that needs an access token.
   *
   * @param {string} method
   * @param {string} path
   * @param {object} [body]
   */
  const call = (method, path, body) => json(authFetch, method, path, body);

  /**
   * enter opens a session, and returns its user.
   *
   * @param {string} path
   * @param {{ email: string, password: string }} credentials
   */
  const enter = (path, credentials) => locked(async () => {
    const answer = await json(open, 'POST', path, credentials);
    announce(answer.accessToken);
    return answer.user;
  });

  /**
   * follow sends the token of a link from a mail. That may concern the user who is logged in here,
   * or another one, and only the server knows. So a refresh follows, which tells all tabs that
   * their session has ended, or their new address. The lock makes sure that no refresh is under way
   * whose answer is from before.
   *
   * @param {string} path
   * @param {{ token: string, newPassword?: string }} body
   */
  async function follow(path, body) {
    const answer = await locked(() => json(open, 'POST', path, body));
    // The link has worked, whatever comes of the refresh.
    await refresh(token).catch(() => {});
    return answer;
  }

  // A page that comes back from the history as it was left may have missed what other tabs said.
  addEventListener('pageshow', ({ persisted }) => {
    if (persisted) refresh(token).catch(() => {});
  });

  return {
    /**
     * user is who is logged in, or null. It is the same object until the user or the address
     * changes.
     *
     * @returns {User | null}
     */
    get user() {
      return user;
    },

    /**
     * onchange calls the listener whenever somebody logs in or out or has a new address, in this
     * tab or another. It returns a function that ends this.
     *
     * @type {(listener: (user: User | null) => void) => () => void}
     */
    onchange: (listener) => {
      listeners.add(listener);
      return () => {
        listeners.delete(listener);
      };
    },

    /**
     * resume takes up the session of the refresh cookie, if there is one, and returns its user.
     * Call it when the page loads.
     *
     * @type {() => Promise<User | null>}
     */
    resume: async () => {
      await refresh(token).catch((error) => {
        if (error.status !== 401) throw error;
      });
      return user;
    },

    /**
     * signup opens an account, and logs in.
     *
     * @type {(email: string, password: string) => Promise<User & { createdAt: string }>}
     */
    signup: (email, password) => enter('/auth/signup', { email, password }),

    /**
     * login opens a session. It rejects with the code `account_disabled` if an operator has
     * disabled the account.
     *
     * @type {(email: string, password: string) => Promise<User>}
     */
    login: (email, password) => enter('/auth/login', { email, password }),

    /**
     * logout ends this session. It rejects if the server cannot be asked, because the cookie is
     * still there then.
     *
     * @type {() => Promise<void>}
     */
    logout: () => locked(async () => {
      const headers = token ? { Authorization: `Bearer ${token}` } : undefined;
      await json(open, 'POST', '/auth/logout', null, headers).catch((error) => {
        // After a 401 the session is over, too.
        if (error.status !== 401) throw error;
      });
      announce(null);
    }),

    /**
     * fetch is `fetch` with the access token, for paths of the server. It refreshes the token
     * before that runs out, and when the server refuses it. It may send `init.body` twice, so that
     * must not be a stream.
     *
     * Like `fetch` it resolves to any answer, and rejects if there is none. It rejects with an
     * AuthError if the refresh failed, for example because nobody is logged in, or if the refresh
     * found somebody else logged in: what one user asked for is never sent as another.
     */
    fetch: authFetch,

    /**
     * me returns the user as the server knows it now.
     *
     * @type {() => Promise<Profile>}
     */
    me: async () => (await call('GET', '/auth/me')).user,

    /**
     * sessions returns the sessions of the user, the one that was used last first.
     *
     * @type {() => Promise<Session[]>}
     */
    sessions: async () => (await call('GET', '/auth/sessions')).sessions,

    /**
     * revokeSession ends one session of the user.
     *
     * @type {(id: string) => Promise<void>}
     */
    revokeSession: async (id) => {
      const own = id === claims?.sid;
      await call('DELETE', `/auth/sessions/${encodeURIComponent(id)}`);
      if (own) announce(null);
    },

    /**
     * revokeAll logs the user out everywhere, here too.
     *
     * @type {() => Promise<void>}
     */
    revokeAll: async () => {
      await call('DELETE', '/auth/sessions');
      announce(null);
    },

    /**
     * changePassword ends every other session of the user. This one goes on.
     *
     * @type {(currentPassword: string, newPassword: string) => Promise<Message>}
     */
    changePassword: (currentPassword, newPassword) =>
      call('PUT', '/auth/password', { currentPassword, newPassword }),

    /**
     * deleteAccount deletes the account and all its sessions.
     *
     * @type {(password: string) => Promise<void>}
     */
    deleteAccount: async (password) => {
      await call('DELETE', '/auth/me', { password });
      announce(null);
    },

    // The rest is about links by mail. Each link leads to a page of the frontend, and has its token
    // in the fragment. Take the token out of the address at once, and send it after a click,
    // because mail scanners open links too. No link logs anybody in.

    /**
     * forgotPassword asks for a link that sets a new password. It succeeds as well if the address
     * has no account.
     *
     * @type {(email: string) => Promise<Message>}
     */
    forgotPassword: (email) => json(open, 'POST', '/auth/password/forgot', { email }),

    /**
     * resetPassword sets the password by such a link, and ends every session of the link's user,
     * who then logs in with the new password.
     *
     * @type {(linkToken: string, newPassword: string) => Promise<Message>}
     */
    resetPassword: (linkToken, newPassword) =>
      follow('/auth/password/reset', { token: linkToken, newPassword }),

    /**
     * sendVerification asks once more for the link that verifies the user's address. `me` tells
     * whether the address is verified.
     *
     * @type {() => Promise<Message>}
     */
    sendVerification: () => call('POST', '/auth/email/verification'),

    /**
     * changeEmail asks for a link to a new address, which becomes the user's when that link is
     * verified.
     *
     * @type {(newEmail: string, password: string) => Promise<Message>}
     */
    changeEmail: (newEmail, password) => call('PUT', '/auth/email', { newEmail, password }),

    /**
     * verifyEmail verifies an address by the link that was mailed to it, and returns the link's
     * user.
     *
     * @type {(linkToken: string) => Promise<User & { emailVerified: true }>}
     */
    verifyEmail: async (linkToken) =>
      (await follow('/auth/email/verify', { token: linkToken })).user,
  };
}
