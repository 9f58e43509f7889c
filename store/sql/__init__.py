"""Everything that is stored as tables of DuckDB, read lazily from the parts on disk."""
