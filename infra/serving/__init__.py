"""Serve a version of the model behind an OpenAI-compatible API, and follow its alias."""
