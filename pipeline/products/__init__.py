"""The kinds of products of a recipe, one file for each family. `graph.py` combines them."""
