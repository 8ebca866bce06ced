"""Differentially private training: clipping by rows, noise, draws and epsilon."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.algorithms.extras import compares_rows
from rft.batch import Batch
from rft.cli import main
from rft.config.learner import PrivacyConfig
from rft.contrib.privacy import ORDERS, PoissonSampler, PrivateLearner, epsilon, renyi_divergence
from rft.learner.learner import Learner
from tests.test_bad_input import run
from tests.test_learner import Watched, spec


class WatchedPrivate(PrivateLearner, Watched):
    """A private learner that keeps each update's gradient."""


def private(model: Path, algorithm: str, **privacy: float) -> WatchedPrivate:
    """A learner whose batches have four rows on average."""
    config = {"privacy": PrivacyConfig(**privacy)}
    return WatchedPrivate(spec(model, algorithm, config=config, batch_size=4))


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_each_row_is_clipped_alone(tiny_folder: Path, make_groups, algorithm: str) -> None:
    """The gradient is sum(g_i min(1, C / |g_i|)) / B over the rows' own gradients g_i, of the mean over the
    row's units; B is the expected number of rows."""
    groups = make_groups(groups=3, size=2)
    alone = []
    for group in groups:
        learner = Watched(spec(tiny_folder, algorithm))
        learner.step(Batch.build([group]), 0)
        alone.append(learner.seen[0])
    norms = [math.sqrt(sum(float(g.square().sum()) for g in gradient)) for gradient in alone]
    clip = sorted(norms)[1]  # one row is below it, one at it, and one above it
    learner = private(tiny_folder, algorithm, clip=clip, noise=1e-9)
    learner.step(Batch.build(groups), 0)
    assert max(norms) > 1.01 * clip, "no row was clipped: nothing was tested"
    for i, mine in enumerate(learner.seen[0]):
        expected = sum(g[i] * min(1.0, clip / n) for g, n in zip(alone, norms, strict=True)) / 4
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


def test_noise_has_the_stated_size(tiny_folder: Path, make_groups) -> None:
    """Its standard deviation is noise x clip / B = 2 x 0.5 / 4, far above that of the clipped gradients."""
    learner = private(tiny_folder, "sft", clip=0.5, noise=2.0)
    learner.step(Batch.build(make_groups(groups=2, size=1)), 0)
    noise = torch.cat([g.reshape(-1) for g in learner.seen[0]])
    assert float(noise.std()) == pytest.approx(0.25, rel=5 / math.sqrt(2 * len(noise)) + 1e-3)


def test_a_private_run_resumes(tiny_folder: Path, make_groups, tmp_path: Path) -> None:
    one = private(tiny_folder, "sft", clip=0.5, noise=1.0)
    one.step(Batch.build(make_groups(seed=1)), 0)
    one.capture_state()(tmp_path)
    two = private(tiny_folder, "sft", clip=0.5, noise=1.0)
    two.read_state(tmp_path)
    weights = []
    for learner in (one, two):
        learner.read_state(tmp_path)  # the noise is from torch's generator, which the two share here
        learner.step(Batch.build(make_groups(seed=2)), 1)
        weights.append(dict(Learner.weights(learner)))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_rows_are_drawn_independently_and_draws_resume() -> None:
    sampler = PoissonSampler(1000, 7, PrivacyConfig())
    draws = [sampler.next(50) for _ in range(200)]
    sizes = torch.tensor([float(len(rows)) for rows in draws])
    # a binomial of mean 50 and standard deviation sqrt(1000 x 0.05 x 0.95) = 6.9
    assert abs(float(sizes.mean()) - 50) < 5 * 6.9 / math.sqrt(200) and 5.5 < float(sizes.std()) < 8.3
    assert all(rows == sorted(set(rows)) for rows in draws) and sampler.seen == sizes.sum()
    half = PoissonSampler(1000, 7, PrivacyConfig())
    for _ in range(100):
        half.next(50)
    resumed = PoissonSampler(1000, 7, PrivacyConfig())
    resumed.load_state_dict(half.state_dict())
    assert [resumed.next(50) for _ in range(100)] == draws[100:]
    assert resumed.metrics() == sampler.metrics()


def test_epsilon() -> None:
    # All rows at each step: a divergence of order / (2 noise^2). For three steps, noise 2 and delta 1e-6
    # the bound 3 a / 8 + log(1 - 1/a) - log(1e-6 a) / (a - 1) is smallest at a = 7: 2.625 - 0.154 + 1.978.
    divergences = [3 * renyi_divergence(1.0, 2.0, a) for a in ORDERS]
    assert divergences[:2] == pytest.approx([0.75, 1.125])
    assert epsilon(divergences, 1e-6) == pytest.approx(4.449, abs=0.001)
    # Order 2 by hand: log(1 + q^2 (e^(1 / noise^2) - 1)).
    assert renyi_divergence(0.1, 1.0, 2) == pytest.approx(math.log(1 + 0.01 * (math.e - 1)))
    # opacus 1.6's RDPAccountant: 1.7118 for rate 0.01, noise 1.1, 1000 steps; its orders include fractions.
    spent = epsilon([1000 * renyi_divergence(0.01, 1.1, a) for a in ORDERS], 1e-5)
    assert 1.7118 <= spent < 1.7118 * 1.01


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.privacy={}"], "use an offline algorithm, such as sft or dpo"),
        (["learner.privacy={}", "algorithm=token_cleaning"], "the loss of a row depends on other rows"),
        (["learner.privacy={}", "algorithm=sft", "learner.strategy={name: saft}"], "saft is initialised"),
        (["learner.privacy={}", "algorithm=sft"], "write train.batch_size: 32 or more"),
        (["algorithm=mft"], "mft balances the sources of data.mixture"),
    ],
)
def test_what_is_not_private_is_refused(tmp_path: Path, capsys, overrides: list[str], words: str) -> None:
    assert main(run(tmp_path, *overrides)) == 2
    assert words in capsys.readouterr().err


def test_losses_that_compare_rows_are_known() -> None:
    compare = {name for name, a in ALGORITHMS.items() if not a.online and compares_rows(a())}
    assert compare == {"token_cleaning", "ss_token", "forgetting", "kto", "bco", "mft", "q_tuning"}
    assert compares_rows(ALGORITHMS["dpo"](loss_type="aot"))
