"""Log-probs of truncated sampling (top-p, top-k, min-p): over the tokens that could be sampled only."""

from __future__ import annotations

from torch import Tensor

from rft.batch import Batch
from rft.config.rollout import SamplingConfig
from rft.errors import ModelError
from rft.kernels.logprob_support import sampled_support
from rft.learner.model import Head


def kept_tokens(
    batch: Batch, rows: Tensor, hidden: Tensor, head: Head, sampling: SamplingConfig, temperature: float
) -> Tensor:
    """Return the tokens among which the tokens at `rows` [n] were sampled, [n, ceil(V/8)] uint8, packed.

    These are the batch's or, where the policy that sampled it is this one, those of its hidden states
    [n, H]; for demonstrated tokens the whole vocabulary. Raises ModelError if an adapter changes the LM head.
    """
    if batch.support is not None:
        kept = batch.support[rows]
    else:
        if head.lora is not None:
            raise ModelError(
                "learner.adapter: it changes the LM head, which rollout.sampling.top_p, top_k and min_p do "
                "not support; take lm_head out of target_modules, or remove these settings"
            )
        kept = sampled_support(
            hidden.detach(),
            head.weight.detach().to(hidden.dtype),
            top_k=sampling.top_k or None,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            bias=None if head.bias is None else head.bias.detach().to(hidden.dtype),
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
    if batch.demonstrated is not None:
        kept = kept.masked_fill(batch.demonstrated[rows][:, None], 255)
    return kept
