"""Where ranks that `ranks.Ranks` started meet. Ranks of `torchrun` meet at its own rendezvous."""

MEETING = "FUSELINE_RANKS"  # variable of the environment: the file in which the ranks meet
