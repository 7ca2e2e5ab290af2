// This module takes the token of the link that led to the page. The pages import it first, so that
// the token has left the address bar before anything else runs. The token is kept in memory only:
// whoever reloads the page has to open the link again. The browser's own list of visited pages
// keeps the link, which is why it does not work for long.
const url = new URL(location.href);
export const token = new URLSearchParams(url.hash.slice(1)).get('token');
url.hash = '';
history.replaceState(null, '', url);

// When another link is opened in the same tab, the page starts afresh with that one.
addEventListener('hashchange', () => location.reload());
