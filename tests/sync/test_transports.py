"""The contract of every transport, on real groups and files. Between GPUs: with gloo in NCCL's place, and
vLLM's own engines at the receiving end (see nccl_on_cpu.py and vllm_ends.py)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from rft.config.sync import SyncConfig
from rft.errors import BrokenWeights, EngineError, TransferError
from rft.rollout.pool import Member, RolloutPool
from rft.sync.gloo import Receiver, load_into
from rft.sync.publisher import SENDERS, Publisher, Sender
from rft.sync.spec import ChannelSpec, Link
from rft.utils.dotted import load_dotted
from tests.specs import engine_spec
from tests.sync.wires import (
    HOST,
    NCCL,
    TRANSPORTS,
    Wire,
    channel,
    forty_shapes,
    free_port,
    nudge,
    same_bits,
    together,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("transport", (*TRANSPORTS, *NCCL), indirect=True)
def test_forty_shapes_arrive_bit_for_bit(transport: str, dtype: str, tmp_path: Path) -> None:
    """Five versions, with signed zeros, infinities and NaN among the changes, on two receivers. (In vLLM's
    sparse format NaN stands for what stays; the learner sends none over any transport.)"""
    wire = Wire(channel(transport, tmp_path, dtype, full_every=4))
    weights = forty_shapes()
    for version in range(5):
        received, sent = wire.push(weights)
        assert sent.bytes > 0 and sent.tensors == 40
        for got in received:
            assert same_bits(got, weights, getattr(torch, dtype)), (transport, version)
        nudge(weights, version)
        odd = weights["layer.36.weight"]
        last = -torch.inf if transport == "sparse_nccl" else torch.nan
        odd[:4] = torch.tensor([0.0, -0.0, torch.inf, last]).roll(version)


def test_every_transport_has_a_sender() -> None:
    named = set(get_args(SyncConfig.model_fields["transport"].annotation)) - {"auto"}
    assert set(SENDERS) == {*named, "sparse_nccl"}
    assert all(issubclass(load_dotted(path), Sender) for path in SENDERS.values())


@pytest.mark.parametrize("transport", (*TRANSPORTS, *NCCL), indirect=True)
def test_an_engine_that_joins_late_gets_everything(transport: str, tmp_path: Path) -> None:
    wire = Wire(channel(transport, tmp_path), size=1)
    weights = forty_shapes()
    wire.push(weights)
    nudge(weights, 1)
    wire.push(weights)
    wire.connect(size=3)  # two more, and the first one anew
    nudge(weights, 2)
    received, _ = wire.push(weights)
    assert len(received) == 3
    assert all(same_bits(got, weights, torch.bfloat16) for got in received)
    nudge(weights, 3)
    assert all(same_bits(got, weights, torch.bfloat16) for got in wire.push(weights)[0])


@pytest.mark.parametrize("transport", ["sparse", "sparse over files"])
def test_sparse_sends_what_changed_and_everything_every_nth_time(transport: str, tmp_path: Path) -> None:
    wire = Wire(channel(transport, tmp_path, full_every=3), size=1)
    weights = forty_shapes()
    whole = 2 * sum(t.numel() for t in weights.values())
    sizes = []
    for version in range(7):
        sizes.append(wire.push(weights)[1].bytes)
        nudge(weights, version, share=0.01)
    assert [size == whole for size in sizes] == [True, False, False] * 2 + [True]
    assert all(size < 0.1 * whole for size in sizes if size != whole)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    wire.push(weights)
    received, sent = wire.push(before)  # nothing changed: nothing but the announcement travels
    assert sent.bytes == 0 and same_bits(received[0], weights, torch.bfloat16)


@pytest.mark.parametrize("transport", ["sparse", "sparse over files"])
def test_an_update_for_another_state_is_refused(transport: str, tmp_path: Path) -> None:
    """An engine that missed a version cannot be brought to a wrong mixture of two."""
    wire = Wire(channel(transport, tmp_path), size=1)
    weights = forty_shapes()
    wire.push(weights)
    wire.receivers[0].sparse.state = "the state before"
    nudge(weights, 1)
    with pytest.raises(TransferError, match="needs a full update first"):
        list(wire.receivers[0].receive(wire.announce(weights)))


@pytest.mark.parametrize("transport", ["sparse over files", "file"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_flipped_bit_is_found(transport: str, version: int, tmp_path: Path) -> None:
    wire = Wire(channel(transport, tmp_path), size=1)
    weights = forty_shapes()
    for _ in range(version - 1):
        wire.push(weights)
        nudge(weights, 1)
    update = wire.announce(weights)
    path = Path(update["path"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TransferError, match="checksum"):
        list(wire.receivers[0].receive(update))


def test_files_appear_whole_and_are_cleared(tmp_path: Path) -> None:
    """What a killed writer left is removed; two versions stay at most; none after the end."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "version-00000009-aa.unfinished").write_bytes(b"half")
    (folder / "version-00000008-aa.safetensors").write_bytes(b"an earlier run's")
    wire = Wire(channel("file", folder), size=1)
    assert list(folder.iterdir()) == []
    weights = forty_shapes()
    for _ in range(3):
        wire.push(weights)
    assert len(list(folder.iterdir())) == 2
    wire.publisher.close()
    assert list(folder.iterdir()) == []


def test_a_file_that_a_node_cannot_see_is_named(tmp_path: Path) -> None:
    wire = Wire(channel("file", tmp_path), size=1)
    update = {**wire.announce(forty_shapes()), "path": str(tmp_path / "elsewhere.safetensors")}
    with pytest.raises(TransferError, match=r"elsewhere.safetensors cannot be read on .*sync.folder"):
        list(wire.receivers[0].receive(update))


def test_a_tensor_that_the_engine_lacks_is_named() -> None:
    model = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(TransferError, match=r"bias: received shape \(2,\), the engine has none"):
        load_into(model, iter([("bias", torch.zeros(2))]))
    with pytest.raises(TransferError, match=r"weight: received shape \(3, 3\), the engine has \(2, 3\)"):
        load_into(model, iter([("weight", torch.zeros(3, 3))]))


@pytest.mark.parametrize("transport", ["gloo", "sparse", *NCCL], indirect=True)
def test_nobody_waits_past_the_deadline(transport: str, tmp_path: Path) -> None:
    """A sender whose receivers never come, and a receiver whose sender never sends."""
    begin = time.monotonic()
    publisher = Publisher(channel(transport, tmp_path))
    with pytest.raises(RuntimeError):  # torch's DistStoreError and gloo's errors are RuntimeErrors
        publisher.open(Link(HOST, free_port(), 0, 2, 1.5))
    wire = Wire(channel(transport, tmp_path), size=1, timeout_s=1.5)
    update = wire.announce(forty_shapes())
    with pytest.raises(RuntimeError):
        list(wire.receivers[0].receive(update))
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("transport", ["gloo", "nccl"], indirect=True)
def test_weights_that_were_not_announced_are_not_sent(transport: str, tmp_path: Path) -> None:
    """An engine cuts what arrives by what was announced: anything else would be garbage there."""
    wire = Wire(channel(transport, tmp_path), size=1)
    weights = forty_shapes()
    wire.announce(weights)
    with pytest.raises(ValueError, match=r"expected \('layer.0.weight', .*, received \('layer.1.weight'"):
        wire.publisher.send(list(weights.items())[1:])


RECEIVER = """
import os, sys
from rft.sync import gloo
from rft.sync.spec import Link
gloo.BUCKET_BYTES = 4096
receiver = gloo.Receiver(Link("127.0.0.1", int(sys.argv[1]), 1, 2, 60))
names, taken = [f"w{i}" for i in range(8)], int(sys.argv[2])
update = {"names": names, "dtype_names": ["bfloat16"] * 8, "shapes": [[512, 512]] * 8}
for name, _ in receiver.receive(update) if taken else ():
    if name == names[taken]:
        break
os._exit(9)
"""

SENDER = """
import os, sys, torch
from rft.sync import gloo
from rft.sync.spec import ChannelSpec, Link, manifest_of
gloo.BUCKET_BYTES = 4096
sender = gloo.GlooSender(ChannelSpec("gloo", "float32"), Link("127.0.0.1", int(sys.argv[1]), 0, 2, 60))
weights = [(f"w{i}", torch.ones(1024)) for i in range(8)]
sender.announce(1, manifest_of(weights), ())
def some():
    yield from weights[:3]
    os._exit(9)
sender.send(some())
"""


WRITER = """
import os, sys, torch
from pathlib import Path
from rft.sync import files
os.fsync = lambda file: os._exit(9)
files.write(Path(sys.argv[1]) / "version-00000001-aa.safetensors", {"w": torch.ones(1024)}, 1)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("transport", ["gloo", "sparse"])
def test_a_receiver_killed_half_way_fails_the_push(
    transport: str, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first byte, and after three tensors of eight."""
    monkeypatch.setattr("rft.sync.gloo.BUCKET_BYTES", 4096)
    port = free_port()
    other = start(RECEIVER, port, taken)
    publisher = Publisher(channel(transport, tmp_path))
    publisher.open(Link(HOST, port, 0, 2, 60))
    assert taken or other.wait(60) == 9
    weights = {f"w{i}": torch.ones(512, 512) for i in range(8)}
    named = weights.items() if publisher.reads_at_announce else ()
    manifest = [(name, "float32", (512, 512)) for name in weights]
    publisher.announce(1, manifest, named)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        publisher.send(() if publisher.reads_at_announce else weights.items())
    assert time.monotonic() - begin < 30 and other.wait(10) == 9


def test_a_sender_killed_half_way_fails_the_receiver() -> None:
    port = free_port()
    other = start(SENDER, port)
    receiver = Receiver(Link(HOST, port, 1, 2, 60))
    update = {
        "names": [f"w{i}" for i in range(8)],
        "dtype_names": ["float32"] * 8,
        "shapes": [[1024]] * 8,
    }
    got = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("rft.sync.gloo.BUCKET_BYTES", 4096)
        for name, _ in receiver.receive(update):
            got.append(name)
    assert other.wait(60) == 9
    assert got == ["w0", "w1", "w2"]  # half of it came, and the receiver did not take it for the whole


def test_a_writer_killed_half_way_leaves_nothing_to_take(tmp_path: Path) -> None:
    assert start(WRITER, tmp_path).wait(60) == 9
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"]
    wire = Wire(channel("file", tmp_path), size=1)
    weights = forty_shapes()
    assert same_bits(wire.push(weights)[0][0], weights, torch.bfloat16)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_an_adapter_arrives_bit_for_bit_with_its_config() -> None:
    """In the precision that it is trained in, with a config that is plain data, whatever peft's holds."""
    wire = Wire(ChannelSpec("adapter", "bfloat16"))
    tensors = {name: tensor for name, tensor in forty_shapes().items() if tensor.ndim == 2}
    for version in (1, 2):
        update = wire.publisher.announce_adapter(version, tensors, {"r": 8, "target_modules": {"v", "q"}})
        assert update["version"] == version and update["adapter"] == {"r": 8, "target_modules": ["q", "v"]}
        sent, *received = together(
            lambda: wire.publisher.send(()),
            *(lambda r=r, u=update: dict(r.receive(u)) for r in wire.receivers),
        )
        assert sent.bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert len(received) == 2 and all(same_bits(got, tensors, torch.float32) for got in received)
        nudge(tensors, version)
    tensors["layer.36.weight"] = torch.full((3, 3), torch.inf)
    with pytest.raises(BrokenWeights, match="adapter of version 3 is not finite, first layer"):
        wire.publisher.announce_adapter(3, tensors, {})


def test_a_replica_that_holds_another_version_fails_the_push(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RolloutPool(engine_spec(Path(), replicas=2))
    pool.members = {index: Member(None, index, received=True) for index in (0, 1)}

    async def reported(index: int, method: Any, *args: Any, **kwargs: Any) -> int:
        return 3 - index

    monkeypatch.setattr(pool, "_ask", reported)
    with pytest.raises(EngineError, match="rollout replica 1 reports version 2 after a push of 3"):
        asyncio.run(pool.finish_update(3))
    assert [pool.members[index].serving for index in (0, 1)] == [True, False]
