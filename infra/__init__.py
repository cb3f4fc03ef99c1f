"""Infrastructure around the flows: command line, local stack, config importers, installation."""
