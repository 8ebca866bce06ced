"""Every offline algorithm through the real learner, with a tiny model: it trains, and towards its goal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.algorithms import ALGORITHMS, Algorithm, PolicyOutput
from rft.algorithms.extras import arrange
from rft.algorithms.math.sequences import token_index
from rft.batch import Batch
from rft.config.data import DataConfig
from rft.data import load_groups
from rft.learner.learner import Learner
from rft.learner.load import load_tokenizer
from rft.tasks.tiny import build_tiny
from tests.specs import changed, learner_spec

SUMS = [(a, b) for a in (3, 5, 8) for b in (2, 4)]
ROWS = [
    {
        "prompt": f"{a}+{b}=",
        "completion": str(a + b),
        "chosen": f"{a + b}",
        "rejected": f"{a + b + 10}",
        "label": a != 5,
        "weight": 1.0 if a == 3 else 0.1,
        "reward": 1.0 if a == 3 else 0.5,
    }
    for a, b in SUMS
]
SETTINGS = {
    # Four steps are few: at its usual weight ORPO's likelihood term still outweighs its preference term.
    "orpo": {"beta": 5.0},
    # The teacher is the policy's start: only the likelihood term moves it.
    "logit_distill": {"alpha": 0.5},
}
TRAINABLE = [n for n, c in ALGORITHMS.items() if not c.online and "scores" not in c().outputs]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, hidden_size=32)
    return folder


def make(tiny: Path, algorithm: Algorithm, learning_rate: float = 3e-3, tokens: int = 4096) -> Learner:
    config = {"learning_rate": learning_rate, "tokens_per_micro_batch": tokens}
    spec = learner_spec(tiny, algorithm, **config)
    return Learner(changed(spec, steps=4, max_completion_length=16))


def batch_for(tiny: Path, tmp_path: Path, algorithm: Algorithm, *, share_prefix: bool = True) -> Batch:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    config = DataConfig(path=str(file), numbers=("weight", "reward"), chat_template="never")
    groups = load_groups(config, load_tokenizer(str(tiny)), algorithm.data)  # type: ignore[arg-type]
    return Batch.build(arrange(algorithm, groups.groups), share_prefix=share_prefix)


def sequence_logps(learner: Learner, batch: Batch) -> torch.Tensor:
    return batch.sum_by_sequence(learner.score(batch)["logps"])


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_moves_the_policy_where_it_should(tiny: Path, tmp_path: Path, name: str) -> None:
    algorithm = ALGORITHMS[name](**SETTINGS.get(name, {}))
    learner = make(tiny, algorithm)
    batch = batch_for(tiny, tmp_path, algorithm)
    before = sequence_logps(learner, batch)
    steps = [learner.step(batch, step) for step in range(4)]
    assert all(torch.isfinite(torch.tensor(list(s.values()))).all() for s in steps)
    change = sequence_logps(learner, batch) - before
    assert batch.rewards is not None
    own = torch.ones(len(change), dtype=torch.bool)
    if "mismatched" in batch.columns:
        own = batch.columns["mismatched"] == 0
    good, bad = change[own & (batch.rewards > 0.5)], change[own & (batch.rewards < 0.5)]
    if len(bad):
        assert good.mean() > bad.mean()
    else:
        assert good.mean() > 0


@pytest.mark.parametrize("name", ["asft", "dpo", "kto"])
def test_micro_batches_and_shared_prompts_give_the_same_step(tiny: Path, tmp_path: Path, name: str) -> None:
    algorithm = ALGORITHMS[name]()
    found = []
    for tokens, share in ((4096, False), (4096, True), (24, True), (24, False)):
        learner = make(tiny, algorithm, tokens=tokens)
        metrics = learner.step(batch_for(tiny, tmp_path, algorithm, share_prefix=share), 0)
        found.append((metrics["train/loss"], metrics["train/grad_norm"]))
    for loss, norm in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)
        assert norm == pytest.approx(found[0][1], rel=1e-3)


def test_the_divergence_is_that_of_whole_distributions(tiny: Path, tmp_path: Path) -> None:
    """Against probabilities of the Hugging Face model itself, one sequence at a time."""
    algorithm = ALGORITHMS["asft"]()
    learner = make(tiny, algorithm)
    batch = batch_for(tiny, tmp_path, algorithm)
    assert learner.reference is not None
    learner.step(batch, 0)
    out = learner.policy.run(batch, frozenset({"kl"}), algorithm=algorithm, reference=learner.reference)
    single = batch.select([0])
    with torch.no_grad():
        new, old = (
            m.model(single.tokens[None]).logits[0].log_softmax(-1)
            for m in (learner.policy, learner.reference)
        )
    expected = (new.exp() * (new - old)).sum(-1)[single.source[single.mask]]
    assert out.kl is not None and expected.max() > 1e-4
    first = (batch.tree[batch.segment] == 0) & batch.mask
    torch.testing.assert_close(out.kl[first], expected, rtol=1e-3, atol=1e-6)


def test_embeddings_are_changed_in_training_only(tiny: Path, tmp_path: Path) -> None:
    algorithm = ALGORITHMS["neft"](alpha=50.0)
    learner = make(tiny, algorithm)
    batch = batch_for(tiny, tmp_path, algorithm)

    def run(**more: Any) -> PolicyOutput:
        return learner.policy.run(batch, **more)

    plain = run().logps
    assert not torch.equal(run(algorithm=algorithm).logps, plain)
    assert torch.equal(run().logps, plain)
    assert torch.equal(run(algorithm=ALGORITHMS["neft"](alpha=0.0)).logps, plain)


def test_ift_reads_the_mean_embedding_under_its_own_prediction(tiny: Path, tmp_path: Path) -> None:
    """With lam near 1, what follows the first response token does not see which token it was, only what the
    policy expected there."""
    algorithm = ALGORITHMS["ift"](lam=0.99999)
    learner = make(tiny, algorithm)
    batch = batch_for(tiny, tmp_path, algorithm, share_prefix=False)
    first = batch.mask & ~torch.roll(batch.mask, 1)
    other = batch.with_(tokens=torch.where(first, batch.tokens.flip(0), batch.tokens))
    later = token_index(batch) == 1  # predicted right after the first

    @torch.no_grad()
    def shift(**more: Any) -> float:
        gap = learner.policy.run(batch, **more).logps - learner.policy.run(other, **more).logps
        return float(gap[later].abs().max())

    assert shift(algorithm=algorithm) < 0.02 * shift()
