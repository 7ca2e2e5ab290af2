// What TypeScript knows of auth.js. Nothing of this runs: tsc reads it, beside the types that
// openapi-typescript generates from openapi.yaml.

import type { components } from '../typescript/latchkey.js';
import { AuthError, createAuth, emailOf } from './src/auth.js';
import type { Auth, ErrorCode } from './src/auth.js';

type Api = components['schemas'];

/** same takes no argument, so that its call compiles, only if both types are the same. */
declare function same<A, B>(...differ: Equal<Plain<A>, Plain<B>> extends true ? [] : [A, B]): void;
type Equal<A, B> = Of<A> extends Of<B> ? true : false;
type Of<A> = <T>() => T extends A ? 1 : 2;
type Plain<T> = { -readonly [K in keyof T]: T[K] };

// The server's answers are what openapi.yaml says.
type Result<K extends 'signup' | 'login' | 'me' | 'sessions' | 'verifyEmail'> =
  Awaited<ReturnType<Auth[K]>>;
same<Result<'signup'>, Api['User']>();
same<Result<'login'>, Api['LoginUser']>();
same<Result<'me'>, Api['Account']>();
same<Result<'sessions'>, Api['Session'][]>();
same<Result<'verifyEmail'>, Api['VerifiedUser']>();
same<ErrorCode, Api['ErrorCode'] | 'network' | 'user_changed' | 'unknown'>();

// No member takes or returns `any`, which would let every mistake pass.
type IsAny<T> = 0 extends 1 & T ? true : false;
type IsLoose<T> = T extends (...args: infer A) => infer R
  ? IsAny<A[number]> | IsAny<Awaited<R>>
  : IsAny<T>;
type Loose<T> = { [K in keyof T]-?: true extends IsLoose<T[K]> ? K : never }[keyof T];
same<Loose<Auth>, never>();
same<Loose<AuthError>, never>();

// Each of these mistakes is found. Where one is not, tsc reports the comment above it.

// @ts-expect-error This option has another name.
createAuth({ baseUrl: 'http://localhost:3000' });
const auth = createAuth({ baseURL: 'http://localhost:3000' });

// @ts-expect-error Perhaps nobody is logged in.
auth.user.email;
// @ts-expect-error The same object is given to everybody.
if (auth.user) auth.user.email = 'ada@example.com';
// @ts-expect-error Perhaps nobody is logged in any more.
auth.onchange((user) => user.email);
// @ts-expect-error The password is missing.
auth.login('ada@example.com');
// @ts-expect-error There is no such method.
auth.refresh();
// @ts-expect-error The address has no token.
emailOf(new URLSearchParams(location.hash.slice(1)).get('token'));

auth.logout().catch((error: unknown) => {
  // @ts-expect-error Perhaps it is another error.
  error.code;
  if (!(error instanceof AuthError)) throw error;
  // @ts-expect-error No error has this code.
  error.code === 'account_disable';
});
