"""Outputs collected in vLLM's engine: over vLLM's own types, with the scheduling below stood in for by a
script of outputs. tests/integration/test_sync.py has the whole engine."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists

from rft.contrib import vllm_scheduler
from rft.contrib.vllm_scheduler import MOST_HELD, CollectedOutputs


class Scripted:
    """What the mixin uses of a scheduler; steps come from outside."""

    def __init__(self, **params: dict[str, Any]) -> None:
        self.requests = {
            name: SimpleNamespace(sampling_params=SamplingParams(**p)) for name, p in params.items()
        }
        self.pause_state = PauseState.UNPAUSED
        self.cut_off: list[Any] = []

    def update_from_output(self, step: dict[int, EngineCoreOutputs]) -> dict[int, EngineCoreOutputs]:
        for outputs in step.values():
            for output in outputs.outputs:
                if output.finished:
                    del self.requests[output.request_id]
        return step

    def finish_requests(self, request_ids: Iterable[str] | None, status: str) -> None:
        self.cut_off.append((request_ids, status))

    def has_finished_requests(self) -> bool:
        return False


class Collecting(CollectedOutputs, Scripted):  # type: ignore[misc]
    """The mixin on a script."""


ONCE = {"output_kind": RequestOutputKind.FINAL_ONLY}


def output(name: str, *tokens: int, **more: Any) -> EngineCoreOutput:
    """A step's output; a token's log-prob is a tenth of it below zero."""
    ids = np.array(tokens)[:, None]
    lists = LogprobsLists(ids, -ids / 10, ids[:, 0])
    return EngineCoreOutput(name, list(tokens), new_logprobs=lists, **more)


def step(scheduler: Collecting, *outputs: EngineCoreOutput, client: int = 0) -> list[EngineCoreOutput]:
    """What is sent after a step with these outputs."""
    sent = scheduler.update_from_output({client: EngineCoreOutputs(outputs=list(outputs))})
    assert set(sent) <= {client}
    return sent[client].outputs if sent else []


def contents(sent: list[EngineCoreOutput]) -> dict[str, tuple[list[int], list[float]]]:
    return {o.request_id: (o.new_token_ids, o.new_logprobs.logprobs[:, 0].tolist()) for o in sent}


def test_tokens_are_sent_when_their_request_is_finished() -> None:
    scheduler = Collecting(a=ONCE, b=ONCE)
    assert (
        scheduler.update_from_output({0: EngineCoreOutputs(outputs=[output("a", 1), output("b", 5)])}) == {}
    )
    assert step(scheduler, output("a", 2, 3), output("b", 6)) == []
    sent = step(scheduler, output("a", 4, finish_reason=FinishReason.STOP, stop_reason=4), output("b", 7))
    assert contents(sent) == {"a": ([1, 2, 3, 4], [-0.1, -0.2, -0.3, -0.4])}
    assert sent[0].finish_reason is FinishReason.STOP and sent[0].stop_reason == 4
    (rest,) = step(scheduler, output("b", 8, finish_reason=FinishReason.LENGTH))
    assert rest.new_token_ids == [5, 6, 7, 8] and rest.new_logprobs.logprob_token_ids.shape == (4, 1)
    assert rest.new_logprobs.sampled_token_ranks.tolist() == [5, 6, 7, 8]


def test_what_the_first_step_says_of_the_prompt_arrives() -> None:
    scheduler = Collecting(a=ONCE)
    stats = SimpleNamespace(num_cached_tokens=128)
    assert step(scheduler, output("a", 1, prefill_stats=stats)) == []
    (sent,) = step(scheduler, output("a", 2, finish_reason=FinishReason.LENGTH))
    assert sent.prefill_stats is stats and sent.new_token_ids == [1, 2]


def test_a_long_completion_is_sent_in_pieces() -> None:
    scheduler, tokens = Collecting(a=ONCE), list(range(1, 151))
    pieces = [piece for t in tokens for piece in step(scheduler, output("a", t))]
    assert [len(piece.new_token_ids) for piece in pieces] == [MOST_HELD, MOST_HELD]
    pieces += step(scheduler, output("a", 151, finish_reason=FinishReason.LENGTH))
    assert [t for piece in pieces for t in piece.new_token_ids] == [*tokens, 151]


@pytest.mark.parametrize(
    "params", [{}, {"output_kind": RequestOutputKind.DELTA}, {**ONCE, "stop": ["\n"], "detokenize": True}]
)
def test_who_reads_on_the_way_gets_every_token(params: dict[str, Any]) -> None:
    """Stop strings are found by the reader: it has to see the tokens."""
    scheduler = Collecting(a=params, b=ONCE)
    assert contents(step(scheduler, output("a", 1), output("b", 9))) == {"a": ([1], [-0.1])}


def test_an_output_that_is_more_than_tokens_takes_along_what_was_held() -> None:
    scheduler = Collecting(a=ONCE)
    step(scheduler, output("a", 1))
    (sent,) = step(scheduler, output("a", 2, kv_transfer_params={"at": 1}))
    assert sent.new_token_ids == [1, 2] and sent.kv_transfer_params == {"at": 1}


@pytest.mark.parametrize("paused", [PauseState.PAUSED_ALL, PauseState.PAUSED_NEW])
def test_a_pause_is_complete_only_when_nothing_is_held(paused: PauseState) -> None:
    """vLLM labels what is sent with the weights' version: after a pause it may be another one."""
    scheduler = Collecting(a=ONCE, b=ONCE)
    step(scheduler, output("a", 1), output("b", 5), client=3)
    assert not scheduler.has_finished_requests()
    scheduler.pause_state = paused
    assert scheduler.has_finished_requests()  # vLLM steps on
    sent = scheduler.update_from_output({})
    assert list(sent) == [3] and {n: t for n, (t, _) in contents(sent[3].outputs).items()} == {
        "a": [1],
        "b": [5],
    }
    assert not scheduler.has_finished_requests()
    scheduler.pause_state = PauseState.UNPAUSED
    assert step(scheduler, output("a", 2)) == []
    (rest,) = step(scheduler, output("a", 3, finish_reason=FinishReason.STOP))
    assert rest.new_token_ids == [2, 3]


@pytest.mark.parametrize("ids", ["a", ["a"], {"a"}, None])
def test_what_is_cut_off_leaves_nothing_behind(ids: Any) -> None:
    scheduler = Collecting(a=ONCE, b=ONCE)
    step(scheduler, output("a", 1), output("b", 5))
    scheduler.finish_requests(ids, "aborted")
    cut = {"a", "b"} if ids is None else {"a"}
    assert scheduler.cut_off == [(None if ids is None else ["a"], "aborted")]
    scheduler.pause_state = PauseState.PAUSED_ALL
    sent = scheduler.update_from_output({})
    assert {o.request_id for outputs in sent.values() for o in outputs.outputs} == {"a", "b"} - cut


def test_messages_that_are_none_of_ours_pass() -> None:
    scheduler = Collecting(a=ONCE)
    sent = scheduler.update_from_output({1: EngineCoreOutputs(finished_requests={"z"})})
    assert sent[1].finished_requests == {"z"}


@pytest.mark.parametrize(("asynchronous", "base"), [(False, Scheduler), (True, AsyncScheduler)])
def test_the_scheduler_below_is_the_one_that_vllm_would_take(
    asynchronous: bool, base: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}
    monkeypatch.setattr(Scheduler, "__init__", lambda self, **kwargs: given.update(kwargs))
    for name in ("_Synchronous", "_Asynchronous"):
        monkeypatch.setattr(getattr(vllm_scheduler, name), "__init__", Scheduler.__init__)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=asynchronous))
    made = vllm_scheduler.collecting_scheduler(config, log_stats=False)
    assert isinstance(made, base) and isinstance(made, AsyncScheduler) == asynchronous
    assert given == {"vllm_config": config, "log_stats": False}
