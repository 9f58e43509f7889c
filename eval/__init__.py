"""Perplexity and bits per byte on held-out text, and the report."""
