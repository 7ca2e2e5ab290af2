// The token of the link that led to this page. The pages import this module first, so that the token has left the address
// bar before anything else runs. It is kept in memory only: whoever reloads the page has to open the link again.
export const token = new URLSearchParams(location.hash.slice(1)).get('token');
history.replaceState(null, '', location.pathname);

// When another link is opened in the same tab, the page starts afresh with that one.
addEventListener('hashchange', () => location.reload());
