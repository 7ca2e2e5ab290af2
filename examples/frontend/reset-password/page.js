// The page behind 'Forgot your password?', and the one that its link leads to.
import { token } from '../link.js';
import { emailOf } from '../auth.js';
import { $, auth, complain, handle, say, show } from '../common.js';

handle({
  async forgot({ email }) {
    await auth.forgotPassword(email);
    say(`If ${email} has an account, a mail is on its way. Open the link in it.`);
  },
  async reset({ newPassword }) {
    try {
      await auth.resetPassword(token, newPassword);
    } catch (error) {
      if (error.code !== 'invalid_link') throw error;
      show('forgot');
      return complain(
        $('#forgot'),
        'This link does not work: it has expired, or was used already. Have a new one sent.',
      );
    }
    $('#reset').reset();
    // The sessions of the link's user have ended. If this browser still has one, it is somebody
    // else's.
    $('#done').hidden = Boolean(auth.user);
    $('#done-other').hidden = !auth.user;
    if (auth.user) $('#other').textContent = auth.user.email;
    show('done');
  },
});

if (token) {
  // With the field of the address, a password manager knows whose password it saves.
  $('#reset-email').value = $('#forgot-email').value = emailOf(token);
}
show(token ? 'reset' : 'forgot');
