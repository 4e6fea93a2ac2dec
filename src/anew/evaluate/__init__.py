"""Measure a model: its loss on held-out text and its figures in evaluation tasks."""
