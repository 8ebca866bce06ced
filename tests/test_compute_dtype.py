"""Under bfloat16 autocast every head reads bfloat16: hidden states and weights in the compute dtype, results
in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rft.algorithms import ALGORITHMS
from rft.algorithms.base import Algorithm, PolicyOutput
from rft.batch import Batch, Group
from rft.config.learner import KernelsConfig
from rft.learner import distribution
from rft.learner import model as policy_model
from rft.learner.distribution import next_logps
from rft.learner.learner import Learner
from rft.learner.model import Critic, Head, PolicyModel
from tests.kernels.architectures import build
from tests.test_learner import spec

pytestmark = pytest.mark.numerics

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
BF16 = torch.bfloat16
# Three layers and the head: a dozen roundings of 2^-9 to what a token's logit is made of.
TOLERANCE = 12 * torch.finfo(BF16).eps / 2


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.dtype]]:
    """The dtypes of the tensors that each head was called with."""
    calls: dict[str, list[torch.dtype]] = {}

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            calls.setdefault(name, []).extend(a.dtype for a in given)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(policy_model, "token_logps")
    watch(distribution, "head_divergence")
    watch(distribution, "wide_product")
    watch(Critic, "forward")
    return calls


def policy(name: str, dtype: torch.dtype, critic: Callable[[Any], Critic] | None = None) -> PolicyModel:
    model = build(name)
    head = None if critic is None else critic(model)
    if head is not None:
        torch.nn.init.normal_(head.head.weight, generator=torch.Generator().manual_seed(3))
    return PolicyModel(model, temperature=0.9, compute_dtype=dtype, value_head=head)


def batch_of(groups: list[Group]) -> Batch:
    batch = Batch.build(groups, share_prefix=True)
    return batch.with_(tokens=batch.tokens % 96)


def close(low: Tensor, exact: Tensor) -> None:
    scale = float(exact.detach().abs().max())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0, atol=TOLERANCE * max(scale, 1.0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_entropy_and_scoring(name: str, make_groups: Any, seen: Any) -> None:
    batch = batch_of(make_groups())
    low, exact = policy(name, BF16), policy(name, torch.float32)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            out = low.run(batch, frozenset({"entropy"}))
    assert seen["token_logps"] == [BF16] * 4, "hidden states and weight, twice"
    assert low.states(batch, batch.mask.nonzero()[:, 0]).dtype == BF16  # a reference is read through this
    wanted = exact.run(batch, frozenset({"entropy"}))
    assert out.entropy is not None and wanted.entropy is not None
    close(out.logps, wanted.logps)
    close(out.entropy, wanted.entropy)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_reaches_the_float32_weights(name: str, make_groups: Any) -> None:
    batch = batch_of(make_groups())
    grads = []
    for dtype in (BF16, torch.float32):
        model = policy(name, dtype)
        (model.run(batch).logps * batch.mask).sum().backward()
        grads.append({n: p.grad for n, p in model.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(g.dtype == torch.float32 for g in grads[0].values())
    whole = [torch.cat([g.flatten() for g in by_name.values()]) for by_name in grads]
    assert float((whole[0] - whole[1]).norm() / whole[1].norm()) < 2 * TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("fused", [True, False])
def test_divergences(name: str, fused: bool, make_groups: Any, seen: Any, monkeypatch: Any) -> None:
    if not fused:
        monkeypatch.setattr(distribution, "_fuses", lambda *_: False)
    algorithm: Algorithm = ALGORITHMS["distill"](beta=0.3)
    batch = batch_of(make_groups())
    found = []
    for dtype in (BF16, torch.float32):
        other = policy(name, dtype)
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model = policy(name, dtype)
        out: PolicyOutput = model.run(batch, frozenset({"kl"}), algorithm=algorithm, reference=other)
        assert out.kl is not None
        found.append(out.kl)
        if dtype == BF16:
            used = seen["head_divergence" if fused else "wide_product"]
            assert used and set(used) == {BF16}
    close(*found)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("own_trunk", [False, True])
def test_the_critic(name: str, own_trunk: bool, make_groups: Any, seen: Any) -> None:
    batch = batch_of(make_groups())

    def critic(model: Any) -> Critic:
        return Critic(model.config.hidden_size, build(name) if own_trunk else None)

    found = []
    for dtype in (BF16, torch.float32):
        seen.clear()
        out = policy(name, dtype, critic).run(batch, frozenset({"values"}))
        assert set(seen["forward"]) == {dtype}
        assert out.values is not None
        found.append(out.values)
    close(*found)


def test_a_forced_attention_kernel_reaches_the_critic() -> None:
    trunk = build("qwen3")
    Critic(32, trunk, KernelsConfig(attention="masked").attention)
    assert trunk.model._rft_attention_route.kernel == "masked"


@pytest.mark.parametrize("biased", [False, True])
def test_logits_of_16_bits_are_not_rounded(biased: bool) -> None:
    """Products of bfloat16 whose sums need more than 8 bits, and a float32 bias beside them."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 64).to(BF16), torch.randn(40, 64).to(BF16)
    bias = torch.randn(40) if biased else None
    lora = (torch.randn(2, 64), torch.randn(40, 2), 0.5)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            found = next_logps(Head(weight, bias, None, 1.0, lora), hidden, 1.0)
        z = hidden.double() @ weight.double().t()
        z += 0.5 * (hidden.double() @ lora[0].double().t()) @ lora[1].double().t()
        z = z if bias is None else z + bias.double()
        torch.testing.assert_close(found.double(), z.log_softmax(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["dpo", "sft", "asft", "ppo"])
def test_a_step_and_held_out_data(tiny_folder: Path, make_groups: Any, seen: Any, algorithm: str) -> None:
    """Training, old log-probs, the reference, held-out data: whatever the learner calls a head with."""
    learner = Learner(spec(tiny_folder, algorithm, config={"dtype": "bfloat16"}))
    pair = learner.algorithm.unit == "pair"
    batch = Batch.build(make_groups(size=2 if pair else 4))
    learner.step(batch, 0)
    learner.evaluate(batch, 1)
    assert set(seen.pop("token_logps")) == {BF16}
    assert all(set(dtypes) == {BF16} for dtypes in seen.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reward_models(name: str, make_groups: Any) -> None:
    batch = batch_of(make_groups())
    found = []
    for dtype in (BF16, torch.float32):
        config = build(name).config
        config.num_labels = 1
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(config)
        one = PolicyModel(model, temperature=1.0, compute_dtype=dtype)
        rows = batch.mask.nonzero()[:, 0]
        assert one.states(batch, rows).dtype == dtype
        out = one.run(batch)
        assert out.scores is not None
        found.append(out.scores)
    close(*found)
