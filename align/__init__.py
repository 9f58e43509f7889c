"""Position maps, vocabulary maps and fusion."""
