"""Merges models of one architecture in parameter space, block by block, so that memory does not depend on their size."""
