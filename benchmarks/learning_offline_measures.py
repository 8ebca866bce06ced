"""What benchmarks/learning_offline.py measures of a policy before and after training, on held-out data."""

from __future__ import annotations

from functools import cache

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rft.algorithms import ALGORITHMS
from rft.algorithms.preference.base import preference
from rft.algorithms.supervised.asft import ASFT
from rft.batch import Batch, Group
from rft.config.data import DataConfig
from rft.config.load import parse_config
from rft.data import load_groups, load_prompts
from rft.learner.learner import Learner
from rft.learner.load import count_parameters
from rft.learner.model import PolicyModel
from rft.plan import Plan
from rft.rewards import load_reward

PROBLEMS, HELD_OUT = 256, 187
LONGEST = 48  # tokens of a sampled solution
CLEAN = {"kind": "arithmetic", "options": {"styles": {"lines": 1.0}, "wrong_fraction": 0.0}}


@torch.no_grad()
def preferences(plan: Plan, learner: Learner, pairs: DataConfig) -> dict[str, float]:
    """Of held-out ones of `pairs`: how often the policy finds the preferred response likelier, in all and
    per token, and by how many nats; and how often its log-ratio to the start favours it (DPO's implicit
    reward; a tie counts half). The same baselines for every loss."""
    data = pairs.model_copy(update={"eval_limit": HELD_OUT})
    groups = load_groups(data, plan.tokenizer, "preference", "test").groups
    batch = Batch.build(groups, share_prefix=True)
    logps = learner.score(batch)["logps"]
    first, second = batch.pairs()
    total, mean = batch.sum_by_sequence(logps), batch.mean_by_sequence(logps)
    whole = preference(total[first] - total[second])
    start = batch.sum_by_sequence(_base(plan).run(batch, frozenset({"logps"})).logps)
    gained = (total - start)[first] - (total - start)[second]
    gained = preference(gained.masked_fill(gained.abs() < 1e-3, 0))  # rounding, where nothing was learnt
    return {
        "reward_accuracy": float(gained["preference_accuracy"].mean()),
        "accuracy": float(whole["preference_accuracy"].mean()),
        "accuracy_per_token": float(preference(mean[first] - mean[second])["preference_accuracy"].mean()),
        "margin": float(whole["preference_margin"].mean()),
        "chosen_nll": -float(mean[first].mean()),
    }


def embedded_pairs(plan: Plan, learner: Learner) -> dict[str, float]:
    """The preferences of the embedded pairs, and accuracy on their task. A run that reads them as single
    responses is measured on the pairs as well."""
    pairs = plan.config.data.model_copy(update={"columns": {}, "numbers": []})
    return {**preferences(plan, learner, pairs), **task(plan, learner)}


def _base(plan: Plan) -> PolicyModel:
    """The model that the run started from."""
    return _policy(plan.model)


def _policy(folder: str) -> PolicyModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return PolicyModel(model, temperature=1.0, compute_dtype=torch.float32)


def solved(plan: Plan, learner: Learner) -> float:
    """Share of held-out problems of the embedded task that one sample solves, at temperature 1."""
    model = learner.policy.model.eval()
    share = share_solved(model, plan.tokenizer, plan.config.data)
    model.train()
    return share


@torch.no_grad()
def share_solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> float:
    """Share of held-out problems of `data` that one sample of a model solves, at temperature 1."""
    held_out = data.model_copy(update={"eval_limit": PROBLEMS, "seed": 0})
    prompts = load_prompts(held_out, tokenizer, "test").prompts
    longest = max(len(p.tokens) for p in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p.tokens)) + list(p.tokens) for p in prompts])
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=(ids != pad).long(),
        max_new_tokens=LONGEST,
        do_sample=True,
        top_k=0,
        temperature=1.0,
    )
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    answers = [p.columns["answer"] for p in prompts]
    scores = load_reward("math")([p.text for p in prompts], texts, answer=answers)
    return sum(score == 1.0 for score in scores) / len(scores)


def demonstrations(plan: Plan, learner: Learner) -> dict[str, float]:
    """Accuracy on the task, and how far the policy is from the start: KL(policy || start) and its reverse
    over the vocabulary, mean over the tokens of clean held-out solutions, in nats."""
    return {"task": solved(plan, learner), **_drifts(plan, learner.policy, _base(plan))}


def _drifts(plan: Plan, policy: PolicyModel, base: PolicyModel) -> dict[str, float]:
    data = parse_config({"algorithm": "sft", "data": {**CLEAN, "eval_limit": HELD_OUT}}).data
    groups = load_groups(data, plan.tokenizer, "sft", "test").groups
    return {
        "kl": drift(policy, base, groups, ASFT(direction="reverse")),
        "kl_forward": drift(policy, base, groups, ASFT(direction="forward")),
    }


@cache
def _solved(folder: str) -> float:
    """`share_solved` of a model folder, on the stories of the embedded task."""
    stories = parse_config({"algorithm": "sft", "data": CLEAN}).data
    return share_solved(_policy(folder).model, AutoTokenizer.from_pretrained(folder), stories)


def learned_and_moved(plan: Plan, folder: str, start: str, drifts: bool) -> dict[str, float]:
    """Accuracy of a trained model on the task and, with `drifts`, how far it is from the start, as in
    `demonstrations`."""
    measured = {"task": _solved(folder)}
    return measured | (_drifts(plan, _policy(folder), _policy(start)) if drifts else {})


def memory(learner: Learner, start: str) -> dict[str, float]:
    """Trained numbers as a share of the start's parameters, and the megabytes of weights, gradients and
    optimizer state after the last step; activations are not counted."""
    trained = {id(p): p for p in learner.strategy.trained(learner.policy)}
    weights = {id(p): p for p in learner.policy.model.parameters()} | trained
    moments = [t for state in learner.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    sizes = [t.nbytes for t in (*weights.values(), *trained.values(), *moments)]
    return {
        "trained": sum(p.numel() for p in trained.values()) / count_parameters(_policy(start).model),
        "megabytes": sum(sizes) / 1e6,
    }


@torch.no_grad()
def drift(policy: PolicyModel, base: PolicyModel, groups: list[Group], anchor: ASFT) -> float:
    """The mean divergence over response tokens, in nats."""
    batch = Batch.build(groups)
    kl = policy.run(batch, frozenset({"kl"}), algorithm=anchor, reference=base).kl
    assert kl is not None
    return float(kl[batch.mask].mean())


def task(plan: Plan, learner: Learner) -> dict[str, float]:
    """Accuracy on the task alone."""
    return {"task": solved(plan, learner)}


def held_out(plan: Plan, learner: Learner) -> dict[str, float]:
    """The algorithm's own held-out measures."""
    data = plan.config.data.model_copy(update={"eval_limit": HELD_OUT})
    groups = load_groups(data, plan.tokenizer, ALGORITHMS[plan.config.name].data, "test").groups
    sums = learner.evaluate(Batch.build(groups, share_prefix=True), plan.config.train.steps - 1)
    return {name: total / count for name, (total, count) in sums.items()}
