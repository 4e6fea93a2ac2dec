"""A run as a page: what it reached, beside what others reached, and how it came about."""
