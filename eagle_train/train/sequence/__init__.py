"""Sequence parallelism: ranks of a group share each row, its tokens, its tiles and its attention heads."""
