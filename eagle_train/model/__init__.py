"""Encoders, projector, LLM and loss."""
