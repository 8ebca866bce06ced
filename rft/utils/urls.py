"""Credentials in URLs, which must not reach logs."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")


def has_credentials(url: str) -> bool:
    """Whether a URL carries a user name or password."""
    return _CREDENTIALS.search(url) is not None


def without_credentials(text: str) -> str:
    """A text with the credentials of the URLs in it replaced by `***`."""
    return _CREDENTIALS.sub("***@", text)
