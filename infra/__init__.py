"""What runs the flows: the command line, the local stack, importers, installation."""
