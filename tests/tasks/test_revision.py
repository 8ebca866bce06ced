"""The revision that keys cached warm starts and tiny models changes where what they are made from does."""

from pathlib import Path

from safetensors import safe_open
from transformers import AutoTokenizer

from rft.tasks import REVISION, TASKS, Arithmetic, Guess, Sums
from rft.tasks.tiny import CHAT_TEMPLATE, build_tiny, build_tokenizer
from rft.utils.hashing import json_digest

EXPECTED = {
    1: ("25db7e0f67ddd7d0", "3e085c23894088b5"),
    2: ("25db7e0f67ddd7d0", "a65724ca14c0f356"),  # the template shows tools
    3: ("2fbd3e7e7430f787", "19a08142cd25c381"),  # of tools only names; the tasks sums and guess
    4: ("48484fa56f5447ef", "691a1bc47dcf11bd"),  # guessed numbers are single tokens, and none is held out
}


def test_rows_and_tiny_models_are_those_of_the_revision(tmp_path: Path) -> None:
    styles = dict.fromkeys(("lines", "chain", "prose", "code", "direct"), 1)
    tasks = [TASKS[name]() for name in ("arithmetic", "arithmetic_hard", "arithmetic_pairs")]
    tasks += [Arithmetic(form="mixed", operators=["+", "-", "*"], styles=styles), Sums(), Guess()]
    rows = [list(task.rows(split, 300, seed=3)) for task in tasks for split in ("train", "test")]

    build_tiny(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    vocabulary = [AutoTokenizer.from_pretrained(tmp_path).get_vocab()]
    vocabulary += [build_tokenizer(task=task).get_vocab() for task in ("sums", "guess")]

    digests = (json_digest(rows)[:16], json_digest([shapes, vocabulary, CHAT_TEMPLATE])[:16])
    assert digests == EXPECTED[REVISION], "raise rft.tasks.REVISION, and note its digests here"
