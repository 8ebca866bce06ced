"""Environments that are reached by dotted path."""
