"""The real data sets that the larger checks run on: the full ones, or else the part that the examples ship.

A test that finds neither says so and skips.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOT = Path(os.environ.get("RFT_DATA") or REPOSITORY / ".." / "shared" / "data")
SHIPPED = REPOSITORY / "examples" / "data"


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file below the data folder, plain or gzipped."""
    path = next((root / name for root in (ROOT, SHIPPED) if (root / name).is_file()), None)
    if path is None:
        pytest.skip(f"no {ROOT / name}: set RFT_DATA to the folder with gsm8k, math500 and humaneval")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8").splitlines()]
