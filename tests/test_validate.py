"""Checks of the config are one list, and know nothing of the parts that they check for."""

import ast
from pathlib import Path

from rft.config import validate, validate_environment
from rft.config.learner import FROM_FIRST_BATCH, PLAIN_LORA
from rft.config.load import parse_config
from tests.specs import facts


def test_every_check_of_the_module_is_in_the_list() -> None:
    named = {name for name in vars(validate) if name.endswith("_checks") and not name.startswith("_")}
    assert named == {checks.__name__ for checks in validate.CHECKS}


def test_they_import_the_config_and_algorithms_alone() -> None:
    trees = [
        ast.parse(Path(m.__file__).read_text(encoding="utf-8")) for m in (validate, validate_environment)
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    ours = {module for module in modules if module.startswith("rft.")}
    assert all(module.startswith(("rft.config.", "rft.algorithms.", "rft.utils.")) for module in ours), ours


def test_all_problems_are_reported_at_once() -> None:
    config = parse_config(
        {
            "algorithm": "grpo",
            "train": {"num_generations": 1, "batch_size": 8},
            "learner": {"quantize": "nf4", "ranks": 2, "cores": "9"},
            "sync": {"transport": "ipc"},
        }
    )
    found = validate.problems(config, facts(rows=4, positions=100))
    for key in (
        "algorithm.grpo: GRPO compares",
        "algorithm.grpo: GRPO needs a reward",
        "rollout.sampling",
        "train.batch_size",
        "learner.cores: this machine has no core 9",
        "learner.quantize",
        "learner.ranks",
        "sync.transport: ipc needs rollout.engine vllm",
        "sync.transport: ipc needs a GPU",
    ):
        assert any(problem.startswith(key) for problem in found), (key, found)


def test_what_is_not_known_is_not_checked() -> None:
    config = parse_config({"algorithm": "luffy", "rewards": [{"function": "math"}]})
    assert validate.problems(config, facts(demonstrations=None, rows=None, positions=None)) == []


def test_methods_that_read_the_first_batch_are_those_that_are_made_of_it() -> None:
    from rft.learner.adapters.methods import DATA_DRIVEN

    assert set(FROM_FIRST_BATCH) == set(DATA_DRIVEN) <= PLAIN_LORA.keys()
