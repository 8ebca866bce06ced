"""Shared prompts against the same sequences packed without sharing, forward and backward of the
transformer: pairs at the length profiles of the prefix-sharing paper, groups of 4 at 4k and 8k of context;
1B- and 7B-shaped random weights, all weights trained or LoRA; the log-sum-exp merge and FlexAttention.

Unshared sequences are packed too (flash attention by lengths), so a gain is sharing's alone. A group's
completions have 1,024 tokens, its prompt the rest of the context. Targets: 90 % of the bound (the ratio of
floating-point operations) on each profile, at least the paper's packed gain; groups 1.5 at 4k, 2.0 at 8k.
First, hidden states are compared with separate sequences', in float32, by both kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Settings, random_model, settings, timed
from peft import LoraConfig, get_peft_model
from profiles import PAPER
from shapes import Shape

from rft.batch import Batch, Completion, Group, Prompt
from rft.kernels.attention import hidden_states, prepare_model, relative_error, sequence_hidden_states
from rft.kernels.attention_route import Kernel, decoder_of
from rft.kernels.forest import Forest

SHAPES = {
    "1B": Shape(2048, 8192, 16, 16, 8, 128, 1024),
    "7B": Shape(4096, 14_336, 32, 32, 8, 128, 1024),
    "small": Shape(64, 128, 2, 2, 1, 32, 1024),
}
GROUP_TARGETS = {4096: 1.5, 8192: 2.0}


def build(shape: str, s: Settings, lora: bool) -> Any:
    model: Any = random_model(SHAPES[shape], s)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    model.train()
    if not s.small:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def groups_of(prompt: int, completions: list[int], count: int) -> list[Group]:
    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(SHAPES["small"].vocabulary, (n,)).tolist())

    return [
        Group(Prompt(i, tokens(prompt), ""), tuple(Completion(tokens(n)) for n in completions))
        for i in range(count)
    ]


def cases(s: Settings) -> dict[str, tuple[list[Group], float]]:
    """By name: groups of about 16,384 tokens unshared, and the gain that must be reached beside 90 %."""
    if s.small:
        return {"pair": (groups_of(24, [8, 8], 2), 0.0), "group of 4": (groups_of(48, [16] * 4, 1), 0.0)}
    found = {}
    for name, described in PAPER.items():
        prompt, completions = described.pair()
        count = max(1, 16_384 // (2 * described.length))
        found[name] = (groups_of(prompt, completions, count), described.paper_gain)
    for context, target in GROUP_TARGETS.items():
        found[f"group of 4, {context}"] = (groups_of(context - 1024, [1024] * 4, 1), target)
    return found


def correctness(s: Settings) -> list[dict[str, Any]]:
    exact = Settings(s.part, True, s.out)  # a float32 model, wherever it runs
    batch = Batch.build(groups_of(200, [30, 50, 70], 2), share_prefix=True).to(s.device)
    rows = []
    kernels: tuple[Kernel, ...] = ("auto", "flex")
    for kernel in kernels:
        model = build("small", exact, lora=False).to(s.device).eval()
        with torch.no_grad():
            route = prepare_model(model, kernel=kernel)
            forest = Forest(batch.segment, batch.parent, batch.positions)
            separate = sequence_hidden_states(decoder_of(model), batch.tokens, forest)
            error = relative_error(hidden_states(model, batch), separate)
        rows.append({"kernel": kernel, "route": route.kind, "error": error, "passed": error < 1e-3})
    return rows


def measure(shape: str, lora: bool, s: Settings) -> list[dict[str, Any]]:
    model = build(shape, s, lora)
    kernels: tuple[Kernel, ...] = ("auto",) if s.small else ("merge", "flex")
    rows = []
    for name, (groups, gain_wanted) in cases(s).items():
        layouts = {share: Batch.build(groups, share_prefix=share).to(s.device) for share in (False, True)}

        def run(kernel: Kernel, share: bool, layouts: dict[bool, Batch] = layouts) -> None:
            prepare_model(model, kernel=kernel)
            model.zero_grad(set_to_none=True)
            hidden_states(model, layouts[share]).float().square().mean().backward()

        runs: dict[str, Callable[[], object]] = {"separate": lambda: run(kernels[0], False)}
        runs |= {k: lambda k=k: run(k, True) for k in kernels}  # type: ignore[misc]
        found = timed(runs, rounds=1 if s.small else 5)
        bound = SHAPES[shape].operations(layouts[False]) / SHAPES[shape].operations(layouts[True])
        gains = {k: found["separate"]["seconds"] / found[k]["seconds"] for k in kernels}
        best = max(gains.values())
        row = {"shape": shape, "lora": lora, "case": name, "bound": bound, "gains": gains, "runs": found}
        row |= {"of_bound": best / bound, "gain_wanted": gain_wanted}
        row["passed"] = None if s.small else best >= max(0.9 * bound, gain_wanted)
        rows.append(row)
    return rows


if __name__ == "__main__":
    s = settings("forest", __doc__)
    plans = [("small", False), ("small", True)] if s.small else [("1B", False), ("7B", True), ("7B", False)]
    s.finish({"correctness": correctness(s), "results": [row for plan in plans for row in measure(*plan, s)]})
