"""Reports about runs: the HTML page, pictures, and the model card of an exported model."""
