"""Hashes that name files of earlier runs: a change would lose caches, and refuse checkpoints."""

import pytest

from rft.utils.hashing import fingerprint, hash64, json_digest, short_digest
from rft.utils.seeds import derive_seed

DATA = {"b": 1, "a": [0.5, "ä"]}


def test_hashes_are_those_of_earlier_releases() -> None:
    assert fingerprint(DATA) == json_digest(DATA)[:16] == "3329f4eb2632099d"
    manifest = "6c7c4860e9ec31cd6976bf7d664575a4f71702e902353ac99c8d5ad88813e945"
    assert json_digest(DATA, compact=True) == manifest
    assert short_digest("/runs/x") == "02fc7deac2f4"
    assert hash64("1/a") == 12208100300184014999
    assert derive_seed(1, "a") == 12208100300184014999 >> 2


def test_a_manifest_holds_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_digest({"x": float("nan")}, compact=True)
