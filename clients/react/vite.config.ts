import react from '@vitejs/plugin-react';
import { defineConfig } from 'vite';

export default defineConfig({
  plugins: [react()],
  resolve: {
    // auth.js is a link to the example, which stands for a copy.
    preserveSymlinks: true,
  },
});
