"""From text to documents, segments and parts; from forward passes to stored next-token distributions."""
