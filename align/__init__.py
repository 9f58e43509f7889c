"""Position maps, vocabulary maps and fusion of distributions."""
