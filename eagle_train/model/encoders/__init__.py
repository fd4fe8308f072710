"""One vision encoder family per file."""
