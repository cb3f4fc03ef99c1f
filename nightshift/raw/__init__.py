"""The shards below data/raw: how their rows are read and checked, and which are forgotten."""
