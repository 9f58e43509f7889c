"""How the missing parts of a stage are run: processes on this machine, a Slurm job array, or actors on a Ray cluster."""
