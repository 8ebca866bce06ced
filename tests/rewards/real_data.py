"""The real data sets that the larger checks run on; a test that finds none says so and skips."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(os.environ.get("RFT_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file below the data folder, plain or gzipped."""
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"no {path}: set RFT_DATA to the folder with gsm8k, math500 and humaneval")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8").splitlines()]
