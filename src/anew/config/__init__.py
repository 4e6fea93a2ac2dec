"""Every setting of a run, its rules, and the named recipes."""
