"""Credentials in URLs, which must not reach logs."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")


def has_credentials(url: str) -> bool:
    """Whether a URL carries a user name or password."""
    return _CREDENTIALS.search(url) is not None


def without_credentials(text: str) -> str:
    """Replace the credentials of every URL in a text by `***`."""
    return _CREDENTIALS.sub("***@", text)
