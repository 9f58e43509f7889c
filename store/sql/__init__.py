"""All stored data as DuckDB tables, read lazily from the parts on disk."""
