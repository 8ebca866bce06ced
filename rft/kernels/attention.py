"""Hidden states of a packed forest, through any Hugging Face causal language model.

    route = prepare_model(model)              # once, after loading; reports the chosen route, and why
    hidden = hidden_states(model, batch)      # [T, H], with gradient

`prepare_model` installs the attention function of `rft.kernels.attention_function` in the model and
checks, on a few random tokens, that the model's outputs equal those on separate sequences. If they do not
(recurrent layers, attention that cannot be replaced), sequences run unshared and padded, with a warning;
if not even that is exact, the model is refused with an error that names it. Without a layout the model
works as usual, so the same object can generate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rft.batch import Batch
from rft.kernels.attention_function import NAME, Layout
from rft.kernels.attention_route import AttentionRoute, Kernel, candidates, decoder_of
from rft.kernels.forest import Forest
from rft.utils.quantized import evaluation_mode, is_quantized, rounding

ROUTE = "_rft_attention_route"  # where a prepared decoder keeps its route; deep copies keep it too


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Return the base transformer's last hidden states of a packed batch, without running the head.

    [T, H], in the model's dtype (under autocast, in autocast's dtype).
    Log-probs of `batch.tokens[t]` come from row `batch.source[t]`.
    Prepares the model first if `prepare_model` was not called on it.
    Raises ValueError for an empty batch, or for a sequence longer than the longest length for which the
    model's position encoding is the same in every batch.
    """
    if not batch.num_tokens:
        raise ValueError("an empty batch has no hidden states")
    decoder = decoder_of(model)
    route = getattr(decoder, ROUTE, None) or prepare_model(model)
    forest = Forest(batch.segment, batch.parent, batch.positions)
    if route.max_length is not None and forest.longest > route.max_length:
        raise ValueError(
            f"{type(decoder).__name__} changes its position encoding for batches that reach beyond "
            f"{route.max_length} tokens, this one has a sequence of {forest.longest}: lower the maximum "
            "prompt or completion length"
        )
    if route.max_tokens is not None and forest.num_tokens > route.max_tokens:
        raise ValueError(
            f"{type(decoder).__name__} scales queries by their position beyond {route.max_tokens} tokens, "
            f"this packed batch has {forest.num_tokens}: lower learner.tokens_per_micro_batch"
        )
    hidden = _run(decoder, batch.tokens, forest, route)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # The last norm has float32 weights, so its result is float32: without this cast, later operations
        # (the head above all) would run in float32 instead of the compute dtype.
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return hidden


def _run(decoder: PreTrainedModel, tokens: Tensor, forest: Forest, route: AttentionRoute) -> Tensor:
    if route.kind == "sequences":
        return sequence_hidden_states(decoder, tokens, forest)
    extra: dict[str, Any] = {}
    layout = Layout(forest, route.layer_kinds, route.kernel)
    if route.kind == "merge":
        # a 4-D mask is passed through unchanged, so none is built; the attention function ignores it
        extra["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        extra["rft_layout"] = layout
    else:
        extra["attention_mask"] = _full_mask(decoder, forest)
    hidden = _forward(decoder, tokens[None], position_ids=forest.positions[None], **extra)[0]
    if route.kind == "merge" and layout.calls != route.layers:
        raise RuntimeError(
            f"{layout.calls} of {route.layers} attention layers of {type(decoder).__name__} used the packed "
            "layout: the others attended to the wrong tokens. Set learner.self_check: fall_back"
        )
    return hidden


def _forward(decoder: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """[B, L] -> [B, L, H]."""
    out = decoder(input_ids=input_ids, use_cache=False, **kwargs)
    return out.last_hidden_state


def _full_mask(decoder: PreTrainedModel, forest: Forest) -> Tensor:
    """Build a [1, 1, T, T] additive mask in the model's dtype, for models that accept only a full mask."""
    dtype = next(p.dtype for p in decoder.parameters() if p.is_floating_point())
    place = torch.arange(forest.num_tokens, device=forest.device)
    seen = forest.sees[forest.segment[:, None], forest.segment] & (place[:, None] >= place)
    mask = torch.zeros(seen.shape, dtype=dtype, device=forest.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def sequence_hidden_states(decoder: PreTrainedModel, tokens: Tensor, forest: Forest) -> Tensor:
    """Return hidden states [T, H] without packing or sharing: one right-padded row per root-to-leaf path
    (causal models ignore right padding). A shared token's states come from the first path through it."""
    rows = forest.path_rows
    parts, at = [], []
    for row in rows:
        hidden = _forward(decoder, row.take(tokens))
        parts.append(row.flat(hidden))
        at.append(row.tokens)
    places = torch.cat(at)
    first = torch.full((forest.num_tokens,), places.numel(), dtype=torch.int64, device=tokens.device)
    order = torch.arange(places.numel(), device=tokens.device)
    first.scatter_reduce_(0, places, order, reduce="amin")
    return torch.cat(parts).index_select(0, first)


# -- preparing a model -----------------------------------------------------------------------------


def prepare_model(model: nn.Module, kernel: Kernel = "auto") -> AttentionRoute:
    """Choose and install the fastest route that is exact for this model. Call it once, after loading.

    `kernel`: see `AttentionRoute`. Routes are tried in order on a forest of random tokens, without gradient
    and with dropout off, and compared with the unmodified model on separate sequences. The chosen route is
    stored on the model's decoder. Warns if sequences cannot be packed. Raises ValueError if no route is exact
    (encoder-decoders, prompt tuning, non-causal attention), or if a kernel other than "auto" is requested by
    name for a model whose attention cannot be replaced.
    """
    decoder = decoder_of(model)
    routes = [replace(route, kernel=kernel) for route in candidates(model, decoder)]
    if any(p.is_meta for p in decoder.parameters()):
        raise ValueError(
            f"{type(decoder).__name__} is on the meta device: load its weights before preparing it"
        )
    original = decoder.config._attn_implementation
    with evaluation_mode(decoder):
        route = _first_exact(decoder, routes, original)
    if kernel != "auto" and route.kind != "merge":
        raise ValueError(
            f"the attention of {type(decoder).__name__} cannot be replaced by the kernel {kernel} "
            f"({route.reason}): use auto"
        )
    if route.kind == "sequences":
        warnings.warn(
            f"{type(decoder).__name__} cannot run packed or share prefixes ({route.reason}): every sequence "
            "is computed in a separate padded row, and shared prefixes are computed again for each",
            stacklevel=2,
        )
    setattr(decoder, ROUTE, route)
    return route


def _first_exact(decoder: PreTrainedModel, routes: list[AttentionRoute], original: str) -> AttentionRoute:
    tokens, forest = _probe(decoder)
    reasons = []
    with torch.no_grad():
        expected = _one_by_one(decoder, tokens, forest)
        for route in routes:
            wanted = NAME if route.kind == "merge" else original
            if decoder.config._attn_implementation != wanted:
                decoder.set_attn_implementation(wanted)
            try:
                error = relative_error(_run(decoder, tokens, forest, route), expected)
                if route.kind == "merge":  # without a layout, the model must behave as usual
                    error = max(error, relative_error(_one_by_one(decoder, tokens, forest), expected))
            except Exception as problem:  # any failure rules this route out, and the reason is reported
                reasons.append(f"{route.kind}: {type(problem).__name__}: {problem}")
                continue
            if error <= (limit := tolerance_of(decoder)):
                kept = "; ".join([*([route.reason] if route.reason else []), *reasons])
                return route.because(kept)
            reasons.append(
                f"{route.kind}: hidden states differ by {error:.1e} of their norm from separate sequences "
                f"(rounding explains {limit:.1e})"
            )
        repeated = relative_error(_one_by_one(decoder, tokens, forest), expected)
    raise ValueError(
        f"{type(decoder).__name__} cannot be trained on packed batches: {'; '.join(reasons)}. "
        f"{_cause(decoder, repeated)}"
    )


def _cause(decoder: PreTrainedModel, repeated: float) -> str:
    """Explain, if known, why no route is exact, and suggest a fix. `repeated`: the difference
    between two runs of the same sequences, one by one."""
    if repeated > tolerance_of(decoder):
        return (
            "Cause: the same sequence gives different hidden states when it is run again (by "
            f"{repeated:.1e}): a layer is random, or its weights change, with dropout off and without "
            "gradient. Take that layer out, or use another model"
        )
    if any(is_quantized(m) for m in decoder.modules()):
        return (
            "Cause: the quantised layers compute in fewer bits than the rest of the model, and their result "
            "depends on the shape of the batch. Leave learner.quantize out, or set learner.dtype: bfloat16"
        )
    return (
        "Cause: a layer attends to other tokens than rft expects of this architecture. Use another "
        "architecture"
    )


def _probe(decoder: PreTrainedModel) -> tuple[Tensor, Forest]:
    """Make random tokens in a forest of two trees, with children, a grandchild and unequal lengths."""
    lengths = torch.tensor([5, 3, 4, 2, 6, 7, 2, 1])
    parent = torch.tensor([-1, 0, 0, 2, 2, -1, 5, -1])
    segment = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    start = [0] * lengths.numel()
    for s, p in enumerate(parent.tolist()):
        start[s] = start[p] + int(lengths[p]) if p >= 0 else 0
    positions = torch.cat([torch.arange(a, a + int(n)) for a, n in zip(start, lengths, strict=True)])
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(decoder.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(0, vocabulary, (segment.numel(),), generator=generator)
    device = next(decoder.parameters()).device
    return tokens.to(device), Forest(segment.to(device), parent.to(device), positions.to(device))


def _one_by_one(decoder: PreTrainedModel, tokens: Tensor, forest: Forest) -> Tensor:
    """[T, H]: run each sequence separately and unpadded, the reference that every route must reproduce."""
    out: list[Tensor] = [torch.empty(0)] * forest.num_tokens
    for path in forest.paths():
        hidden = _forward(decoder, tokens[torch.tensor(path, device=tokens.device)][None])[0]
        for i, token in enumerate(path):
            out[token] = hidden[i]
    return torch.stack(out)


def relative_error(actual: Tensor, expected: Tensor, outliers: float = 0.0) -> float:
    """Return the largest error of a token's hidden state, relative to the norm of the expected one, without
    the share `outliers` of the tokens."""
    difference = (actual.float() - expected.float()).norm(dim=-1)
    errors = (difference / expected.float().norm(dim=-1).clamp(min=1e-12)).flatten().sort().values
    error = float(errors[-1 - int(outliers * errors.numel())])
    return error if math.isfinite(error) else math.inf


def tolerance_of(decoder: PreTrainedModel) -> float:
    """Return the relative difference of hidden states that rounding explains, by compute dtype."""
    return max(1e-4, 8 * rounding(decoder))


SAMPLE_TOKENS = 512  # of a batch, that the self-check compares
OUTLIERS = 0.02  # of the tokens, that rounding to 16 bits may change by more than the tolerance


def self_check(
    model: nn.Module,
    batch: Batch,
    tolerance: float | None = None,
    *,
    max_tokens: int = SAMPLE_TOKENS,
    fall_back: bool = False,
) -> float:
    """Compare a batch's hidden states with those of separate sequences; return the largest relative error.

    Checks a sample (`_sample`), without gradient and with dropout off. On CPU float32 weights are checked in
    float32, also under autocast: the layout is the same, and rounding cannot hide or imitate a mistake. In 16
    bits the largest error leaves out the `OUTLIERS`, tokens for which rounding tips a balance that the layers
    above amplify. If the error exceeds `tolerance` (default: `tolerance_of` the model's dtype), it raises
    RuntimeError; with `fall_back`, it warns and switches the model to the unshared route.
    """
    decoder = decoder_of(model)
    route = getattr(decoder, ROUTE, None) or prepare_model(model)
    if route.kind == "sequences":
        return 0.0
    part = _sample(batch, max_tokens)
    forest = Forest(part.segment, part.parent, part.positions)
    on_cpu = batch.tokens.device.type == "cpu"
    weights = [p for p in decoder.parameters() if p.is_floating_point()]
    # sharded weights are cast when they are gathered
    exact = on_cpu and all(p.dtype == torch.float32 and type(p.data) is Tensor for p in weights)
    precision = torch.autocast("cpu", enabled=False) if exact else nullcontext()
    with evaluation_mode(decoder), torch.no_grad(), precision:
        expected = sequence_hidden_states(decoder, part.tokens, forest)
        limit = tolerance_of(decoder) if tolerance is None else tolerance
        outliers = OUTLIERS if rounding(decoder) > torch.finfo(torch.float32).eps else 0.0
        error = relative_error(_run(decoder, part.tokens, forest, route), expected, outliers)
    if error > limit:
        message = (
            f"packed hidden states of {type(decoder).__name__} differ from those of separate sequences by "
            f"{error:.1e} of their norm, more than {limit:.1e}"
        )
        if not fall_back:
            raise RuntimeError(
                f"{message}. Cause: with this batch's lengths a layer mixes the tokens of different "
                "sequences, or its arithmetic is coarser than its dtype. Set learner.self_check: fall_back "
                "to run every sequence in a separate padded row"
            )
        warnings.warn(message + ": from now on, every sequence runs in a separate padded row", stacklevel=2)
        setattr(decoder, ROUTE, AttentionRoute("sequences", message))
    return error


def _sample(batch: Batch, max_tokens: int) -> Batch:
    """Select the longest tree and the shortest ones that fit into `max_tokens` with it, at least one, and of
    each tree the two longest of its last segments with their ancestors."""
    sizes = torch.bincount(batch.segment, minlength=batch.parent.numel()).tolist()
    parents, tree_of = batch.parent.tolist(), batch.tree.tolist()
    inner = set(parents)
    leaves: dict[int, list[int]] = {}
    for segment in sorted(range(len(sizes)), key=lambda s: -sizes[s]):
        if sizes[segment] and segment not in inner:
            leaves.setdefault(tree_of[segment], []).append(segment)
    chosen = {
        tree: {s for leaf in some[:2] for s in _ancestry(leaf, parents)} for tree, some in leaves.items()
    }
    tokens = {tree: sum(sizes[s] for s in segments) for tree, segments in chosen.items()}
    *others, longest = sorted(chosen, key=tokens.__getitem__)
    trees, room = [longest], max_tokens - tokens[longest]
    for tree in others:
        room -= tokens[tree]
        if room < 0 and len(trees) > 1:
            break
        trees.append(tree)
    kept = torch.zeros(len(sizes), dtype=torch.bool, device=batch.segment.device)
    kept[[s for tree in trees for s in chosen[tree]]] = True
    return batch.pruned(kept[batch.segment])[0]


def _ancestry(segment: int, parents: list[int]) -> Iterator[int]:
    """Yield a segment and its ancestors."""
    while segment >= 0:
        yield segment
        segment = parents[segment]
