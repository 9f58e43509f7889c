"""The recipe, the graph of its products, and the pipeline that makes them."""
