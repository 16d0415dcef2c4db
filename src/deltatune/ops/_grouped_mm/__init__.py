"""One matrix per group of rows: the experts of a mixture."""
