"""The kinds of things that a recipe makes: one file for each family, `graph.py` puts them together."""
