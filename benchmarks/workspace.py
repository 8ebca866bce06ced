"""Memory of the fused log-probs beyond inputs and gradients, against the number of rows: it must be flat.

    python benchmarks/workspace.py [--rows 4096 16384 65536] [--out FILE]

Each figure is the peak of a fresh process, float32. The logits of all rows are given beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import RESULTS, in_fresh_process, write_result
from logprob import Case, workspace
from logprob_contenders import OURS

WIDTH, VOCABULARY = 128, 8192
FLAT = 1.15  # the largest over the smallest, at most


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[4096, 16384, 65536])
    parser.add_argument("--out", type=Path, default=RESULTS / "workspace-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for contender in OURS:
        found = {
            str(n): round(
                in_fresh_process(workspace, Case(n, WIDTH, VOCABULARY), torch.float32, contender.name), 1
            )
            for n in args.rows
        }
        passed = max(found.values()) <= FLAT * min(found.values())
        results.append({"contender": contender.name, "workspace_mb": found, "passed": passed})
        print(f"{contender.name:20s} {found} {'flat' if passed else 'GROWS'}", flush=True)
    logits = {str(n): round(n * VOCABULARY * 4 / 1e6) for n in args.rows}
    sizes = {"width": WIDTH, "vocabulary": VOCABULARY, "flat": FLAT, "logits_mb": logits}
    write_result(args.out, sizes | {"results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
