"""Probes of the environment: faults, state, rewards, tokens and time of recorded sessions."""

from __future__ import annotations

import asyncio
import statistics
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.batch import Prompt
from rft.environments.types import Ending
from rft.rollout.engine import Generated, Request
from rft.tools.env_check.policies import Policy, Tools
from rft.tools.env_check.report import Report, indented, shown_difference
from rft.tools.env_check.sessions import Operation, Player, Run, WatchedRunner
from rft.tools.env_check.template import COST, first_branch

BEFORE = 3  # sessions that are played in a process before the one that is compared
REWARD_ERRORS = (" as its reward: ", " as its score ")  # of `environments/rewards.py`


def where(run: Run) -> str:
    return f"row {run.prompt.id + 1}, policy {run.policy}"


def per(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Group runs by a key, in order."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups


# -- faults ----------------------------------------------------------------------------------------------


def user_part(traceback: str) -> str:
    """Return a traceback with the frames of the user's files only; the message, if there are none."""
    installed = (
        f"{Path(__file__).parents[2]}/",
        sys.prefix,
        sys.base_prefix,
        *sysconfig.get_paths().values(),
    )
    kept: list[str] = []
    dropped = False
    for line in traceback.splitlines():
        if line.startswith('  File "'):
            path = line.removeprefix('  File "').partition('"')[0]
            dropped = path.startswith(installed) or path.startswith("<frozen")
        elif not line.startswith("    "):
            dropped = False
        if not dropped:
            kept.append(line)
    if not any(line.startswith('  File "') for line in kept):
        kept = [line for line in kept if line != "Traceback (most recent call last):"]
    return "\n".join(kept)


def check_faults(runs: Sequence[Run], report: Report) -> None:
    """Report sessions that a fault ended, one problem for each line that raised."""
    failed = per((r for r in runs if r.failed), lambda r: f"{r.episode.ending}{_raised(r.episode.detail)}")
    for same in failed.values():
        first = same[0]
        detail = "\n" + user_part(first.episode.detail)
        wrong_reward = any(text in detail for text in REWARD_ERRORS)
        instead = {
            Ending.timeout: "make it faster, or raise the deadline that the message names",
            Ending.tool_error: "do not end or block the process in a tool",
        }.get(first.episode.ending, "handle every text and argument that a policy may write")
        report.problem(
            "reward" if wrong_reward else "faults",
            f"{first.episode.ending} in {len(same)} of {len(runs)} sessions ({where(first)}, turn "
            f"{len(first.calls)}):{indented(detail)}",
            "return a finite number" if wrong_reward else instead,
        )
    endings = Counter(str(run.episode.ending) for run in runs)
    text = ", ".join(f"{count} {name}" for name, count in endings.most_common())
    report.line("sessions", f"{len(runs)} played: {text}", played=len(runs), endings=dict(endings))


def _raised(detail: str) -> str:
    """Return the line of code that raised; without a traceback, the message."""
    lines = user_part(detail).strip().splitlines() or [""]
    frames = [line for line in lines if line.startswith('  File "')]
    return (frames or lines)[-1]


def check_tools(runs: Sequence[Run], tools: Tools, report: Report) -> None:
    """Report which tools were called, and how many calls had no error."""
    if not tools:
        return
    calls: dict[str, list[Operation]] = defaultdict(list)
    for operation in (o for run in runs for o in run.operations if o.tool):
        calls[operation.tool].append(operation)
    names = [str(tool.get("function", tool)["name"]) for tool in tools]
    good = {name: sum(not o.error for o in calls[name]) for name in names}
    text = ", ".join(f"{name} {good[name]} of {len(calls[name])}" for name in names)
    figures = {name: {"calls": len(calls[name]), "successful": good[name]} for name in names}
    report.line("tools", f"calls without an error: {text}", by_name=figures)
    for name in names:
        if not good[name]:
            why = "no policy called it"
            if calls[name]:  # show one that raised in the user's code, rather than one with wrong arguments
                shown = max(calls[name], key=lambda o: 'File "' in user_part(o.traceback))
                trace = indented("\n" + user_part(shown.traceback))
                why = f"one of its {len(calls[name])} calls: {shown.error}{trace}"
            report.note("tools", f"{name} never returned without an error; {why}", "give calls by --replies")


def check_observations(runs: Sequence[Run], tokenizer: Any, report: Report) -> None:
    """Report observations that contain special tokens: they read as turns of the conversation."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= {text for text in map(str, tokenizer.all_special_tokens) if text}
    sources: dict[str, tuple[Run, str]] = {}
    for run in runs:
        written = "".join(str(m.get("content")) for m in run.episode.messages if m.get("role") == "assistant")
        first = 0 if isinstance(run.prompt.text, str) else run.episode.start
        for message in list(run.episode.messages)[first:]:
            role, text = message.get("role"), str(message.get("content") or "")
            text = text.replace(str(run.prompt.text), "")
            marks = sorted(mark for mark in special if mark in text and mark not in written)
            if role != "assistant" and marks:  # an echo of the policy's text is not the environment's
                name = message.get("name")
                source = f"tool `{name}`" if role == "tool" else f"an observation of role {role!r}"
                sources.setdefault(source, (run, f"{', '.join(marks[:4])} in {text!r:.160}"))
    for source, (run, shown) in sources.items():
        report.problem(
            "injection",
            f"{source} contains special tokens ({where(run)}): {shown}; rft gives them to the policy as "
            "text, but a server that encodes the whole conversation reads them as a new turn",
            "remove them from the observations",
        )


# -- the same session again ------------------------------------------------------------------------------


def difference(tokenizer: Any, a: Run, b: Run) -> str:
    """Return how two sessions of a seed differ; "" if they are equal."""
    for k, (one, two) in enumerate(zip(a.calls, b.calls, strict=False), 1):
        if one.prompt != two.prompt:
            return f"turn {k}: {shown_difference(tokenizer, one.prompt, two.prompt)[1]}"
    endings = [f"{run.episode.ending} after {len(run.calls)} turns" for run in (a, b)]
    if endings[0] != endings[1]:
        return f"it ended as {endings[0]}, and now as {endings[1]}"
    turns = [[call.reward for call in run.calls] for run in (a, b)]
    if turns[0] != turns[1] or a.episode.reward != b.episode.reward:
        return (
            f"the reward was {a.episode.reward} (turns: {turns[0]}), and now is {b.episode.reward} (turns: "
            f"{turns[1]})"
        )
    return ""


@dataclass
class Repeater:
    """Play a session alone in two processes, in one that has served others, and beside another one.
    first, runner: two runners that load the environment each for itself."""

    player: Player
    first: WatchedRunner
    runner: WatchedRunner
    tokenizer: Any
    report: Report

    async def check(self, policies: Sequence[Policy], row: Prompt, other: Prompt, seed: int) -> None:
        """Compare sessions of `row` with each policy. other: the row of the sessions before and beside."""
        self.runner.states = True
        alone = [
            (policy, await self._play(policy, row, seed, self.first), await self._play(policy, row, seed))
            for policy in policies
        ]
        if not self._check_equal([(first, again) for _, first, again in alone]):
            self.report.line("leaks", "not checked: the environment is not deterministic", checked=False)
            return
        after = beside = True  # one example of each is enough
        for policy, _, again in alone:
            after = after and await self._check_after(policy, again, policies[-1], other)
            beside = beside and await self._check_beside(policy, again, other)
        leaks = [] if after else ["from the sessions before it in its process"]
        leaks += [] if beside else ["from sessions at the same time"]
        text = " and ".join(leaks) or "none, in one process and side by side"
        self.report.line("leaks", text, checked=True, good=after and beside)

    async def _play(
        self, policy: Policy, prompt: Prompt, seed: int, runner: WatchedRunner | None = None
    ) -> Run:
        runner = runner or self.runner
        (run,) = await self.player.play(runner, policy, prompt, f"again-{len(runner.runs)}", 1, seed)
        return run

    def _check_equal(self, alone: Sequence[tuple[Run, Run]]) -> bool:
        unequal = [(first, d) for first, again in alone if (d := difference(self.tokenizer, first, again))]
        text = f"{len(alone) - len(unequal)} of {len(alone)} sessions are repeated exactly"
        self.report.line("determinism", text, repeated=len(alone), equal=len(alone) - len(unequal))
        if unequal:
            self.report.problem(
                "determinism",
                f"the same row, seed and replies in another process ({where(unequal[0][0])}): "
                f"{unequal[0][1]}",
                "draw from `random`, NumPy or session.seed, which are seeded; not from the clock, uuid, the "
                "order of a set, or files of earlier sessions",
            )
        return not unequal

    async def _check_after(self, policy: Policy, alone: Run, other: Policy, prompt: Prompt) -> bool:
        """Play the session in a process that has served others."""
        self.runner.reuse = True
        for k in range(BEFORE):
            await self._play(other, prompt, alone.seed + 1 + k)
        self.runner.reuse = False
        after = await self._play(policy, alone.prompt, alone.seed)
        changed = sorted(n for n, v in after.state.items() if alone.state.get(n, v) != v)
        changed += sorted(n for n in after.state if n not in alone.state)
        names = (
            f"it finds another value of {', '.join(changed[:5])}"
            if changed
            else "no variable is known for it"
        )
        change = difference(self.tokenizer, alone, after)
        if change:
            self.report.problem(
                "leaks",
                f"a session depends on those before it in its process ({where(alone)}, after row "
                f"{prompt.id + 1}): {change}; {names}",
                "set everything on `self` in `reset` (or `__init__`), not on the class or the module",
            )
        elif changed:
            self.report.note("leaks", f"after another session {names}, without effect on prompts and rewards")
        return not change

    async def _check_beside(self, policy: Policy, alone: Run, prompt: Prompt) -> bool:
        """Play the session while another one runs in a process apart; their turns alternate."""
        pair = TakingTurns(policy)

        async def play(prompt: Prompt, seed: int) -> Run:
            name = f"beside-{len(self.runner.runs)}-{seed}"
            try:
                (run,) = await self.player.play(self.runner, pair, prompt, name, 1, seed)
            finally:
                await pair.leave(f"{name}-0")
            return run

        other = await self._play(policy, prompt, alone.seed + 1)
        pairs = zip(
            (alone, other),
            await asyncio.gather(play(alone.prompt, alone.seed), play(prompt, other.seed)),
            strict=True,
        )
        change = next((d for one, beside in pairs if (d := difference(self.tokenizer, one, beside))), "")
        if change:
            self.report.problem(
                "leaks",
                f"sessions that run at the same time share something outside of their processes "
                f"({where(alone)}): {change}",
                "give each session a separate file, table or port, such as a folder of tempfile",
            )
        return not change


class TakingTurns:
    """Two sessions of a policy, whose model calls alternate."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name, self.longest = policy, policy.name, policy.longest
        self.counts: dict[str, int] = {}
        self.changed = asyncio.Condition()

    def begin(self, session: str, prompt: Prompt, tools: Tools) -> None:
        self.counts[session] = 0
        self.policy.begin(session, prompt, tools)

    def notice(self, session: str, tools: Tools) -> None:
        self.policy.notice(session, tools)

    async def generate(self, request: Request) -> list[Generated]:
        name = request.session
        async with self.changed:
            await self.changed.wait_for(lambda: self.counts[name] <= min(self.counts.values()))
            self.counts[name] += 1
            self.changed.notify_all()
        return await self.policy.generate(request)

    async def leave(self, session: str) -> None:
        """Let the other session go on alone."""
        async with self.changed:
            self.counts.pop(session, None)
            self.changed.notify_all()


# -- rewards ---------------------------------------------------------------------------------------------


def check_rewards(
    runs: Sequence[Run], stated: tuple[float, float] | None, solved: bool, report: Report
) -> None:
    """Report the range of the rewards. stated: the range that they should have. solved: whether the replies
    of the policy `scripted` were given as good ones, which the reward should distinguish from random ones."""
    played = [run for run in runs if not run.failed]
    values = [run.reward for run in played if run.reward is not None]
    for name, same in per(
        (r for r in played if r.failed_rewards), lambda r: str([*r.failed_rewards])
    ).items():
        detail = user_part(next(iter(same[0].failed_rewards.values())))
        report.problem("reward", f"{name} failed in {len(same)} sessions: {indented(detail)}", "correct it")
    missing = [run for run in played if run.reward is None and not run.failed_rewards]
    if missing:
        report.problem(
            "reward",
            f"{len(missing)} of {len(played)} sessions have no reward ({where(missing[0])}): their samples "
            "leave the batch",
            "return a number, or name rewards in the config",
        )
    if not values:
        report.line("reward", "none")
        return
    low, high = min(values), max(values)
    parts = {
        policy: statistics.fmean([r.reward for r in same if r.reward is not None] or [0.0])
        for policy, same in per(played, lambda r: r.policy).items()
    }
    means = ", ".join(f"{policy} {mean:.3g}" for policy, mean in parts.items())
    report.line("reward", f"{low:g} to {high:g}; mean: {means}", low=low, high=high, means=parts)
    if stated is not None and (low < stated[0] or high > stated[1]):
        worst = next(r for r in played if r.reward is not None and not stated[0] <= r.reward <= stated[1])
        report.problem(
            "reward",
            f"{worst.reward:g} ({where(worst)}, {len(worst.calls)} turns) is outside of the stated range "
            f"{stated[0]:g} to {stated[1]:g}",
            "correct the reward, or the range",
        )
    if low == high and len(values) > 1:
        what = f"all {len(values)} sessions have the reward {low:g}, which leaves no learning signal"
        if solved:
            report.problem("reward", what, "reward the given replies more than random ones")
        else:
            report.note(
                "reward", what, "give replies that solve a row by --replies, and see whether they pay"
            )


# -- tokens, time and memory -----------------------------------------------------------------------------


def check_tokens(
    runs: Sequence[Run], limit: int, max_turns: int, positions: int | None, report: Report
) -> None:
    """Report tokens and turns of sessions against the limits. positions: of the model."""
    contexts, turns = [run.context for run in runs], [len(run.calls) for run in runs]
    mean = statistics.fmean(contexts)
    text = (
        f"context {min(contexts)} to {max(contexts)} of {limit} tokens (mean {mean:.0f}), "
        f"{min(turns)} to {max(turns)} of {max_turns} turns"
    )
    report.line("tokens", text, least=min(contexts), most=max(contexts), mean=mean, limit=limit)
    if positions is not None and limit > positions:
        report.problem(
            "tokens",
            f"environment.max_episode_tokens: {limit}, but the model has {positions} positions",
            f"set environment.max_episode_tokens: {positions}",
        )
    for policy, same in per(runs, lambda r: r.policy).items():
        full = [run for run in same if run.episode.ending is Ending.context_full]
        if not full:
            continue
        what = (
            f"{len(full)} of {len(same)} sessions of policy {policy} ran out of context (row "
            f"{full[0].prompt.id + 1}, after {len(full[0].calls)} of {max_turns} turns)"
        )
        instead = f"raise environment.max_episode_tokens: {limit}, or return shorter observations"
        (report.problem if policy == "scripted" else report.note)("tokens", what, instead)


def check_branches(runs: Sequence[Run], owns_loop: bool, tokenizer: Any, report: Report) -> None:
    """Report sessions whose prompts do not extend the turns before, though the template would."""
    branched = [(run, shown) for run in runs if (shown := first_branch(run.calls, tokenizer))]
    if branched:
        run, shown = branched[0]
        reason = "the environment edits the history, or asks several times" if owns_loop else shown
        what = f"{len(branched)} of {len(runs)} sessions branched ({where(run)}): {reason}; {COST}"
        report.note("template", what)
    share = len(branched) / max(1, len(runs))
    report.line("branches", f"{len(branched)} of {len(runs)} sessions branched", share=share)


def report_costs(runs: Sequence[Run], step_timeout_s: float, report: Report) -> None:
    """Report time and memory of a session."""
    setup = [r.start_s + sum(o.seconds for o in r.operations if o.name == "reset") for r in runs]
    steps = [o.seconds for r in runs for o in r.operations if o.name in ("call", "step")]
    steps += [o.seconds / max(1, len(r.calls)) for r in runs for o in r.operations if o.name == "run"]
    ends = [run.end_s for run in runs]
    parts = {"set-up": setup, "step": steps, "teardown": ends}
    figures = {k: {"mean": statistics.fmean(v), "most": max(v)} for k, v in parts.items() if v}
    text = ", ".join(f"{k} {_ms(f['mean'])} (most {_ms(f['most'])})" for k, f in figures.items())
    report.line("time", text, **figures)
    memory = [run.memory for run in runs if run.memory]
    if memory:
        text = f"{statistics.fmean(memory) / 2**20:.1f} MiB a session (most {max(memory) / 2**20:.1f})"
        report.line("memory", text, mean=statistics.fmean(memory), most=max(memory))
    if steps and max(steps) > step_timeout_s / 2:
        what = f"a step took {max(steps):.1f} s, and environment.step_timeout_s is {step_timeout_s:g}"
        report.note("faults", what, "a busy machine is slower: raise it")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
