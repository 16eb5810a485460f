"""A metric that evaluate.load reads by its path."""
