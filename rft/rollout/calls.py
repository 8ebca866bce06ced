"""Lay out the calls of a session as one completion: the exact token trie of their prompts and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rft.batch import Branch, Completion, Turn


@dataclass(frozen=True)
class Call:
    """One model call of a session, as the engine saw it.

    prompt: the ids given to the engine; sampled: the ids it returned, with `logps[i]` the log-prob of
    `sampled[i]`, and `versions`, (policy version, start, end) spans of `sampled`.
    trained: False for a call that is not part of the task (a title, a summary): no token of it is trained.
    reward: the part of the session's reward that this turn earned; None: no reward was given.
    state: names the environment's state in which the policy acted, to compare turns in equal states; None:
        it is the policy's input, the prompt's ids after the last one that it sampled.
    """

    prompt: tuple[int, ...]
    sampled: tuple[int, ...]
    logps: tuple[float, ...]
    finish: Literal["stop", "length"]
    versions: tuple[tuple[int, int, int], ...]
    trained: bool = True
    reward: float | None = None
    state: str | None = None


@dataclass(eq=False)
class _Run:
    """Tokens of the trie without a branch in between. `call`: index of the call that sampled them, from its
    token `offset` on; -1: tokens of a call's prompt; None: tokens of the group's prompt, from `offset` on."""

    tokens: tuple[int, ...]
    call: int | None
    offset: int = 0
    children: list[_Run] = field(default_factory=list)

    def split(self, at: int) -> None:
        """Keep the first `at` tokens; the others, if there are any, become the only child."""
        if at < len(self.tokens):
            rest = _Run(self.tokens[at:], self.call, self.offset + at, self.children)
            self.tokens, self.children = self.tokens[:at], [rest]


def lay_out(prompt: tuple[int, ...], calls: Sequence[Call]) -> Completion:
    """Return the calls of one session as a completion of `prompt`, the tokens that its group shares.

    Each call's prompt follows the tokens laid out before it up to the first difference, sampled or not; the
    rest is new, and masked out of the loss. Sampled tokens are always new, also where an earlier call sampled
    the same ones: each is trained exactly once, in the context in which it was sampled. Calls that are not
    trained leave no tokens. The sampled tokens of a call are contiguous, and `turns` has one entry for
    each call. `finish` is that of the last trained call. A session in which every prompt extends the one
    before has no `branches`.
    Raises ValueError if no call has tokens to train on, for a call without a prompt, or if log-probs
    do not match the sampled tokens.
    """
    root = _Run((), None, children=[_Run(prompt, None)])
    states: list[str | tuple[int, ...]] = [c.prompt if c.state is None else c.state for c in calls]
    trained = [k for k, call in enumerate(calls) if call.trained and call.sampled]
    if not trained:
        raise ValueError(f"none of the {len(calls)} calls of this session has sampled tokens to train on")
    for k in trained:
        call = calls[k]
        if not call.prompt:
            raise ValueError(f"call {k} has an empty prompt: its first token would follow nothing")
        if len(call.logps) != len(call.sampled):
            raise ValueError(
                f"call {k} has {len(call.sampled)} sampled tokens, but {len(call.logps)} log-probs"
            )
        run, used, matched, read = _longest_match(root, call.prompt)
        if call.state is None:
            states[k] = call.prompt[read:]
        run.split(used)
        if matched < len(call.prompt):
            run.children.append(new := _Run(call.prompt[matched:], -1))
            run = new
        run.children.append(_Run(call.sampled, k))
    return _flatten(root, calls, states, len(prompt), calls[trained[-1]].finish)


def _longest_match(root: _Run, prompt: tuple[int, ...]) -> tuple[_Run, int, int, int]:
    """Follow a prompt as far as the trie has it: (the last run, its tokens used, the prompt's tokens used,
    those up to the last sampled one). Equal samples make several paths with the same tokens; of equally long
    ones, the newest is taken."""
    best = (root, 0, 0, 0)
    stack = [(child, 0, 0) for child in root.children]
    while stack:
        run, before, read = stack.pop()  # the newest child first
        used = _common_length(run.tokens, prompt, before)
        if used and run.call is not None and run.call >= 0:
            read = before + used
        if before + used > best[2]:
            best = (run, used, before + used, read)
        if used == len(run.tokens):
            stack += [(child, before + used, read) for child in run.children]
    return best


def _common_length(run: tuple[int, ...], prompt: tuple[int, ...], at: int) -> int:
    """Count the tokens at the start of `run` that equal those of `prompt` from `at` on."""
    low, high = 0, min(len(run), len(prompt) - at)
    while low < high:  # halving compares slices, which is faster than a loop over tokens
        middle = (low + high + 1) // 2
        if run[low:middle] == prompt[at + low : at + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _flatten(
    root: _Run,
    calls: Sequence[Call],
    states: Sequence[str | tuple[int, ...]],
    shared: int,
    finish: Literal["stop", "length"],
) -> Completion:
    """Write the trie depth first: a run is followed by its first child, so that a session without branches
    stays one run. shared: the number of tokens of the group's prompt."""
    tokens: list[int] = []
    logps: list[float] = []
    mask: list[bool] = []
    branches: list[Branch] = []
    starts: dict[int, int] = {}  # of each call's sampled tokens
    stack = [(child, -1) for child in reversed(root.children)]  # (run, position of the token before it)
    while stack:
        run, after = stack.pop()
        start, n = len(tokens), len(run.tokens)
        if run.call is None:
            end = run.offset + n - 1
        else:
            end = shared + start + n - 1
            if not branches or after != shared + start - 1:
                branches.append(Branch(start, after))
            sampled = run.call >= 0
            tokens += run.tokens
            mask += [sampled] * n
            logps += calls[run.call].logps[run.offset : run.offset + n] if sampled else [0.0] * n
            if sampled:
                starts.setdefault(run.call, start)
        stack += [(child, end) for child in reversed(run.children)]
    begins = [starts.get(k, 0) for k in range(len(calls))]
    ends = [a + len(calls[k].sampled) if k in starts else a for k, a in enumerate(begins)]
    return Completion(
        tuple(tokens),
        finish=finish,
        logps=tuple(logps),
        mask=None if all(mask) else tuple(mask),
        versions=tuple((v, begins[k] + a, begins[k] + b) for k in starts for v, a, b in calls[k].versions),
        branches=() if branches == [Branch(0, shared - 1)] else tuple(branches),
        turns=tuple(
            Turn(a, b, c.reward, state) for a, b, c, state in zip(begins, ends, calls, states, strict=True)
        ),
    )
