"""Sparse updates: lossless, never larger than the whole, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rft.config.sync import Measure, SyncConfig
from rft.contrib.sparse_sync.delta import WHOLE, Delta, apply_delta, make_delta
from rft.errors import TransferError
from rft.sync.changes import ChangeMeter, change_metrics
from rft.sync.files import digest
from rft.sync.publisher import Publisher
from rft.sync.spec import ChannelSpec, Link, manifest_of


def test_a_delta_names_exactly_the_elements_whose_bits_changed() -> None:
    known = {
        "a": torch.tensor([0.0, 1.0, 2.0, float("nan"), 4.0, 5.0]),
        "b": torch.ones(8),
        "c": torch.ones(9),
    }
    new = {name: tensor.clone() for name, tensor in known.items()}
    new["a"][0] = -0.0  # equal as a number, not as bits; NaN stays NaN and is no change
    new["a"][4] = 7.0
    new["c"][3] = 1.5
    engine = {name: tensor.clone() for name, tensor in known.items()}
    delta, changes = make_delta(known, new.items())
    assert changes == {"a": 2, "b": 0, "c": 1}
    assert delta.counts == {"a": 2, "c": 1}
    assert delta.indices.tolist() == [0, 4, 3] and delta.indices.dtype == torch.int32
    assert delta.values.tolist() == [0.0, 7.0, 1.5]
    apply_delta(engine, delta)
    for name in new:
        assert digest("", [engine[name]]) == digest("", [new[name]]) == digest("", [known[name]])


def test_where_most_changed_the_whole_tensor_travels() -> None:
    """A float32 element costs 4 bytes, a changed one 8 with its index: half is the break-even point."""
    known = {"half": torch.zeros(10), "more": torch.zeros(10)}
    new = {"half": torch.zeros(10), "more": torch.zeros(10)}
    new["half"][:4], new["more"][:5] = 1.0, 1.0
    delta, _ = make_delta(known, new.items())
    assert delta.counts == {"half": 4, "more": WHOLE}
    assert delta.values.numel() == 14


def test_a_delta_that_does_not_fit_changes_nothing() -> None:
    known = {"a": torch.zeros(4)}
    index = torch.tensor([1], dtype=torch.int32)
    with pytest.raises(TransferError, match=r"no full update contained: \['b'\]"):
        apply_delta(known, Delta({"a": 1, "b": 1}, index, torch.ones(1)))
    with pytest.raises(TransferError, match="announces 2 indices and 2 values, but 1 and 2 arrived"):
        apply_delta(known, Delta({"a": 2}, index, torch.ones(2)))
    assert known["a"].eq(0).all()


def test_digests_depend_on_order_base_and_every_bit() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    found = {digest("", [a, b]), digest("", [b, a]), digest("x", [a, b]), digest("", [a, -b])}
    assert len(found) == 4
    assert digest("", [a.bfloat16(), b]) == digest("", [a.bfloat16().clone(), b])


def test_changes_are_counted_in_bfloat16() -> None:
    """A step of a thousandth is lost on a weight of 1 in bfloat16, and not on one of 0.001."""
    meter = ChangeMeter()
    weights = {"big": torch.ones(100), "small": torch.full((300,), 0.001)}
    for name, tensor in weights.items():
        meter.observe(name, tensor)
    assert meter.take() == ({}, {})
    for name, tensor in weights.items():
        meter.observe(name, tensor + 0.001)
    counted = meter.take()
    assert counted == ({"big": 0, "small": 300}, {"big": 100, "small": 300})
    assert change_metrics(*counted, "matrices") == {
        "sync/changed_share": 0.75,
        "sync/changed_share_min": 0.0,
        "sync/changed_share_max": 1.0,
        "sync/changed/big": 0.0,
        "sync/changed/small": 1.0,
    }
    assert set(change_metrics(*counted, "overall")) == {
        "sync/changed_share",
        "sync/changed_share_min",
        "sync/changed_share_max",
    }
    assert change_metrics(*counted, "off") == {}


@pytest.mark.parametrize("measure", ["off", "overall"])
def test_by_default_no_push_copies_the_weights_to_measure_them(tmp_path: Path, measure: Measure) -> None:
    """What it costs is measured only where it is asked for."""
    assert SyncConfig().measure_changes == "off"
    publisher = Publisher(ChannelSpec("file", "float32", str(tmp_path), SyncConfig(measure_changes=measure)))
    publisher.open(Link("", 0, 0, 1, 5))
    weights = {"a": torch.ones(3)}
    for version in (0, 1):
        publisher.announce(version, manifest_of(weights.items()), weights.items())
        sent = publisher.send(())
        weights = {"a": torch.tensor([1.0, 2.0, 1.0])}
    publisher.close()
    assert (publisher.meter is None) == (measure == "off")
    assert bool(sent.metrics) == (measure == "overall")
