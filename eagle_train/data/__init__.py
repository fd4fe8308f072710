"""From shards to packed rows: index, plan, read, encode, pack."""
