"""PPO's parts that need a model: values past a cut-off, and an entropy with a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.algorithms.math.policy_gradient import gae
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.load import load_config
from rft.learner.learner import Learner
from rft.learner.objective import LogpGap
from tests.test_learner import Watched, spec


def test_defaults_are_those_of_the_example() -> None:
    assert load_config("examples/online/ppo.yaml").algorithm == ALGORITHMS["ppo"]()
    algorithm = ALGORITHMS["ppo"]()
    assert (algorithm.critic, algorithm.critic_rate, algorithm.critic_warmup) == ("model", 75.0, 10)
    assert (algorithm.lam, algorithm.value_clip) == (1.0, None)


def test_advantages_of_a_completion_that_was_cut_off() -> None:
    """Two tokens, reward 1, values 0.5 and 0.6, gamma 0.5; the state after the cut is worth 0.8.

    delta_1 = 1 + 0.5 * 0.8 - 0.6 = 0.8; delta_0 = 0.5 * 0.6 - 0.5 = -0.2, and with lam 0.5 the advantage is
    -0.2 + 0.25 * 0.8 = 0. Where the completion had ended, delta_1 = 0.4 and the first is -0.1.
    """
    group = Group(Prompt(0, (1, 2), ""), (Completion((10, 11), finish="length", reward=1.0),))
    batch = Batch.build([group])
    rewards, values = torch.tensor([0, 0, 0, 1.0]), torch.tensor([0, 0, 0.5, 0.6])
    found = gae(rewards, values, batch, 0.5, 0.5, torch.tensor([0, 0, 0, 0.8]))
    torch.testing.assert_close(found, torch.tensor([0, 0, 0.0, 0.8]))
    torch.testing.assert_close(gae(rewards, values, batch, 0.5, 0.5), torch.tensor([0, 0, -0.1, 0.4]))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("critic", ["head", "model"])
def test_the_value_after_a_cut_off_is_the_critics(critic, share, tiny_folder, make_groups) -> None:
    """It is what the critic says before one more token, had there been one; 0 where a completion ended."""
    groups = make_groups(groups=2, size=3)
    cut = [
        replace(
            g,
            completions=tuple(
                replace(c, finish="length" if i else "stop") for i, c in enumerate(g.completions)
            ),
        )
        for g in groups
    ]
    longer = [
        replace(g, completions=tuple(replace(c, tokens=(*c.tokens, 5), logps=None) for c in g.completions))
        for g in cut
    ]
    learner = Learner(spec(tiny_folder, settings=ALGORITHMS["ppo"](critic=critic)))
    torch.nn.init.normal_(learner.policy.value_head.head.weight)
    batch, more = Batch.build(cut, share_prefix=share), Batch.build(longer, share_prefix=share)
    prepared = learner.prepare(learner.at_step(batch, 0), LogpGap())
    after = learner.score(more, outputs=frozenset({"values"}))["values"]
    for n in range(batch.num_sequences):
        last = int((batch.mask & (batch.sequence == n)).nonzero()[-1])
        beyond = int((more.mask & (more.sequence == n)).nonzero()[-1])
        expected = after[beyond] if batch.truncated[n] else torch.tensor(0.0)
        torch.testing.assert_close(prepared.end_values[last], expected, rtol=1e-4, atol=1e-5)
    assert int((prepared.end_values != 0).sum()) == 4
    without = Learner(spec(tiny_folder, settings=ALGORITHMS["ppo"](critic=critic, bootstrap_truncated=False)))
    assert without.prepare(without.at_step(batch, 0), LogpGap()).end_values is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [("grpo", {}), ("ppo", {"critic_warmup": 0}), ("ppo", {"critic": "head", "critic_warmup": 0})],
)
def test_the_entropy_coefficient_has_the_gradient_of_the_entropy(
    name: str, settings: dict[str, Any], tiny_folder, make_groups
) -> None:
    """Against the entropy of plain softmax distributions, differentiated by torch."""
    batch = Batch.build(make_groups(groups=2, size=2))
    grads = []
    for coefficient in (0.0, 0.5):
        algorithm = ALGORITHMS[name](entropy_coef=coefficient, **settings)
        learner = Watched(spec(tiny_folder, settings=algorithm, config={"tokens_per_micro_batch": 20}))
        learner.step(batch, 0)
        names = [name for name, _ in learner.policy.model.named_parameters()]
        grads.append(dict(zip(names, learner.seen[0], strict=False)))  # the critic's come after
    plain = Learner(spec(tiny_folder))
    total = torch.zeros(())
    for tree in range(batch.num_sequences):
        one = batch.select([tree])
        logits = plain.policy.model(one.tokens[None]).logits[0].float()
        logps = torch.log_softmax(logits[one.source[one.mask]], -1)
        total = total - (logps.exp() * logps).sum()
    (-0.5 * total / batch.mask.sum()).backward()
    for key, parameter in plain.policy.model.named_parameters():
        added = grads[1][key] - grads[0][key]
        torch.testing.assert_close(added, parameter.grad, rtol=1e-3, atol=2e-5)
