"""`nccl` and `sparse_nccl` where something goes wrong: NCCL waits for ever, and no end of rft may. Also what
vLLM does with ranks and communicators. nccl_on_cpu.py says what is stood in for."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from rft.errors import TransferError
from rft.sync.publisher import Publisher
from rft.sync.spec import Link, manifest_of
from rft.utils.deadlines import Overdue
from tests.sync.wires import HOST, NCCL, Wire, channel, forty_shapes, free_port, nudge, same_bits, together

pytestmark = pytest.mark.parametrize("transport", NCCL, indirect=True)

DEADLINE_S = 2.0


@pytest.fixture(scope="module")
def elsewhere() -> Any:
    """Processes of their own, copied from one that has read vLLM already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sync.vllm_ends", "tests.sync.nccl_on_cpu"])
    return context


@pytest.fixture
def start(elsewhere: Any, transport: str) -> Iterator[Callable[..., tuple[Any, Connection]]]:
    """`start(function, port, *more)` runs function(pipe, transport, port, *more) elsewhere."""
    started = []

    def run(function: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
        ours, theirs = elsewhere.Pipe()
        process = elsewhere.Process(target=function, args=(theirs, transport, *arguments), daemon=True)
        process.start()
        started.append(process)
        return process, ours

    yield run
    for process in started:
        process.kill()
        process.join()


def set_up() -> None:
    """What the fixture `transport` does, in a process that is not to live long."""
    from rft.contrib.sparse_sync import sparse_nccl
    from rft.sync import nccl
    from tests.sync import nccl_on_cpu

    nccl_on_cpu.install()
    nccl.PACKED_BYTES, sparse_nccl.PART_BYTES = 20_000, 40_000


def dies_receiving(pipe: Connection, transport: str, port: int, loads: int) -> None:
    """An engine that ends where it would load for the `loads`-th time (0: where it has joined)."""
    set_up()
    from tests.sync.vllm_ends import VllmEnd

    end = VllmEnd(channel(transport, None), Link(HOST, port, 1, 2, 60), forty_shapes())
    load, count = end.models[0].load_weights, 0

    def load_or_die(weights: Any) -> set[str]:
        nonlocal count
        count += 1
        if count == loads:
            os._exit(9)
        return load(weights)

    end.models[0].load_weights = load_or_die  # type: ignore[method-assign]
    if loads:
        list(end.receive(pipe.recv()))
    os._exit(9)


def dies_sending(pipe: Connection, transport: str, port: int, broadcasts: int) -> None:
    """A learner that ends before its `broadcasts`-th broadcast."""
    set_up()
    weights = forty_shapes()
    publisher = Publisher(channel(transport, None))
    publisher.open(Link(HOST, port, 0, 2, 60))
    group = publisher.sender.group  # type: ignore[union-attr]
    broadcast, count = group.broadcast, 0

    def broadcast_or_die(tensor: torch.Tensor, src: int = 0) -> None:
        nonlocal count
        count += 1
        if count == broadcasts:
            os._exit(9)
        broadcast(tensor, src)

    group.broadcast = broadcast_or_die
    pipe.send(
        publisher.announce(
            1, manifest_of(weights.items()), weights.items() if publisher.reads_at_announce else ()
        )
    )
    publisher.send(() if publisher.reads_at_announce else weights.items())


@pytest.mark.parametrize("loads", [0, 3])
def test_a_receiver_killed_half_way_fails_the_push_in_time(
    transport: str, loads: int, start: Callable[..., Any]
) -> None:
    """Before the first byte, and with the third part. The next group gets everything."""
    weights, port = forty_shapes(), free_port()
    other, pipe = start(dies_receiving, port, loads)
    publisher = Publisher(channel(transport, None))
    publisher.open(Link(HOST, port, 0, 2, 30))
    publisher.sender.group.timeout_s = DEADLINE_S  # type: ignore[union-attr]
    update = publisher.announce(
        1, manifest_of(weights.items()), weights.items() if publisher.reads_at_announce else ()
    )
    if loads:
        pipe.send(json.loads(json.dumps(update)))
    else:
        other.join(30)
    begin = time.monotonic()
    with pytest.raises(TransferError, match="did not join a weight sync within 2 s"):
        publisher.send(() if publisher.reads_at_announce else weights.items())
    assert DEADLINE_S - 0.1 < time.monotonic() - begin < DEADLINE_S + 8
    other.join(10)
    assert other.exitcode == 9
    wire = Wire(publisher.spec, size=1, publisher=publisher)
    assert same_bits(wire.push(weights)[0][0], weights, torch.bfloat16)


@pytest.mark.parametrize("broadcasts", [1, 4])
def test_a_sender_killed_half_way_fails_the_receiver_in_time(
    transport: str, broadcasts: int, start: Callable[..., Any]
) -> None:
    """Before its first broadcast and before its fourth: the engine does not take a part for the whole."""
    from tests.sync.vllm_ends import VllmEnd

    port, spec = free_port(), channel(transport, None)
    other, pipe = start(dies_sending, port, broadcasts)
    end = VllmEnd(spec, Link(HOST, port, 1, 2, 30), forty_shapes())
    update = pipe.recv()
    config = end.engine.spec.config.model_copy(update={"control_timeout_s": DEADLINE_S})
    end.engine.spec = replace(end.engine.spec, config=config)
    begin = time.monotonic()
    with pytest.raises(Overdue, match="vLLM update_weights did not finish within 2 s"):
        list(end.receive(update))
    assert time.monotonic() - begin < DEADLINE_S + 8
    other.join(30)
    assert other.exitcode == 9
    assert end.version == ""


def test_a_group_that_forms_too_late_is_given_back(transport: str) -> None:
    from tests.sync.nccl_on_cpu import GlooForNccl
    from tests.sync.vllm_ends import VllmEnd

    port = free_port()
    publisher = Publisher(channel(transport, None))
    with pytest.raises(TransferError, match=rf"did not join NCCL's group at {HOST}:{port} within 0.5 s"):
        publisher.open(Link(HOST, port, 0, 2, 0.5))
    VllmEnd(publisher.spec, Link(HOST, port, 1, 2, 30), {})
    until = time.monotonic() + 10
    while len(GlooForNccl.live) > 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert [communicator.rank for communicator in GlooForNccl.live.values()] == [1]


def test_every_worker_has_a_rank_of_its_own(transport: str) -> None:
    """An engine of two workers and one of one, behind the learner: ranks 1, 2 and 3."""
    from tests.sync.nccl_on_cpu import GlooForNccl
    from tests.sync.vllm_ends import VllmEnd

    weights, spec, port = forty_shapes(), channel(transport, None), free_port()
    publisher = Publisher(spec)
    links = [Link(HOST, port, rank, 4, 30) for rank in (0, 1, 3)]
    _, pair, single = together(
        lambda: publisher.open(links[0]),
        lambda: VllmEnd(spec, links[1], weights, ranks=2),
        lambda: VllmEnd(spec, links[2], weights),
    )
    assert sorted(communicator.rank for communicator in GlooForNccl.live.values()) == [0, 1, 2, 3]
    for version in (1, 2):
        early = weights.items() if publisher.reads_at_announce else ()
        update = publisher.announce(version, manifest_of(weights.items()), early)
        together(
            lambda: publisher.send(() if publisher.reads_at_announce else weights.items()),
            *(lambda end=end, update=update: list(end.receive(update)) for end in (pair, single)),
        )
        for model in (*pair.models, *single.models):
            assert same_bits(dict(model.state_dict()), weights, torch.bfloat16)
        nudge(weights, version)


def test_no_communicator_outlives_its_group(transport: str) -> None:
    """An engine that joins a new group has left the one before: each holds memory on its GPU."""
    from tests.sync.nccl_on_cpu import GlooForNccl

    wire = Wire(channel(transport, None), size=1)
    for size in (1, 2, 2):
        wire.connect(size)
        assert sorted(c.rank for c in GlooForNccl.live.values()) == list(range(1 + size))
    wire.publisher.close()
    assert sorted(c.rank for c in GlooForNccl.live.values()) == [1, 2]


def test_a_communicator_that_vllm_switched_off_is_an_error(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would send nothing, and say nothing of it."""
    monkeypatch.setenv("VLLM_DISABLE_PYNCCL", "1")
    with pytest.raises(TransferError, match="switched its NCCL communicator off"):
        Wire(channel(transport, None), size=1)
