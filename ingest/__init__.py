"""Text to documents, segments and parts; forward passes to stored next-token distributions."""
