// The page behind the links that verify an address: that of a new account, or a changed one.
import { token } from '../link.js';
import { emailOf } from '../auth.js';
import { $, auth, handle, show } from '../common.js';

handle({
  async verify() {
    try {
      const { email } = await auth.verifyEmail(token);
      $('#verified').textContent = email;
    } catch (error) {
      if (error.code !== 'invalid_link') throw error;
      return show('invalid');
    }
    show('done');
  },
});

if (token) $('#address').textContent = emailOf(token) || 'this';
show(token ? 'verify' : 'missing');
