"""Decoding-time alignment: the acceptance ratio by hand, the distribution of a chain, best of n, mistakes."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer

from rft.config.load import parse_config
from rft.config.rollout import AlignConfig
from rft.errors import ConfigError
from rft.loops.evaluate import evaluate
from rft.plan import make_plan
from rft.rewards.runner import RewardRunner
from rft.rollout.align import Aligner, acceptance
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.hf import HFEngine
from rft.samples import Prompt

REWARD = '''
def ones(prompts, completions, **columns):
    """The number of ones; a completion with two zeros is not judged."""
    return [None if text.count("0") > 1 else float(text.count("1")) for text in completions]

def short(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]
'''
LONGEST, BETA = 3, 0.8


def test_acceptance_by_hand() -> None:
    assert acceptance(1.0, 2.0, 4, 4, 0.5) == 1.0
    assert acceptance(2.0, 1.0, 4, 4, 0.5) == pytest.approx(math.exp(-2))
    assert acceptance(1.0, 1.0, 3, 6, 0.5) == pytest.approx(0.5), "a longer one has more positions"
    assert acceptance(1.0, 1.5, 2, 8, 1.0) == pytest.approx(math.exp(0.5) / 4)
    assert acceptance(-math.inf, -5.0, 1, 9, 1.0) == 1.0
    assert acceptance(0.0, -math.inf, 9, 1, 1.0) == acceptance(-math.inf, -math.inf, 1, 1, 1.0) == 0.0


def probability(prefix: str, token: str) -> float:
    """A language of 0, 1 and the end `.`, which depends on the last token; at most LONGEST tokens."""
    tables = {"": (0.3, 0.3, 0.4), "0": (0.5, 0.2, 0.3), "1": (0.6, 0.1, 0.3)}
    return tables[prefix[-1:]]["01.".index(token)]


def language() -> Iterator[tuple[str, float]]:
    """Yield every completion with its probability."""
    for length in range(1, LONGEST + 1):
        for tokens in product("01.", repeat=length):
            text = "".join(tokens)
            if "." in text[:-1] or (length < LONGEST and text[-1] != "."):
                continue
            yield text, math.prod(probability(text[:i], text[i]) for i in range(length))


def reward_of(text: str) -> float:
    return -math.inf if text.count("0") > 1 else float(text.count("1"))


def test_the_chain_leaves_its_target_unchanged() -> None:
    """The transition matrix of the proposal and `acceptance` has p(y) exp(r / beta) as a fixed point."""
    p = dict(language())
    assert sum(p.values()) == pytest.approx(1)
    weights = {y: q * math.exp(reward_of(y) / BETA) for y, q in p.items()}
    target = {y: w / sum(weights.values()) for y, w in weights.items()}
    after = dict.fromkeys(p, 0.0)
    for y in p:
        for start, z in product(range(len(y)), p):
            if z[:start] != y[:start] or len(z) <= start:
                continue
            suffix = math.prod(probability(z[:i], z[i]) for i in range(start, len(z)))
            move = acceptance(reward_of(y), reward_of(z), len(y), len(z), BETA) if target[y] else 1.0
            after[z] += target[y] * suffix / len(y) * move
            after[y] += target[y] * suffix / len(y) * (1 - move)
    assert after == pytest.approx(target, abs=1e-12)


@pytest.fixture
def reward_file(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(REWARD)
    return f"{tmp_path}/rewards.py:ones"


def align_config(reward_file: str, **settings: Any) -> AlignConfig:
    return AlignConfig.model_validate({"rewards": [reward_file], "beta": BETA, **settings})


def test_chains_and_best_of_n_with_real_rewards(tiny_folder: Path, reward_file: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = {c: tokenizer.encode(c, add_special_tokens=False)[0] for c in "01"} | {".": tokenizer.eos_token_id}
    letters = {token: letter for letter, token in ids.items()}
    prompt = Prompt(0, (ids["0"],), "0")

    async def generate(request: Request) -> list[Generated]:
        s, rng = request.sampling, Random(request.sampling.seed)
        out = []
        for _ in range(s.n):
            text = "".join(letters[t] for t in request.tokens[1:])
            for _ in range(s.max_tokens):
                weights = [probability(text, letter) for letter in "01."]
                text += rng.choices("01.", weights)[0]
                if text[-1] == ".":
                    break
            tokens = tuple(ids[c] for c in text)[len(request.tokens) - 1 :]
            finish: Any = "stop" if text[-1] == "." else "length"
            out.append(Generated(tokens, (-1.0,) * len(tokens), finish, ((7, 0, len(tokens)),)))
        return out

    async def body() -> None:
        chain = align_config(reward_file, method="qalign", n=8)
        async with RewardRunner(chain.rewards) as rewards:
            aligner = Aligner(chain, generate, rewards, tokenizer)
            request = Request("x", prompt.tokens, Sampling(160, LONGEST, seed=5))
            sampled = await aligner.sample(request, prompt)
            few = Request("x", prompt.tokens, Sampling(4, LONGEST, seed=5))
            twice = [await Aligner(chain, generate, rewards, tokenizer).sample(few, prompt) for _ in range(2)]
            assert twice[0] == twice[1]
            for g in sampled:
                assert len(g.logps) == len(g.tokens) == sum(b - a for _, a, b in g.versions)
            weights = {y: q * math.exp(reward_of(y) / BETA) for y, q in language()}
            counts = Counter("".join(letters[t] for t in g.tokens) for g in sampled)
            for y, weight in weights.items():
                share = weight / sum(weights.values())
                error = 4 * math.sqrt(share * (1 - share) / 160) + 0.01  # of the start, 8 proposals ago
                assert abs(counts[y] / 160 - share) <= error, (y, counts[y], share)
            assert 0 < aligner.metrics()["align/accepted"] < 1

            best = Aligner(align_config(reward_file, method="best_of_n", n=4), generate, rewards, tokenizer)
            request = Request("y", prompt.tokens, Sampling(2, LONGEST, seed=6))
            chosen = await best.sample(request, prompt)
            every = await generate(Request("y", prompt.tokens, Sampling(8, LONGEST, seed=6)))
            values = [reward_of("".join(letters[t] for t in g.tokens)) for g in every]
            assert chosen == [
                every[values.index(max(values[:4]))],
                every[4 + values[4:].index(max(values[4:]))],
            ]
            assert best.metrics() == {}

    asyncio.run(body())


def raw_config(tiny_folder: Path, where: Path, **rollout: Any) -> Any:
    return parse_config(
        {
            "output_dir": str(where),
            "algorithm": "grpo",
            "model": {"path": str(tiny_folder)},
            "data": {"kind": "arithmetic", "limit": 16, "eval_limit": 3},
            "rewards": ["math"],
            "train": {"batch_size": 4},
            "eval": {"samples": 2},
            "rollout": {"engine": "hf", "threads": 1, "sampling": {"max_completion_length": 6}, **rollout},
        }
    )


def test_an_evaluation_with_the_hf_engine(tiny_folder: Path, tmp_path: Path, reward_file: str) -> None:
    short = reward_file.replace(":ones", ":short")
    align = {"method": "qalign", "n": 6, "beta": 1.0, "rewards": [short]}
    plan = make_plan(raw_config(tiny_folder, tmp_path, align=align), evaluate=True)

    async def body() -> tuple[dict[str, float], float, float]:
        engine = HFEngine(plan.engine_spec())
        await engine.start()
        config = plan.config
        async with RewardRunner(config.rewards) as rewards:
            parts = (engine.generate, rewards, plan.tokenizer, plan.eval_sets, config)
            metrics, judged = await evaluate(*parts, label="eval", align=config.rollout.align)
            _, plain = await evaluate(*parts, label="eval")
            lengths = [
                sum(len(c.text) for j in sets[0].sampled for c in j.completions) for sets in (judged, plain)
            ]
            assert [c.text for j in judged[0].greedy for c in j.completions] == [
                c.text for j in plain[0].greedy for c in j.completions
            ]
            return metrics, lengths[0], lengths[1]

    metrics, aligned, plain = asyncio.run(body())
    assert aligned < plain
    assert 0 < metrics["eval/align/accepted"] <= 1


def test_where_nothing_can_be_aligned_is_named(tiny_folder: Path, tmp_path: Path, reward_file: str) -> None:
    def refused(evaluate: bool = True, **align: Any) -> str:
        settings = {"method": "best_of_n", "rewards": [reward_file], **align}
        with pytest.raises(ConfigError) as error:
            make_plan(raw_config(tiny_folder, tmp_path, align=settings), evaluate=evaluate)
        return "\n".join(error.value.problems)

    assert "rollout.align: a run trains on completions of its policy alone" in refused(evaluate=False)
    assert "name at least one reward" in refused(rewards=[])
    told = refused(rewards=[{"function": "class_label", "columns": {"answer": "gone"}}])
    assert "rollout.align.rewards: " in told and "gone" in told
