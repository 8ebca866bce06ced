"""What the forest saves on sessions that branch: forward and backward of a session's token trie, against the
same calls as one row each, at the shape of SmolLM2-135M.

    python benchmarks/session_cost.py [--rounds 5] [--threads 1] [--cases 512x256x64x3 ...]

A case is prompt x sampled x observation x turns. Each turn's prompt drifts from the earlier samples: the
template writes the last tokens of every turn otherwise, so each turn is a branch. A row gives the median
times of interleaved rounds, their ratio, the bound (the ratio of floating-point operations), and the largest
relative differences of losses and gradients. Both run through rft, packed, with the head at the sampled
tokens, which are the same in both. `of_bound` at 0.9 or more passes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, gradient_error, interleaved, merge_rows, write_result
from shapes import SMOLLM2, Shape
from torch import Tensor

from rft.batch import Batch, Group, Prompt
from rft.learner.model import PolicyModel
from rft.rollout.calls import Call, lay_out

CASES = [(512, 256, 64, 3), (1024, 128, 128, 3), (256, 256, 64, 6)]
DRIFT = 4  # tokens at the end of a sampled turn that the next prompt writes otherwise
Case = tuple[int, int, int, int]


def session_of(case: Case, vocabulary: int) -> list[Call]:
    prompt, sampled, observation, turns = case
    g = torch.Generator().manual_seed(sum(case))

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (n,), generator=g).tolist())

    calls: list[Call] = []
    for _ in range(turns):
        before = tokens(prompt)
        if calls:
            before = calls[-1].prompt + calls[-1].sampled[:-DRIFT] + tokens(DRIFT + observation)
        calls.append(Call(before, tokens(sampled), (0.0,) * sampled, "stop", ()))
    return calls


class Side:
    """A model and one layout of the session, ready to run."""

    def __init__(self, shape: Shape, groups: list[Group]) -> None:
        self.batch = Batch.build(groups)
        self.policy = PolicyModel(shape.build(), temperature=1.0, compute_dtype=torch.float32)
        self.loss = torch.zeros(())

    def __call__(self) -> Tensor:
        """Forward and backward of the mean log-prob; gradients start anew."""
        self.policy.model.zero_grad()
        loss = self.policy.run(self.batch).logps.sum() / self.batch.mask.sum()
        loss.backward()
        self.loss = loss.detach()
        return self.loss


def layouts(case: Case, vocabulary: int) -> tuple[list[Group], list[Group]]:
    """(the session as one completion, each call as a row)."""
    calls = session_of(case, vocabulary)
    whole = Group(Prompt(0, calls[0].prompt, ""), (lay_out(calls[0].prompt, calls),))
    rows = [Group(Prompt(k, c.prompt, ""), (lay_out(c.prompt, [c]),)) for k, c in enumerate(calls)]
    return [whole], rows


def measure(shape: Shape, case: Case, rounds: int) -> dict[str, Any]:
    whole, rows = layouts(case, shape.vocabulary)
    trie, separate = Side(shape, whole), Side(shape, rows)
    trie(), separate()
    difference = float((trie.loss - separate.loss).abs() / separate.loss.abs())
    errors = {"loss": difference, "gradient": gradient_error(trie.policy.model, separate.policy.model)}
    times = interleaved({"trie": trie, "rows": separate}, rounds)
    head = 2 * shape.width * shape.vocabulary * float(trie.batch.mask.sum())  # the same work in both
    bound = (shape.operations(separate.batch) + head) / (shape.operations(trie.batch) + head)
    gain = times.gain("rows", "trie")
    prompt, sampled, observation, turns = case
    return {
        "prompt": prompt,
        "sampled": sampled,
        "observation": observation,
        "turns": turns,
        "layers": shape.layers,
        "tokens": {"trie": trie.batch.num_tokens, "rows": separate.batch.num_tokens},
        "gain": round(gain, 3),
        "bound": round(bound, 3),
        "of_bound": round(gain / bound, 3),
        "passed": gain >= 0.9 * bound,
        "errors": errors,
        **times.summary(),
    }


def case_of(text: str) -> Case:
    prompt, sampled, observation, turns = (int(n) for n in text.split("x"))
    return prompt, sampled, observation, turns


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--layers", type=int, default=SMOLLM2.layers, help="layers of the model")
    parser.add_argument("--cases", nargs="+", type=case_of, metavar="PxSxOxT", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "session-cost-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape = Shape(**{**asdict(SMOLLM2), "layers": args.layers})
    rows: list[dict[str, Any]] = []
    print("    p   sampled  observed  turns     rows     trie    gain   bound  of bound     loss    grads")
    for case in args.cases or CASES:
        row = measure(shape, case, args.rounds)
        rows.append(row)
        seconds, errors = row["seconds"], row["errors"]
        print(
            f"{case[0]:5d} {case[1]:9d} {case[2]:9d} {case[3]:6d} {seconds['rows']:7.3f}s "
            f"{seconds['trie']:7.3f}s {row['gain']:7.2f} {row['bound']:7.2f} {row['of_bound']:8.0%} "
            f"{errors['loss']:9.1e} {errors['gradient']:8.1e}",
            flush=True,
        )
        kept = merge_rows(args.out, ("prompt", "sampled", "observation", "turns", "layers"), rows)
        write_result(args.out, {"model": asdict(shape), "rounds": args.rounds, "results": kept})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
