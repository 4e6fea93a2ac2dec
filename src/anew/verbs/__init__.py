"""The verbs of the command line, one file each: arguments, what it does, what it prints."""
