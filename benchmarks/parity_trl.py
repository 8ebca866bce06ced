"""Compare rft's losses with TRL's: identical tensors through both, TRL in a separate environment.

    python benchmarks/parity_trl.py [--inputs 200] [--out benchmarks/results/parity-trl.json]

Prints the largest relative difference per loss (value and gradient, float32), and how far each side
is from the same formula in float64. Exits 1 where a difference above 1e-5 has no reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import parity
import parity_online
import torch

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=200, help="inputs per loss")
    parser.add_argument("--only", default="", help="only the losses with this in their name")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "parity-trl.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    rows += parity.compare(
        parity_online.comparisons(args.inputs), "trl", HERE / "peers" / "trl_online.py", args.only
    )
    if importlib.util.find_spec("parity_offline"):
        offline = importlib.import_module("parity_offline")
        rows += parity.compare(
            offline.comparisons(args.inputs), "trl", HERE / "peers" / "trl_offline.py", args.only
        )
    print(parity.table(rows))
    failed = parity.failures(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pins = [
        line for line in (HERE / "peers" / "requirements-trl.txt").read_text().splitlines() if "==" in line
    ]
    result = {"peer": pins, "torch": torch.__version__, "bound": parity.BOUND, "failed": failed, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} losses, {len(failed)} over {parity.BOUND:g} without a reason; written to {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
