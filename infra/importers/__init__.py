"""Configurations of other tools, read as params.yaml."""
