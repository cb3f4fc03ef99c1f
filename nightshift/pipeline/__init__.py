"""The graph of dvc.yaml and its data, and the processes that work on it."""
