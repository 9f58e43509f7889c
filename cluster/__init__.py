"""How the parts of a stage are run, and the pipeline of a recipe."""
