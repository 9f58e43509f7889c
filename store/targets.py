"""Values of `source_T` and `source_S` of fused targets without a single source. Every other value is an index into the sources."""

SEVERAL = 255  # in source_T and source_S: a mean of several sources
ONE_HOT = 254  # in source_T: all mass on one token, from no source
