"""eagle_train: trains Eagle-family vision-language models from a laptop to a SLURM cluster."""
