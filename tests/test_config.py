"""The config tree: overrides, messages, round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rft.algorithms.policy_gradient.grpo import GRPO
from rft.config.load import apply_overrides, describe_fields, differences, load_config, parse_config
from rft.config.schema import Config
from rft.errors import ConfigError

EXAMPLES = Path(__file__).parent.parent / "examples"


def problems(raw: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return caught.value.problems


def test_every_problem_is_listed_at_once_with_the_nearest_right_key() -> None:
    found = problems(
        {
            "algorithm": {"name": "grpo", "btea": 1},
            "trian": {},
            "train": {"step": 3},
            "rewards": [{"function": "math", "wieght": 2}],
            "learner": {"learning_rate": "fast"},
        }
    )
    text = "\n".join(found)
    assert len(found) == 5
    assert "algorithm: grpo has no setting 'btea' (did you mean 'beta'?)" in text
    assert "trian: unknown key (did you mean 'train'?)" in text
    assert "train.step: unknown key (did you mean 'steps'?)" in text
    assert "rewards.functions.0.wieght: unknown key (did you mean 'weight'?)" in text
    assert "learner.learning_rate: input should be a valid number" in text


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "algorithm: required"),
        ({"algorithm": "grppo"}, "unknown algorithm 'grppo' (did you mean 'grpo'?)"),
        ({"algorithm": {"beta": 1}}, '"name" is missing'),
        (
            {"algorithm": {"name": "grpo", "epsilon": -1}},
            "algorithm.epsilon: input should be greater than or equal to 0",
        ),
        ({"algorithm": "grpo", "train": {"batch_size": 30, "minibatches": 4}}, "cannot be split into 4"),
        (
            {"algorithm": "grpo", "train": {"steps": 0}},
            "train.steps: input should be greater than or equal to 1",
        ),
        ({"algorithm": "grpo", "name": "a/b"}, "name: string should match pattern"),
        ({"algorithm": "grpo", "rollout": {"engine": "hf", "tensor_parallel": 2}}, "runs on one device"),
    ],
)
def test_messages_say_what_and_where(raw: dict, words: str) -> None:
    assert words in "\n".join(problems(raw))


def test_overrides_reach_into_sections_and_are_typed_by_yaml() -> None:
    raw = apply_overrides(
        {"algorithm": "grpo"}, ["algorithm.beta=0.5", "train.steps=7", "rollout.sampling.stop=[a, b]"]
    )
    config = parse_config(raw)
    assert isinstance(config.algorithm, GRPO) and config.algorithm.beta == 0.5
    assert config.train.steps == 7 and config.rollout.sampling.stop == ("a", "b")


@pytest.mark.parametrize("override", ["train.steps", "=3", "name.sub=1"])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        apply_overrides({"name": "x"}, [override])


def test_plain_data_round_trip_is_the_same_config() -> None:
    config = parse_config({"algorithm": {"name": "grpo", "beta": 0.1}, "rewards": [{"function": "math"}]})
    again = parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert again == config and differences(config.to_dict(), again.to_dict()) == []


def test_every_key_is_described() -> None:
    rows = list(describe_fields())
    assert len(rows) > 150
    assert [key for key, _, text in rows if not text] == []


def test_config_is_frozen() -> None:
    config = parse_config({"algorithm": "grpo"})
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_example_is_a_valid_config(path: Path) -> None:
    assert isinstance(load_config(path), Config)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "not valid YAML"), ("- 1", "must be a mapping"), (None, "No such file")]
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_a_config_is_laid_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "algorithm: {name: grpo, beta: 0.1}\nwarm_start: {steps: 7}\n"
        "train: {steps: 3, batch_size: 4}\nrewards: [{function: math}, {function: length}]\n"
    )
    (tmp_path / "more").mkdir()
    child = tmp_path / "more" / "child.yaml"
    child.write_text(
        "base: ../base.yaml\nname: child\nalgorithm: dr_grpo\ntrain: {steps: 5}\n"
        "warm_start: null\nrewards: [{function: math}]\n"
    )
    config = load_config(child, ["train.num_generations=2"])
    assert (config.name, config.train.steps, config.train.batch_size) == ("child", 5, 4)
    assert config.train.num_generations == 2 and config.warm_start is None
    assert [f.function for f in config.rewards.functions] == ["math"]
    assert config.to_dict()["algorithm"]["beta"] == 0  # an algorithm does not inherit another one's settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: child.yaml", "leads back to this file"),
        ("base: nowhere.yaml", "nowhere.yaml: No such file"),
        ("base: [a]", "base must be the path of one YAML file"),
    ],
)
def test_a_base_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "child.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "child.yaml")


def test_public_names_are_reached_from_their_packages() -> None:
    import rft.config
    import rft.rewards

    for package in (rft.config, rft.rewards):
        for name in package.__all__:
            assert getattr(package, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rft.config.nothing  # noqa: B018
