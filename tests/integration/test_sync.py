"""Weights arrive, and the proof of arrival catches it when they do not: real vLLM, real gloo."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import ray

from rft.batch import Batch, Completion, Group, Prompt
from rft.config.metrics import TrackingConfig
from rft.config.rollout import AlignConfig
from rft.errors import LogpGapError
from rft.metrics import Progress, RunLog
from rft.rewards.runner import RewardRunner
from rft.rollout.align import Aligner
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.fleet import Fleet
from rft.sync.channel import PushReport
from rft.sync.proof import PROOF_TOKENS
from tests.integration.conftest import with_transport


def sample(stage, *, length: int, n: int = 4, seed: int | None = 5, name: str = "") -> Group:
    """One group on a random prompt of `length` tokens, rewards 0 and 1 in turn."""
    dice = random.Random(length)
    tokens = tuple(dice.randrange(6, 300) for _ in range(length))
    request = Request(name or f"r{random.random()}", tokens, Sampling(n, 40, seed=seed))
    generated = stage.run(stage.pool.generate(request))
    completions = tuple(
        Completion(g.tokens, logps=g.logps, versions=g.versions, finish=g.finish, reward=float(i % 2))
        for i, g in enumerate(generated)
    )
    return Group(Prompt(0, tokens, "p"), completions)


def step(stage, groups: list[Group], share: bool = False) -> dict[str, float]:
    batch = Batch.build(groups, share_prefix=share)
    return stage.run(stage.learner.step(batch, 0))


def push(stage) -> None:
    version = stage.run(stage.learner.describe()).version
    stage.run(stage.channel.push(version))


def assert_proven(stage, version: int, bound: float = 1e-3) -> None:
    """Every replica scored the fixed tokens as the learner does."""
    proof = stage.run(stage.channel.proved())
    assert proof.version == version and set(proof.gaps) == set(stage.pool.members)
    assert proof.tokens == PROOF_TOKENS - 1
    assert all(0 < gap.mean <= gap.largest < bound for gap in proof.gaps.values())


def train_and_push(stage, bound: float = 1e-4) -> tuple[dict[str, float], PushReport]:
    """A step on prompts of 5 and 140 tokens, whose samples fit the learner within `bound` nats on average,
    and the push of what came of it."""
    groups = [sample(stage, length=n) for n in (5, 140)]
    stage.run(stage.channel.before_step())
    metrics = step(stage, groups)
    assert 0 < metrics["sync/logp_gap_mean"] < bound
    version = stage.run(stage.learner.describe()).version
    return metrics, stage.run(stage.channel.push(version))


@pytest.mark.parametrize("share", [False, True])
def test_engine_and_learner_agree_after_every_push(vllm_stage, share: bool) -> None:
    """Three large steps of a tied model; prompts of 5, 140 and 300 tokens (a KV block is 128)."""
    for _ in range(3):
        groups = [sample(vllm_stage, length=n) for n in (5, 140, 300)]
        metrics = step(vllm_stage, groups, share)
        assert 0 < metrics["sync/logp_gap_mean"] < 1e-4
        assert metrics["sync/logp_gap"] < 1e-3
        push(vllm_stage)
        assert_proven(vllm_stage, vllm_stage.pool.members[0].version)


def test_the_kv_cache_has_the_size_of_the_config(vllm_stage) -> None:
    actor = vllm_stage.pool.members[0].actor
    blocks = ray.get(
        actor.__ray_call__.remote(lambda r: r.engine._engine.vllm_config.cache_config.num_gpu_blocks)
    )
    token = 2 * 2 * 64 * 4  # keys and values of two layers, float32
    assert blocks == int(0.1 * 2**30) // (32 * token)


def test_every_completion_carries_the_version_that_sampled_it(vllm_stage) -> None:
    push(vllm_stage)
    now = vllm_stage.run(vllm_stage.learner.describe()).version
    group = sample(vllm_stage, length=6)
    for completion in group.completions:
        assert completion.versions == ((now, 0, len(completion.tokens)),)


def test_without_the_tied_head_repair_the_run_is_stopped(vllm_stage) -> None:
    """Take the repair out: the engine's head keeps its old packed copy, and the next step refuses to
    train. With the repair back, a push makes them agree again."""
    push(vllm_stage)
    step(vllm_stage, [sample(vllm_stage, length=20)])
    vllm_stage.run(vllm_stage.pool.call_workers("set_repack_tied_head", False))
    push(vllm_stage)
    stale = sample(vllm_stage, length=20)
    with pytest.raises(LogpGapError, match=r"disagree at policy version \d+ .*replica 0: mean gap"):
        vllm_stage.run(vllm_stage.channel.proved())
    with pytest.raises(LogpGapError, match=r"disagree at policy version \d+: mean gap .* allowed 0.001"):
        step(vllm_stage, [stale])
    vllm_stage.run(vllm_stage.pool.call_workers("set_repack_tied_head", True))
    push(vllm_stage)
    assert step(vllm_stage, [sample(vllm_stage, length=20)])["sync/logp_gap"] < 1e-3
    push(vllm_stage)


def test_a_batch_without_fresh_tokens_is_refused(vllm_stage) -> None:
    """Synchronous training on samples of an older version means that a push was lost."""
    old = sample(vllm_stage, length=8)
    step(vllm_stage, [old])
    with pytest.raises(LogpGapError, match="no token of this batch was sampled by policy version"):
        step(vllm_stage, [old])
    push(vllm_stage)


def test_a_push_in_mid_generation_keeps_the_completions(vllm_stage) -> None:
    """`keep`: a completion may span two versions, each token marked with its own."""

    async def both() -> list:
        requests = [
            Request(f"mid-{i}", (9, 10, 11), Sampling(4, 300, stop_token_ids=(), seed=i)) for i in range(8)
        ]
        running = [asyncio.ensure_future(vllm_stage.pool.generate(r)) for r in requests]
        await asyncio.sleep(0.15)
        await vllm_stage.channel.push(77)
        return [g for part in await asyncio.gather(*running) for g in part]

    done = vllm_stage.run(both())
    assert len(done) == 32
    for generated in done:
        assert len(generated.tokens) == len(generated.logps) == generated.versions[-1][2]
        assert generated.versions[0][1] == 0
    assert any(v == 77 for g in done for v, _, _ in g.versions)
    push(vllm_stage)


def test_what_nobody_waits_for_is_sampled_no_further(vllm_stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gives up a request whose caller did: a push that waits for what is in flight need not wait
    for that, and what comes later is answered."""
    pool, channel = vllm_stage.pool, vllm_stage.channel
    monkeypatch.setattr(channel, "in_flight", "wait")
    version = vllm_stage.run(vllm_stage.learner.describe()).version
    long = Sampling(64, 400, seed=1)

    async def push_amid(name: str, *, cancel: bool) -> float:
        running = asyncio.ensure_future(pool.generate(Request(name, (9, 10, 11), long)))
        while await pool.health(0, 30) == 0:
            await asyncio.sleep(0.01)
        if cancel:
            running.cancel()
        seconds: float = (await channel.push(version)).seconds
        await asyncio.wait([running])
        assert running.cancelled() == cancel and pool.load(0) == await pool.health(0, 30) == 0
        return seconds

    waited = vllm_stage.run(push_amid("waited for", cancel=False))
    given_up = vllm_stage.run(push_amid("given up", cancel=True))
    assert given_up < waited / 2
    kept = vllm_stage.run(pool.generate(Request("kept", (9, 10, 11), Sampling(2, 8, seed=2))))
    assert len(kept) == 2 and all(0 < len(g.tokens) <= 8 for g in kept)


def test_a_push_that_continues_leaves_old_keys_to_old_requests_only(vllm_stage) -> None:
    """`continue`: completions in flight count as of the version that began them; the same prompt, longer than
    a KV block, is read anew for whoever comes later."""
    push(vllm_stage)
    before = vllm_stage.pool.members[0].version
    step(vllm_stage, [sample(vllm_stage, length=140)])  # the prefix of version `before` is in the cache
    dice = random.Random(140)
    prompt = tuple(dice.randrange(6, 300) for _ in range(140))

    async def both() -> list:
        requests = [Request(f"on-{i}", prompt, Sampling(4, 300, stop_token_ids=(), seed=i)) for i in range(8)]
        running = [asyncio.ensure_future(vllm_stage.pool.generate(r)) for r in requests]
        await asyncio.sleep(0.15)
        await vllm_stage.channel.push(before + 1)
        unfinished = sum(not task.done() for task in running)
        return [unfinished, *(g for part in await asyncio.gather(*running) for g in part)]

    vllm_stage.channel.in_flight = "continue"
    try:
        unfinished, *done = vllm_stage.run(both())
    finally:
        vllm_stage.channel.in_flight = "keep"
    assert unfinished > 0 and len(done) == 32
    assert {g.versions for g in done} == {((before, 0, len(g.tokens)),) for g in done}
    group = sample(vllm_stage, length=140)
    assert {v for c in group.completions for v, _, _ in c.versions} == {before + 1}
    assert 0 < step(vllm_stage, [group])["sync/logp_gap_mean"] < 1e-4
    push(vllm_stage)


@pytest.mark.parametrize("in_flight", ["abort", "wait"])
def test_a_push_in_mid_generation_aborts_or_waits(vllm_stage, tmp_path: Path, in_flight: str) -> None:
    """`abort`: what was cut off is sampled again, by the new version alone. `wait`: by the old one alone."""
    push(vllm_stage)
    before = vllm_stage.pool.members[0].version
    config, channel = vllm_stage.plan.config.rollout, vllm_stage.channel
    log = RunLog(tmp_path, 1, TrackingConfig(trackers=()))
    fleet = Fleet(vllm_stage.pool, channel, config, log, Progress(1, "test", display="off"))

    async def both() -> list:
        requests = [Request(f"{in_flight}-{i}", (9, 10, 11), Sampling(4, 300, seed=i)) for i in range(8)]
        running = [asyncio.ensure_future(fleet.generate(r)) for r in requests]
        await asyncio.sleep(0.15)
        async with fleet.gate:
            await fleet.push(79)
        return [g for part in await asyncio.gather(*running) for g in part]

    channel.in_flight = in_flight
    done = vllm_stage.run(both())
    channel.in_flight = "keep"
    log.close()
    versions = {v for g in done for v, _, _ in g.versions}
    assert len(done) == 32 and all(len(g.versions) == 1 for g in done)
    assert 79 in versions and fleet.requeued > 0 if in_flight == "abort" else versions == {before}
    push(vllm_stage)


def test_same_seed_same_completions(vllm_stage) -> None:
    push(vllm_stage)
    one, two = (sample(vllm_stage, length=12, seed=42) for _ in range(2))
    other = sample(vllm_stage, length=12, seed=43)
    assert [c.tokens for c in one.completions] == [c.tokens for c in two.completions]
    assert [c.tokens for c in one.completions] != [c.tokens for c in other.completions]


def test_truncation_is_flagged(vllm_stage) -> None:
    request = Request("cut", (7, 8, 9), Sampling(8, 3, seed=1))
    for generated in vllm_stage.run(vllm_stage.pool.generate(request)):
        ended = generated.tokens[-1] in vllm_stage.plan.stop_ids
        assert generated.finish == ("stop" if ended else "length")
        assert len(generated.tokens) <= 3


@pytest.mark.parametrize("method", ["best_of_n", "qalign"])
def test_completions_are_aligned(vllm_stage, tmp_path: Path, method: str) -> None:
    """Decoding-time alignment asks any engine: with a reward for short completions they are shorter."""
    push(vllm_stage)
    (tmp_path / "short.py").write_text(
        "def short(completions, completion_ids, **columns):\n"
        "    return [-float(len(ids)) for ids in completion_ids]\n"
    )
    align = AlignConfig.model_validate({"method": method, "n": 8, "rewards": [f"{tmp_path}/short.py:short"]})
    request = Request(method, (7, 8, 9, 10), Sampling(8, 40, seed=2))

    async def body() -> tuple[list[Generated], list[Generated]]:
        async with RewardRunner(align.rewards) as rewards:
            aligner = Aligner(align, vllm_stage.pool.generate, rewards, vllm_stage.plan.tokenizer)
            return await aligner.sample(request, Prompt(0, request.tokens, "p")), await aligner.generate(
                request
            )

    aligned, plain = ([len(g.tokens) for g in part] for part in vllm_stage.run(body()))
    assert len(aligned) == 8 and sum(aligned) < sum(plain)


@pytest.mark.slow
def test_a_killed_engine_is_named_and_a_rebuilt_one_serves_the_current_version(vllm_stage) -> None:
    import psutil

    from rft.rollout.pool import ReplicaDied

    member = vllm_stage.pool.members[0]
    for child in psutil.Process(member.pid).children(recursive=True):
        child.kill()
    with pytest.raises(ReplicaDied, match="rollout replica 0 died"):
        sample(vllm_stage, length=5)
    vllm_stage.run(vllm_stage.pool.rebuild(0))
    vllm_stage.run(vllm_stage.channel.connect())
    push(vllm_stage)
    assert step(vllm_stage, [sample(vllm_stage, length=5)])["sync/logp_gap"] < 1e-3


@pytest.mark.parametrize("transport", ["sparse", "file"])
def test_vllm_takes_the_other_transports_as_exactly(vllm_stage, transport: str, tmp_path) -> None:
    """The same engine, tied head and fused projections, fed by a learner of its own: everything first, then
    what changed."""
    other = with_transport(vllm_stage, transport, str(tmp_path))
    try:
        other.run(other.channel.connect())
        other.run(other.channel.push(0))
        for _ in range(2):
            _, report = train_and_push(other)
            assert_proven(other, report.version)
            assert report.metrics["sync/changed_share"] > 0 and report.bytes > 0
        assert step(other, [sample(other, length=9)])["sync/logp_gap"] < 1e-3
        other.run(other.channel.close())
        assert not list(tmp_path.rglob("*.safetensors"))
    finally:
        other.learner.kill()
        vllm_stage.run(vllm_stage.channel.connect())
        push(vllm_stage)
