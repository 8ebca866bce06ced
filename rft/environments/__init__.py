"""Environments: multi-turn tasks that run in killable worker processes."""
