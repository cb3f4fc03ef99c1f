"""The command line `nightshift`: a thin set of verbs."""
