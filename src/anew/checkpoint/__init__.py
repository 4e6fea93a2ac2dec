"""Models and training state on disk: checkpoint folders, and reading and writing other formats."""
