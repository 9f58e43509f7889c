"""What `source_T` and `source_S` of fused targets hold where no one source is meant; every other value is a place among the sources."""

SEVERAL = 255  # in source_T and source_S: a mean of several sources
ONE_HOT = 254  # in source_T: all mass on one token, which is of no source
