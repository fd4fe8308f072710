"""DeepSpeed ZeRO behind the engine protocol: the only package that knows DeepSpeed."""
