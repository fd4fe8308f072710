"""One way of fusing vision encoders per file."""
