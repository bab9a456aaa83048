"""Masquerade: one base model, many personas, one batch."""

__version__ = "0.1.0"
