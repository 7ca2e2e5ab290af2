import { useSyncExternalStore } from 'react';
import { createAuth } from './auth.js';

export const auth = createAuth({ baseURL: import.meta.env.VITE_API_URL });

/** useUser returns who is logged in, or null. A login or logout in any tab renders anew. */
export function useUser() {
  return useSyncExternalStore(auth.onchange, () => auth.user);
}
