// Each mistake here is one that the generated types find. Where they do not, tsc reports the comment
// above it. Nothing of this runs.

import createClient from 'openapi-fetch';
import type { paths } from './latchkey.js';

const client = createClient<paths>();

const login = await client.POST('/auth/login', {
  body: { email: 'ada@example.com', password: 'correct horse battery' },
});
// @ts-expect-error No answer has this code.
login.error?.code === 'account_disable';
// @ts-expect-error This code is not one of a login's.
login.error?.code === 'refresh_reused';
// @ts-expect-error A login tells the id and the email of the user, and no more.
login.data?.user.createdAt;

// @ts-expect-error There is no such path.
await client.POST('/auth/log-in');
// @ts-expect-error The path is there, but not with this method.
await client.GET('/auth/login');
// @ts-expect-error The password is missing.
await client.POST('/auth/login', { body: { email: 'ada@example.com' } });
