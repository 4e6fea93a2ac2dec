"""Kernels of the model that are written by hand."""
