"""The workspace: parts on disk, their manifests, and the DuckDB catalog that indexes them."""
