"""Kit for running the training tests and benchmarks on a bare GPU machine."""
