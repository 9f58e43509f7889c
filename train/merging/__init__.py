"""Merges models of one architecture in parameter space, block by block, so that memory does not grow with the models."""
