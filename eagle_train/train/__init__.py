"""Config to objects, the loop, engines, checkpoints."""
