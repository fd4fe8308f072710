"""Exact tokenizers: a folder with only `tokenizer.model` becomes a `tokenizer.json` that gives the same ids."""
