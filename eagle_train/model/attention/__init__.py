"""Attention of packed rows: one interface, several kernels."""
