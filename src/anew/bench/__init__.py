"""Speed, measured side by side, and experiments of many runs."""
