"""Forest attention: the merge against explicit masks, and hidden states under everything that training
adds: micro-batches, shared prefixes, LoRA, gradient checkpointing, autocast, and generation between."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import rft.kernels.attention_merge as merge
from rft.batch import Batch, Completion, Group, Prompt
from rft.kernels.attention import (
    OUTLIERS,
    ROUTE,
    _sample,
    hidden_states,
    prepare_model,
    relative_error,
    self_check,
)
from rft.kernels.attention_function import Layout, forest_attention
from rft.kernels.attention_masked import masked_attention
from rft.kernels.attention_merge import merged_attention
from rft.kernels.attention_route import AttentionRoute, decoder_of
from rft.kernels.forest import Forest
from rft.packing import micro_batches

sys.path.insert(0, str(Path(__file__).parent))
from architectures import build
from attention_helpers import assert_same_gradients, forest_batch, gradients, packed_logps, separate_logps

pytestmark = pytest.mark.numerics


def forest_of(lengths: list[int], parents: list[int]) -> Forest:
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    start = [0] * len(lengths)
    for s, p in enumerate(parents):
        start[s] = start[p] + lengths[p] if p >= 0 else 0
    positions = torch.cat([torch.arange(a, a + n) for a, n in zip(start, lengths, strict=True)])
    return Forest(segment, torch.tensor(parents), positions)


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    parents, root = [-1], 0
    for s in range(1, len(lengths)):
        parents.append(draw(st.sampled_from([-1, *range(root, s)])))
        root = s if parents[-1] == -1 else root
    return forest_of(lengths, parents)


def qkv(tokens: int, heads: int = 4, shared: int = 2, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes: list[tuple[int, ...]] = [
        (tokens, heads, width),
        (tokens, shared, width),
        (tokens, shared, width),
        (heads,),
    ]
    return [torch.randn(s, generator=generator, requires_grad=True) for s in sizes]


def agree(forest: Forest, sinks: bool, limit: float = 2e-5) -> None:
    """Merge and masks give the same output and the same gradients."""
    q, k, v, s = qkv(forest.num_tokens)
    inputs = [q, k, v, s] if sinks else [q, k, v]
    sink = s if sinks else None
    actual = merged_attention(q, k, v, forest, 0.3, sink)
    expected = masked_attention(q, k, v, forest, 0.3, sinks=sink)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)
    pull = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad(x, inputs, pull) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=limit)


# -- the merge -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(forests(), st.booleans())
def test_merge_equals_masks_on_any_forest(forest: Forest, sinks: bool) -> None:
    agree(forest, sinks)


def test_masks_are_the_definition() -> None:
    """The masked route against a loop over tokens that follows the rule's words."""
    forest = forest_of([3, 2, 2, 4, 1], [-1, 0, 1, 0, -1])
    q, k, v, _ = (x.detach() for x in qkv(forest.num_tokens, heads=2))
    actual = masked_attention(q, k, v, forest, 0.5, window=4)
    for t in range(forest.num_tokens):
        line, s = [], int(forest.segment[t])
        while s >= 0:
            line.append(s)
            s = int(forest.parent[s])
        seen = [
            u
            for u in range(t + 1)
            if int(forest.segment[u]) in line and int(forest.positions[t]) - int(forest.positions[u]) < 4
        ]
        weights = (torch.einsum("hd,nhd->hn", q[t], k[seen]) * 0.5).softmax(-1)
        torch.testing.assert_close(actual[t], torch.einsum("hn,nhd->hd", weights, v[seen]))


def test_merge_gradcheck() -> None:
    forest = forest_of([3, 2, 2, 2], [-1, 0, 0, 1])
    inputs = [x.detach().double().requires_grad_() for x in qkv(forest.num_tokens)]
    assert torch.autograd.gradcheck(lambda q, k, v, s: merged_attention(q, k, v, forest, 0.3, s), inputs)


def test_merge_in_bfloat16_is_as_close_as_masks_are() -> None:
    forest = forest_of([40, 20, 30, 25], [-1, 0, 0, 2])
    q, k, v, _ = (x.detach() for x in qkv(forest.num_tokens))
    exact = merged_attention(q, k, v, forest, 0.3)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    merged, masked = merged_attention(q, k, v, forest, 0.3), masked_attention(q, k, v, forest, 0.3)
    assert merged.dtype == torch.bfloat16
    # Probabilities, values and the result are rounded once each, by at most the largest value's rounding.
    unit = 3 * torch.finfo(torch.bfloat16).eps / 2 * float(v.abs().max())
    assert float((merged - exact).abs().max()) <= max(1.5 * float((masked - exact).abs().max()), unit)


def test_equal_lengths_need_no_copies() -> None:
    """256 equal sequences are one block that is a view of the packed batch."""
    forest = forest_of([6] * 256, [-1] * 256)
    assert len(forest.blocks) == 1
    assert forest.blocks[0].queries.covers(forest.num_tokens)
    agree(forest, sinks=False)


def test_many_short_sequences_are_few_blocks() -> None:
    forest = forest_of([40 + i % 41 for i in range(256)], [-1] * 256)
    assert len(forest.blocks) <= 5
    padded = sum(b.queries.count * b.queries.width for b in forest.blocks)
    assert padded <= 1.25 * forest.num_tokens


def test_only_children_join_their_parent() -> None:
    """A chain of segments is one run of plain causal attention."""
    forest = forest_of([3, 4, 5], [-1, 0, 1])
    assert [(b.queries.width, b.causal) for b in forest.blocks] == [(12, True)]


def _emulated_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> tuple[Tensor, ...]:
    cu_q, cu_k, max_q, max_k, dropout, causal, debug = rest
    assert dropout == 0.0 and debug is False
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q[-1]) == q.shape[0] and int(cu_k[-1]) == k.shape[0]
    assert int(cu_q.diff().max()) == max_q and int(cu_k.diff().max()) == max_k
    outs, lses = [], []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1), torch.empty(0), torch.empty(0), torch.empty(0)


def _emulated_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
) -> tuple[Tensor, ...]:
    """Flash attention's backward in full: probabilities from the given log-sum-exp, not their own."""
    cu_q, cu_k, _, _, _, causal, *_ = rest
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = q.shape[1] // k.shape[1]
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        keys, values = (x[c:d].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        p = (scores - lse[:, a:b, None]).exp()
        delta = (grad[a:b] * out[a:b]).sum(-1).t()[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", grad[a:b], values) - delta) * scale
        dq[a:b] = torch.einsum("hqk,khd->qhd", ds, keys)
        dk[c:d] = torch.einsum("hqk,qhd->khd", ds, q[a:b]).unflatten(1, (-1, groups)).sum(2)
        dv[c:d] = torch.einsum("hqk,qhd->khd", p, grad[a:b]).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ([4, 6, 3], [-1, -1, -1]),
        ([5, 3, 4, 2, 6, 7, 7, 3], [-1, 0, 0, 2, 2, -1, 5, 5]),
        ([5, 4, 3, 2, 6, 3], [-1, 0, 0, 1, 2, 1]),  # children away from their parents
    ],
)
def test_variable_length_calls(
    lengths: list[int], parents: list[int], sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls made on CUDA, with their kernels written out here in plain torch."""
    ops = SimpleNamespace(
        _flash_attention_forward=_emulated_forward, _flash_attention_backward=_emulated_backward
    )
    monkeypatch.setattr(merge, "_aten", ops)
    monkeypatch.setattr(merge, "_parts", lambda f, device: [merge._CudaPart(s) for s in f.stretches])
    agree(forest_of(lengths, parents), sinks)


@pytest.mark.gpu
@pytest.mark.parametrize("sinks", [False, True])
def test_merge_equals_masks_on_cuda(sinks: bool) -> None:
    forest = forest_of([70, 30, 41, 22, 60, 17], [-1, 0, 0, 2, 2, -1])
    forest = Forest(forest.segment.cuda(), forest.parent.cuda(), forest.positions.cuda())
    q, k, v, s = (x.detach().cuda().bfloat16().requires_grad_() for x in qkv(forest.num_tokens, width=64))
    inputs, sink = ([q, k, v, s], s) if sinks else ([q, k, v], None)
    actual = merged_attention(q, k, v, forest, 0.125, sink)
    expected = masked_attention(q, k, v, forest, 0.125, sinks=sink)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)
    pull = torch.randn_like(actual)
    for a, b in zip(*(torch.autograd.grad(x, inputs, pull) for x in (actual, expected)), strict=True):
        assert float((a - b).float().norm() / b.float().norm()) < 2e-2


# -- hidden states under training ------------------------------------------------------------------


def groups() -> list[Group]:
    generator = torch.Generator().manual_seed(3)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 96, (n,), generator=generator).tolist())

    sizes = [(9, (5, 4)), (4, (7, 7, 3)), (12, (6,)), (3, (2, 5, 8, 1)), (7, (7, 2))]
    return [
        Group(Prompt(i, tokens(p), ""), tuple(Completion(tokens(r)) for r in rs))
        for i, (p, rs) in enumerate(sizes)
    ]


def loss_of(model: Any, batch: Batch) -> Tensor:
    """A loss that depends on what each token is, so that layouts of the same data are comparable."""
    values = packed_logps(model, batch)
    return (values * torch.cos(batch.tokens + batch.positions) * batch.mask).sum()


def parameter_gradients(model: Any, losses: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss", "stablelm", "jamba"])
def test_splitting_and_sharing_change_nothing(name: str) -> None:
    model = build(name)
    if name == "jamba":
        with pytest.warns(UserWarning, match="cannot run packed"):
            prepare_model(model)
    separate = Batch.build(groups())
    whole = loss_of(model, separate)
    reference = parameter_gradients(model, [whole])
    for share in (False, True):
        batch = Batch.build(groups(), share_prefix=share)
        for ranks in (1, 2):
            plan = [part for rank in micro_batches(batch, 40, ranks) for part in rank if part]
            assert len(plan) > 1
            losses = [loss_of(model, batch.select(trees)) for trees in plan]
            torch.testing.assert_close(sum(losses, torch.zeros(())), whole, rtol=1e-5, atol=1e-5)
            assert_same_gradients(parameter_gradients(model, losses), reference)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "stablelm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_and_checkpointing(name: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(name), config)
    untouched = copy.deepcopy(model).get_base_model()
    prepare_model(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    batch = forest_batch()
    first = packed_logps(model, batch)
    packed_logps(model, batch.select([1, 3]))  # another layout goes through before the first's backward
    expected = separate_logps(untouched, batch)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    actual = {n.removeprefix("base_model.model."): g for n, g in gradients(model, first).items()}
    reference = gradients(untouched, expected)
    assert set(actual) == set(reference) and all("lora" in n for n in actual)
    assert_same_gradients(actual, reference)


def test_autocast() -> None:
    model = build("qwen3")
    batch = forest_batch()
    exact = hidden_states(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = hidden_states(model, batch)
        assert self_check(model, batch) < 1e-4  # float32 weights are checked in float32
    assert float((low - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss"])
def test_a_prepared_model_still_generates_the_same(name: str) -> None:
    model = build(name)
    untouched = copy.deepcopy(model)
    prepare_model(model)
    tokens = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    tokens[0, :4] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(tokens, **arguments), untouched.generate(tokens, **arguments))


def test_copies_keep_their_route() -> None:
    model = build("qwen3")
    route = prepare_model(model)
    assert getattr(decoder_of(copy.deepcopy(model)), ROUTE) == route


# -- refusals --------------------------------------------------------------------------------------


def test_the_self_check_takes_the_longest_tree_and_a_few_short_ones() -> None:
    batch = forest_batch()
    few = _sample(batch, 0)
    assert torch.equal(few.tokens, batch.tokens[52:79])  # the deep tree, and the last one
    most = _sample(batch, 512)
    assert most.num_tokens == batch.num_tokens - 6  # of the group of three, two completions
    assert int(most.tree.max()) == int(batch.tree.max())


def test_in_half_precision_a_few_tokens_may_differ_by_more() -> None:
    expected = torch.ones(100, 8)
    actual = expected.clone()
    actual[:2] *= 1.2
    assert relative_error(actual, expected) == pytest.approx(0.2)
    assert relative_error(actual, expected, OUTLIERS) == 0.0
    actual[2] *= 1.1
    assert relative_error(actual, expected, OUTLIERS) == pytest.approx(0.1)


def test_self_check_stops_or_falls_back_on_a_wrong_route() -> None:
    model = build("mistral")
    prepare_model(model)
    wrong = AttentionRoute("mask")  # one plain mask: blind to the window
    decoder = decoder_of(model)
    setattr(decoder, ROUTE, wrong)
    batch = forest_batch()
    with pytest.raises(RuntimeError, match="differ from those of separate sequences"):
        self_check(model, batch)
    with pytest.warns(UserWarning, match="from now on, every sequence runs in a separate padded row"):
        self_check(model, batch, fall_back=True)
    assert getattr(decoder, ROUTE).kind == "sequences"
    torch.testing.assert_close(packed_logps(model, batch), separate_logps(build("mistral"), batch))


def test_a_layer_that_ignores_the_layout_is_an_error() -> None:
    model = build("qwen3")
    route = prepare_model(model)
    decoder = decoder_of(model)
    setattr(decoder, ROUTE, AttentionRoute("merge", "", route.layers + 1, route.layer_kinds))
    with pytest.raises(RuntimeError, match="3 of 4 attention layers"):
        hidden_states(model, forest_batch())


def test_attention_dropout_is_an_error_while_training() -> None:
    model = build("qwen3")
    prepare_model(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(ValueError, match="set attention_dropout to 0"):
        hidden_states(model.train(), forest_batch())


def test_unknown_attention_keywords_are_an_error() -> None:
    forest = forest_of([4], [-1])
    q, k, v, _ = (x[:, None].transpose(0, 1).transpose(1, 2) if x.dim() == 3 else x for x in qkv(4))
    with pytest.raises(ValueError, match="position_bias"):
        forest_attention(
            torch.nn.Module(), q, k, v, None, rft_layout=Layout(forest, None), position_bias=torch.ones(1)
        )
    with pytest.raises(ValueError, match="its own mask"):
        forest_attention(torch.nn.Module(), q, k, v, torch.ones(1, 1, 4, 4), rft_layout=Layout(forest, None))


def test_models_that_are_no_causal_lm_are_refused_by_name() -> None:
    config = T5Config(vocab_size=96, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    with pytest.raises(ValueError, match="encoder-decoder"):
        prepare_model(T5ForConditionalGeneration(config))
    with pytest.raises(ValueError, match="Linear is neither a transformers model"):
        prepare_model(torch.nn.Linear(2, 2))
    tuned = peft.get_peft_model(
        build("qwen3"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="use LoRA instead"):
        prepare_model(tuned)


@pytest.mark.parametrize(
    ("name", "why"), [("stablelm", "merge: "), ("jamba", "layers of type linear_attention")]
)
def test_a_kernel_that_a_model_cannot_take_is_refused_by_name(name: str, why: str) -> None:
    model = build(name)
    with pytest.raises(
        ValueError, match=rf"attention of \w+ cannot be replaced by the kernel masked \(.*{why}"
    ):
        prepare_model(model, "masked")
    assert not hasattr(decoder_of(model), ROUTE)


def test_segments_out_of_their_tree_are_refused() -> None:
    with pytest.raises(ValueError, match="segment 2 continues segment 0, outside the tree that starts at 1"):
        forest_of([2, 2, 2], [-1, -1, 0])


def test_empty_batches_are_refused() -> None:
    model = build("qwen3")
    with pytest.raises(ValueError, match="empty batch"):
        hidden_states(model, forest_batch().select([]))


def test_rope_that_depends_on_the_batch_is_limited() -> None:
    model = build("llama")
    config = model.config
    config.rope_parameters = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
    }
    config.max_position_embeddings = 16
    model = type(model)(config).eval()
    with pytest.raises(ValueError, match="beyond 16 tokens"):
        hidden_states(model, Batch.build(groups()))


def test_llama4_scaling_by_place_limits_the_row() -> None:
    model = build("llama4_text")
    prepare_model(model)
    decoder = decoder_of(model)
    route = getattr(decoder, ROUTE)
    assert route.max_tokens == model.config.floor_scale - 1
    setattr(decoder, ROUTE, AttentionRoute("merge", "", 3, route.layer_kinds, None, 10))
    with pytest.raises(ValueError, match=r"lower learner\.tokens_per_micro_batch"):
        hidden_states(model, forest_batch())
