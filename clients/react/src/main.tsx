import { StrictMode } from 'react';
import { createRoot } from 'react-dom/client';
import { App } from './App';
import { auth } from './user';
import './style.css';

const root = createRoot(document.getElementById('root')!);

// As long as the server cannot be asked, nobody knows who is logged in.
auth.resume().then(
  () => root.render(<StrictMode><App /></StrictMode>),
  (error: Error) => root.render(
    <p className="problem" role="alert">{error.message}. Reload the page.</p>,
  ),
);
