"""Helpers that know nothing of rft: any module may import them."""
