"""A web page that shows how a model chooses its tokens, and OpenAI's completions and chat APIs."""
