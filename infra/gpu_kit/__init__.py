"""What a bare GPU machine needs to run the tests and measurements of the training."""
