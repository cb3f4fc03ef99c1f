"""The `nightshift` command-line interface."""
