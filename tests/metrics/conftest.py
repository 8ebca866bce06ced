from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import make_run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, once killed and resumed."""
    return make_run(tmp_path_factory.mktemp("runs") / "arithmetic-seed1")
