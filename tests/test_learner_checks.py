"""The learner's first batch is checked against separate sequences, and its memory does not grow with the
vocabulary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from rft.algorithms import ALGORITHMS
from rft.batch import Batch
from rft.kernels import logprob_chunked as chunked
from rft.kernels import logprob_common as common
from rft.kernels.attention import ROUTE
from rft.kernels.attention_route import AttentionRoute, decoder_of
from rft.learner import objective
from rft.learner.learner import Learner
from rft.learner.spec import LearnerSpec
from tests.test_learner import spec

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def windowed(tmp_path: Path) -> Path:
    """A model whose layers look back 4 tokens."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def blind_to_windows(learner_spec: LearnerSpec) -> Learner:
    """A learner whose model runs with one plain mask, which its windows are not in."""
    learner = Learner(learner_spec)
    setattr(decoder_of(learner.policy.model), ROUTE, AttentionRoute("mask"))
    return learner


def test_a_wrong_first_batch_stops_the_learner(windowed, make_groups) -> None:
    learner = blind_to_windows(spec(windowed))
    before = [p.clone() for p in learner.policy.trained()]
    with pytest.raises(RuntimeError, match=r"MistralModel differ from those of separate sequences by \d"):
        learner.step(Batch.build(make_groups(longest=20), share_prefix=True), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.trained(), strict=True))


def test_falling_back_trains_as_separate_sequences_do(windowed, make_groups) -> None:
    batch = Batch.build(make_groups(longest=20), share_prefix=True)
    learner = blind_to_windows(spec(windowed, config={"self_check": "fall_back"}))
    with pytest.warns(UserWarning, match="from now on, every sequence runs in a separate padded row"):
        loss = learner.step(batch, 0)["train/grad_norm"]
    right = Learner(spec(windowed))
    assert loss == pytest.approx(right.step(batch, 0)["train/grad_norm"], rel=1e-4)
    unchecked = blind_to_windows(replace(spec(windowed, config={"self_check": "off"})))
    assert unchecked.step(batch, 0)["train/grad_norm"] != pytest.approx(loss, rel=1e-3)


def test_forced_kernels_train_to_the_same_gradient(tiny_folder, make_groups) -> None:
    batch = Batch.build(make_groups(), share_prefix=True)
    kernels = {"logprob": "reference", "attention": "masked"}
    forced = Learner(spec(tiny_folder, config={"kernels": kernels}))
    assert forced.policy.kernels.logprob == "reference" and forced.policy.route.kernel == "masked"
    found = forced.step(batch, 0)["train/grad_norm"]
    assert found == pytest.approx(Learner(spec(tiny_folder)).step(batch, 0)["train/grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "predicted"),
    [
        (ALGORITHMS["sft"](), True),
        (ALGORITHMS["grpo"](correction="none"), True),
        (ALGORITHMS["dr_grpo"](correction="none"), True),
        (ALGORITHMS["grpo"](), True),
        (ALGORITHMS["grpo"](correction="sequence_truncate"), False),
        (ALGORITHMS["grpo"](correction="none", beta=0.1), True),
        (ALGORITHMS["dft"](), True),
        (ALGORITHMS["dpo"](), False),
    ],
    ids=["sft", "grpo", "dr_grpo", "by token", "by sequence", "grpo with a KL", "dft", "dpo"],
)
def test_a_loss_of_separate_tokens_takes_its_gradient_in_the_forward(
    algorithm, predicted, tiny_folder, make_groups, monkeypatch
) -> None:
    """The head is not computed again for it, and its update is the one of a head that is."""
    monkeypatch.setattr(common, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(common, "CHUNK_BYTES", 1 << 12)
    recomputed, calls = chunked.recomputed, []
    monkeypatch.setattr(chunked, "recomputed", lambda *args: (calls.append(1), recomputed(*args))[1])
    batch = Batch.build(make_groups(size=2 if algorithm.unit == "pair" else 4), share_prefix=True)
    norms = []
    for _ in range(2):
        learner = Learner(spec(tiny_folder, settings=algorithm))
        norms.append(learner.step(batch, 0)["train/grad_norm"])
        assert bool(calls) != predicted
        monkeypatch.setattr(objective, "predict_logp_grad", lambda *_: None)
        predicted = False
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


PEAK = """
import json, random, sys
from pathlib import Path
from transformers import Qwen3Config, Qwen3ForCausalLM
from rft.batch import Batch, Completion, Group, Prompt
from rft.learner.learner import Learner
from tests.test_learner import spec

def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024

dice = random.Random(0)
tokens = lambda n: tuple(dice.randrange(4000) for _ in range(n))

def batch(rows):
    made = {"logps": (-1.0,) * rows, "versions": ((0, 0, rows),)}
    sample = lambda i: Completion(tokens(rows), reward=float(i), **made)
    return Batch.build([Group(Prompt(0, tokens(4), ""), (sample(0), sample(1)))], share_prefix=True)

def peak(vocabulary):
    config = Qwen3Config(vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)
    folder = f"{sys.argv[1]}/{vocabulary}"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    learner = Learner(spec(folder))
    learner.step(batch(8), 0)  # the optimizer's moments exist, threads and libraries are up
    parameters = sum(p.nbytes for p in learner.policy.trained())
    Path("/proc/self/clear_refs").write_text("5")
    held = status("VmRSS")
    learner.step(batch(512), 1)
    return status("VmHWM") - held - parameters  # beyond weights, moments and gradient

print(json.dumps([peak(4096), peak(262_144)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_steps_memory_does_not_grow_with_the_vocabulary(tmp_path: Path) -> None:
    """1,024 tokens x 262,144 logits are 1,074 MB in float32. What a step takes beyond parameters,
    gradients and the optimizer's state may grow by its logits chunk of at least 64 rows only."""
    # freed memory must go back to the system at once, or the next allocation hides in it
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    small, large = json.loads(done.stdout.splitlines()[-1])
    assert small > 0 and large - small < 150e6, (small, large)
