"""What the proof of a push costs the learner: `python benchmarks/proof.py`.

The learner scores the fixed tokens and takes a step in turn, in one process on one thread, in seconds of
processor time; the share is the median of the rounds. The engines' part, the prefill of the fixed
tokens, overlaps with generation and is not counted.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.learner import LearnerConfig
from rft.config.rollout import SamplingConfig
from rft.config.schema import ModelConfig, TrainConfig
from rft.learner.learner import Learner
from rft.learner.spec import LearnerSpec
from rft.sync.proof import PROOF_TOKENS
from rft.tasks.tiny import build_tiny

sys.path.insert(0, str(Path(__file__).parent))
from common import clock, write_result
from shapes import SMOLLM2, Shape

# name: (shape of the model or None: the demo's, prompts, completions of each, tokens of a prompt, of a
# completion, rounds)
SIZES: dict[str, tuple[Shape | None, int, int, int, int, int]] = {
    "demo": (None, 32, 8, 40, 20, 9),
    "smollm2": (SMOLLM2, 8, 8, 99, 43, 2),
}


def measure(folder: Path, size: str) -> dict[str, Any]:
    """Seconds of scoring and of a step, and their ratio."""
    shape, prompts, each, asked, answered, rounds = SIZES[size]
    build_tiny(folder, seed=1)
    if shape is not None:  # with the tokenizer of the tiny model
        shape.build().save_pretrained(folder)
    dice = random.Random(1)
    tokens = lambda n: tuple(dice.randrange(6, 250) for _ in range(n))  # noqa: E731
    groups = [
        Group(
            Prompt(i, tokens(asked), ""),
            tuple(
                Completion(tokens(answered), logps=(-2.0,) * answered, reward=float(k % 2))
                for k in range(each)
            ),
        )
        for i in range(prompts)
    ]
    batch = Batch.build(groups, share_prefix=True)
    learner = Learner(
        LearnerSpec(
            algorithm=ALGORITHMS["grpo"](),
            model=ModelConfig(path=str(folder)),
            config=LearnerConfig(threads=1),
            train=TrainConfig(steps=100),
            sampling=SamplingConfig(max_completion_length=answered),
            device="cpu",
            seed=1,
        )
    )
    fixed, scores, steps = tokens(PROOF_TOKENS), [], []
    learner.step(batch, 0)
    by_tokens = {}
    for count in sorted({PROOF_TOKENS, 80, 96, 128, 192}):
        some = tokens(count)
        learner.score_tokens(some)
        begin = clock()
        for _ in range(2):
            learner.score_tokens(some)
        by_tokens[str(count)] = (clock() - begin) / 2
    learner.score_tokens(fixed)
    for round_ in range(rounds):
        begin = clock()
        learner.score_tokens(fixed)
        middle = clock()
        learner.step(batch, round_ + 1)
        scores.append(middle - begin)
        steps.append(clock() - middle)
    return {
        "size": size,
        "parameters": learner.parameters,
        "tokens_of_a_step": batch.num_tokens,
        "score_seconds": statistics.median(scores),
        "step_seconds": statistics.median(steps),
        "score_seconds_by_tokens": by_tokens,
        "share_of_the_learners_step": statistics.median(a / b for a, b in zip(scores, steps, strict=True)),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(Path(folder) / str(i), size) for i, size in enumerate(sys.argv[1:] or SIZES)]
    file = Path(__file__).parent / "results" / "proof-cpu.json"
    write_result(file, {"proof_tokens": PROOF_TOKENS, "runs": runs}, "torch", "transformers")


if __name__ == "__main__":
    main()
