"""Distilling Step-by-Step for T5 on JAX."""

__version__ = "0.1.0"
