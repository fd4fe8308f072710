"""A toy data set, drawn from a seed: small pictures, clips and texts that a tiny model can learn from."""
