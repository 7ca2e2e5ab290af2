import { useActionState } from 'react';
import { AuthError, type User } from './auth.js';
import { auth, useUser } from './user';

export function App() {
  const user = useUser();
  return user ? <Account user={user} /> : <Login />;
}

function Login() {
  const [{ email, problem }, login, pending] = useActionState(
    async (_: unknown, form: FormData) => {
      const email = String(form.get('email'));
      const password = String(form.get('password'));
      return { email, problem: await problemOf(auth.login(email, password)) };
    },
    { email: '', problem: '' },
  );
  return (
    <section id="view-login">
      <h1>Log in</h1>
      <form action={login}>
        <p className="problem" role="alert">{problem}</p>
        <label className="field">
          Email
          <input
            name="email"
            type="email"
            autoComplete="username"
            required
            defaultValue={email}
          />
        </label>
        <label className="field">
          Password
          <input name="password" type="password" autoComplete="current-password" required />
        </label>
        <button className="primary" disabled={pending}>Log in</button>
      </form>
    </section>
  );
}

function Account({ user }: { user: User }) {
  const [problem, logout, pending] = useActionState(() => problemOf(auth.logout()), '');
  return (
    <section id="view-account">
      <h1>{user.email}</h1>
      <form action={logout}>
        <p className="problem" role="alert">{problem}</p>
        <button className="primary" disabled={pending}>Log out</button>
      </form>
    </section>
  );
}

/** problemOf returns why an attempt has failed, or '' if it has not. */
async function problemOf(attempt: Promise<unknown>) {
  try {
    await attempt;
    return '';
  } catch (error) {
    // Any other error is a bug.
    if (!(error instanceof AuthError)) throw error;
    return error.message;
  }
}
