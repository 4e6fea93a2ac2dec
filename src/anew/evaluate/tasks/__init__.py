"""The evaluation tasks: their data, questions and figures. `table.py` lists them."""
