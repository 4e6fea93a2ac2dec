"""Models and training state on disk, in this format and in others."""
