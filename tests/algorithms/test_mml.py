"""MML: its gradient is that of -log sum p(y | x); duplicates, verified prefixes and saved solutions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from worlds import chosen, completion, fill, group, spread

from rft.algorithms import ALGORITHMS, PolicyOutput
from rft.batch import Batch, Completion, Group
from rft.contrib.saved_solutions import SavedSolutions

NAN = math.nan
LOGPS = {10: -1.0, 11: -2.0, 12: -0.5, 13: -2.0, 14: -0.3}


def at_logps(batch: Batch) -> Batch:
    return fill(batch, {"old_logps": LOGPS})


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_gradient_is_that_of_the_marginal_likelihood(beta: float) -> None:
    """Two prompts; the second solution of the first prompt comes twice, and a wrong one is left out."""
    groups = [
        group(
            0,
            completion((10, 11), 1.0),
            completion((12,), 1.0),
            completion((12,), 1.0),
            completion((14,), 0.0),
        ),
        group(1, completion((13,), 1.0)),
    ]
    algorithm = ALGORITHMS["mml"](beta=beta)
    batch = algorithm.prepare(at_logps(Batch.build(groups)))
    logps = spread(batch, LOGPS, torch.float64).requires_grad_()
    algorithm.loss(PolicyOutput(logps), batch).sum().backward()
    assert logps.grad is not None
    table = torch.tensor([LOGPS[t] for t in (10, 11, 12, 13)], dtype=torch.float64, requires_grad=True)
    first = torch.logsumexp(beta * torch.stack([table[0] + table[1], table[2]]), 0)
    loss = -(first + beta * table[3]) / beta
    loss.backward()
    torch.testing.assert_close(chosen(logps.grad, batch), table.grad, rtol=1e-6, atol=1e-9)
    assert batch.tokens[batch.mask].tolist() == [10, 11, 12, 13]
    assert algorithm.report(batch) == {"solutions/trained": 1.5}


def test_a_verified_prefix_joins_the_solutions() -> None:
    """A wrong completion of three steps: continuations from its first boundary were right, from its second
    wrong. With the prefix (12,), log p = -0.5, and the solution (10, 11), log p = -3."""

    def steps(*ends: float, values: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
        return {"step_ends": ends, "step_values": values}

    right = completion((10, 11), 1.0, values=steps(1.0, 2.0, values=(NAN, 0.0)))
    wrong = completion((12, 13, 14), 0.0, values=steps(1.0, 2.0, 3.0, values=(NAN, 0.25, 0.0)))
    hopeless = completion((13, 14), 0.0, values=steps(1.0, 2.0, values=(NAN, 0.0)))
    algorithm = ALGORITHMS["mml_partial"]()
    assert algorithm.steps.branches == 4 and algorithm.keep_group([0.0, 0.0])
    batch = algorithm.prepare(at_logps(Batch.build([group(0, right, wrong, hopeless)])))
    assert batch.tokens[batch.mask].tolist() == [10, 11, 12]
    share = math.exp(-0.5) / (math.exp(-0.5) + math.exp(-3))
    expected = torch.tensor([1 - share, 1 - share, share])
    torch.testing.assert_close(chosen(batch.advantages, batch), expected)


def test_solutions_are_saved_and_come_again() -> None:
    hooks = SavedSolutions(2, 0.0)

    def of(*completions: Completion) -> list[Group]:
        return [group(7, *completions)]

    first = of(completion((10,), 1.0, logps=(-1.0,)), completion((14,), 0.0, logps=(-1.0,)))
    assert hooks.select(first) == first
    (second,) = hooks.select(of(completion((11,), 1.0, logps=(-1.0,)), completion((14,), 0.0, logps=(-1.0,))))
    assert [c.tokens for c in second.completions] == [(11,), (14,), (10,)]
    again = SavedSolutions(2, 0.0)
    again.load_state_dict(json.loads(json.dumps(hooks.state_dict())), {})
    assert again.solutions == hooks.solutions
    # The same solution is not taken twice; of three, the two newest stay.
    (third,) = hooks.select(of(completion((10,), 1.0, logps=(-1.0,)), completion((12,), 1.0, logps=(-1.0,))))
    assert [c.tokens for c in third.completions] == [(10,), (12,), (11,)]
    assert [c.tokens for c in hooks.solutions[7]] == [(10,), (12,)]
    hooks.step_failed()
    assert hooks.solutions == again.solutions
