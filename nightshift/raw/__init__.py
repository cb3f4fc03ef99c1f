"""Shards in data/raw: how their rows are read and checked, and which rows are forgotten."""
