"""Helpers that do not depend on the rest of rft: any module may import them."""
