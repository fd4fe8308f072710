"""Files of weights, and the published layouts we read and write: one family per file."""
