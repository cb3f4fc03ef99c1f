"""Training rows from schema to tokens, and statistics of evaluation scores."""
