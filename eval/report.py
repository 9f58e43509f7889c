"""The report: bits per byte and perplexity of every model on the held-out text, by domain."""

import duckdb
import polars as pl

from ..store.catalog import rows

_BY_DOMAIN = """
    SELECT model, domain, bpb, perplexity, n_tokens, n_bytes FROM evaluations
    UNION ALL BY NAME
    SELECT model, 'all' AS domain, sum(nll) / (ln(2) * sum(n_bytes)) AS bpb, exp(sum(nll) / sum(n_tokens)) AS perplexity,
        sum(n_tokens)::BIGINT AS n_tokens, sum(n_bytes)::BIGINT AS n_bytes
    FROM evaluations WHERE domain <> 'all' GROUP BY model
"""


def evaluation_table(connection: duckdb.DuckDBPyConnection, *, metric: str = "bpb") -> pl.DataFrame:
    """One row per model, one column per domain, and `all` for the whole text; fewer bits per byte are better.

    Args:
        connection: to the catalog.
        metric: `bpb` (bits per byte, comparable across tokenizers) or `perplexity` (per token, not comparable).
    """
    found = rows(connection, _BY_DOMAIN)
    if not len(found):
        return pl.DataFrame({"model": []}, schema={"model": pl.String})
    wide = found.pivot("domain", index="model", values=metric, sort_columns=True)
    domains = [column for column in wide.columns if column not in {"model", "all"}]
    return wide.select("model", *domains, "all").sort("all", descending=True)


def fusion_table(connection: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """How often each source was chosen: target dataset, domain, source, share of the domain's positions."""
    return rows(
        connection,
        """
        SELECT name, domain, source, sum(n_positions) / sum(sum(n_positions)) OVER (PARTITION BY name, domain) AS share
        FROM targets JOIN documents USING (doc_id) GROUP BY name, domain, source ORDER BY name, domain, share DESC
        """,
    )
