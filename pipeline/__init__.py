"""A recipe, the graph of what it makes, and what makes it."""
