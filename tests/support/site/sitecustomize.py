"""Lets every Python process that a test starts fork its ranks and workers from the warm server; see `warm.py`."""

from support import warm

warm.install()
