"""Executors run the missing parts of a stage: processes on this machine, a Slurm job array, or actors on a Ray cluster."""
