"""The graph in dvc.yaml and its data, and the processes that run it."""
