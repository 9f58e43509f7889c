"""The rendezvous of ranks started by `ranks.Ranks`. Ranks of `torchrun` use its own rendezvous."""

MEETING = "FUSELINE_RANKS"  # environment variable: the file for the ranks' rendezvous
