"""Rows on their way to the training, and the scores of what came of it."""
