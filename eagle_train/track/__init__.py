"""Metrics, logs and the report."""
