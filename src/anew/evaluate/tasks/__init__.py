"""The evaluation tasks: their data, prompts and figures."""
