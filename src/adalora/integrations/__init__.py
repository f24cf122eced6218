"""Other frameworks: each is imported in its own file here and nowhere else."""
