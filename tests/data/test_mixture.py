"""Mixtures of sources: rates, order, resume, and what each mistake is answered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rft.config.data import DataConfig
from rft.config.facts import Facts
from rft.config.load import load_config, parse_config
from rft.config.mixture import COLUMN, rate_at
from rft.config.schema import Config
from rft.config.validate import mixture_checks
from rft.data import DataError, GroupSampler, has_held_out, load_groups, load_prompts
from rft.data.errors import locate
from rft.data.mixture import MixtureSampler, mixture_lines, mixture_sampler
from rft.errors import ConfigError
from rft.plan import make_plan


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    add = [{"prompt": f"{i}+1=", "answer": str(i + 1), "completion": str(i + 1)} for i in range(6)]
    talk = [{"q": f"Say {i}", "completion": f"{i}!"} for i in range(18)]
    return {"add": write(tmp_path / "add.jsonl", add), "talk": write(tmp_path / "talk.jsonl", talk)}


def mixture(files: dict[str, str], **changes: Any) -> DataConfig:
    """changes: of `data`, and of a source if the value is a dict under its name."""
    sources = {
        "talk": {"path": files["talk"], "columns": {"prompt": "q"}, "template": "<{prompt}>"},
        "add": {"path": files["add"], "system": "Only the number."},
    }
    for name in sources:
        sources[name] |= changes.pop(name, {})
    return DataConfig.model_validate({"mixture": sources, "chat_template": "never", **changes})


def sampler_of(config: DataConfig, tokenizer: Any, draws: int = 40) -> MixtureSampler:
    sampler = mixture_sampler(config, load_prompts(config, tokenizer).prompts, 7, draws)
    assert sampler is not None
    return sampler


def names(sampler: MixtureSampler, k: int) -> list[str]:
    return [sampler._source_of[index] for index in sampler.next(k)]


def test_each_source_is_read_by_its_own_keys(files: dict[str, str], plain: Any) -> None:
    prompts = load_prompts(mixture(files), plain)
    assert [p.columns[COLUMN] for p in prompts.prompts] == ["add"] * 6 + ["talk"] * 18
    assert prompts.prompts[6].text == "<Say 0>"
    assert plain.decode(list(prompts.prompts[0].tokens)) == "Only the number.\n\n0+1="
    assert plain.decode(list(prompts.prompts[6].tokens)) == "<Say 0>"
    assert len({p.id for p in prompts.prompts}) == 24
    assert locate(prompts.source, prompts.prompts[6].id + 1) == (files["talk"], 1)
    assert str(prompts).startswith(f"24 prompts from 6 of add ({files['add']}), 18 of talk")
    groups = load_groups(mixture(files), plain)
    assert [g.prompt.id for g in groups] == [p.id for p in prompts.prompts]


def test_proportional_and_temperature_rates(files: dict[str, str], plain: Any) -> None:
    assert sampler_of(mixture(files), plain).rates(0) == {"add": 0.25, "talk": 0.75}
    cooler = mixture(files, mixing="temperature", mixing_temperature=2.0)
    share = 6**0.5 / (6**0.5 + 18**0.5)
    assert sampler_of(cooler, plain).rates(0)["add"] == pytest.approx(share, rel=1e-12)


def test_counts_follow_fixed_rates_in_every_part_of_the_run(files: dict[str, str], plain: Any) -> None:
    sampler = sampler_of(mixture(files, add={"rate": 3}, talk={"rate": 1}), plain)
    drawn = names(sampler, 40)
    assert all(abs(drawn[:n].count("add") - 0.75 * n) <= 1 for n in range(41))
    assert drawn.count("add") == 30
    metrics = sampler.metrics()
    assert metrics["data/add/rows"] == 30
    assert metrics["data/add/share"] == 0.75
    assert metrics["data/add/epoch"] == 5
    assert metrics["data/talk/epoch"] == pytest.approx(10 / 18)


def test_a_source_is_drawn_without_replacement_in_each_epoch(files: dict[str, str], plain: Any) -> None:
    sampler = sampler_of(mixture(files, add={"rate": 1}, talk={"rate": 1}), plain)
    drawn = sampler.next(36)
    added = [i for i in drawn if i < 6]
    assert [sorted(added[n : n + 6]) for n in (0, 6, 12)] == [list(range(6))] * 3
    assert sorted(i for i in drawn if i >= 6) == list(range(6, 24))
    assert len({tuple(added[n : n + 6]) for n in (0, 6, 12)}) > 1  # another order in each epoch


def test_stages_and_schedules_change_the_rates_over_the_run(files: dict[str, str], plain: Any) -> None:
    staged = mixture(files, add={"rate": [[0, 1], [0.5, 0.25]]}, talk={"rate": [[0, 0], [0.5, 0.75]]})
    drawn = names(sampler_of(staged, plain, draws=40), 40)
    assert drawn[:20] == ["add"] * 20
    assert drawn[20:].count("talk") == 15
    assert mixture_lines(staged, sampler_of(staged, plain))[1] == (
        "talk: 0.0% -> 75.0% -> 75.0% of the rows drawn, from 18 rows"
    )
    schedule = {"start": 1.0, "end": 0.0}
    linear = mixture(files, add={"rate": schedule}, talk={"rate": 1.0})
    assert sampler_of(linear, plain).rates(0.5)["add"] == pytest.approx(1 / 3)
    rate = linear.mixture["add"].rate
    assert rate is not None
    assert rate_at(rate, 0.75) == 0.25


def test_a_source_ends_after_its_epochs(files: dict[str, str], plain: Any) -> None:
    sampler = sampler_of(mixture(files, add={"epochs": 1.5}), plain)
    assert names(sampler, 60).count("add") == 9
    both = sampler_of(mixture(files, add={"epochs": 1}, talk={"epochs": 1}), plain, draws=24)
    both.check()
    assert sorted(both.next(24)) == list(range(24))
    more = both.next(24)  # online, in place of dropped groups: as without `epochs`
    assert sum(index < 6 for index in more) == 6
    assert both.metrics()["data/add/epoch"] == 2


def test_a_mixture_that_ends_before_the_run_is_refused_before_it(files: dict[str, str], plain: Any) -> None:
    short = mixture(files, add={"epochs": 1}, talk={"epochs": 1})
    with pytest.raises(DataError, match=r"used up after 24 of the 25 rows of train.steps x train.batch_size"):
        sampler_of(short, plain, draws=25).check()
    # Enough rows in all, but `talk` alone has to fill the second half.
    stages = {"add": {"rate": [[0, 1], [0.5, 0]]}, "talk": {"rate": [[0, 0], [0.5, 1]], "epochs": 1}}
    sampler_of(mixture(files, **stages), plain, draws=36).check()
    with pytest.raises(DataError, match="used up after 37 of the 38 rows"):
        sampler_of(mixture(files, **stages), plain, draws=38).check()


def test_a_plan_bounds_the_rows_of_a_mixture(
    files: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    both = {name: {"path": path, "epochs": 1} for name, path in files.items()}
    both["talk"]["columns"] = {"prompt": "q"}
    raw = {
        "output_dir": str(tmp_path),
        "model": {"path": str(tiny_folder)},
        "data": {"mixture": both},
        "algorithm": "sft",
        "train": {"steps": 7, "batch_size": 4},
        "eval": {"every": 0},
    }
    with pytest.raises(ConfigError, match=r"data: all sources .* after 24 of the 28 rows"):
        make_plan(parse_config(raw))
    make_plan(parse_config({**raw, "train": {"steps": 6, "batch_size": 4}}))
    stage = {"data": raw["data"], "steps": 7, "batch_size": 4, "cache": str(tmp_path / "cache")}
    online = {"algorithm": "grpo", "data": {"kind": "sums"}, "rewards": ["math"], "warm_start": stage}
    with pytest.raises(ConfigError, match=r"warm_start.data: all sources .* rows of warm_start.steps"):
        make_plan(parse_config({**raw, **online}))


@pytest.mark.parametrize("cut", [1, 13, 39])
def test_a_resumed_order_is_the_order(files: dict[str, str], plain: Any, cut: int) -> None:
    config = mixture(files, add={"rate": {"start": 1, "end": 0.2}}, talk={"rate": 0.3, "epochs": 1})
    whole = sampler_of(config, plain)
    first = whole.next(cut)
    state = json.loads(json.dumps(whole.state_dict()))
    rest = whole.next(40 - cut)
    resumed = sampler_of(config, plain)
    resumed.load_state_dict(state)
    assert resumed.next(40 - cut) == rest
    assert first + rest == sampler_of(config, plain).next(40)
    assert resumed.metrics() == whole.metrics()


def test_another_mixture_is_not_resumed(files: dict[str, str], plain: Any) -> None:
    state = sampler_of(mixture(files), plain).state_dict()
    del state["sources"]["add"]
    with pytest.raises(DataError, match="made with the sources talk, this run has add, talk"):
        sampler_of(mixture(files), plain).load_state_dict(state)
    state = sampler_of(mixture(files, add={"limit": 3}), plain).state_dict()
    with pytest.raises(DataError, match=r"mixture.add: .*size=3, this run has size=6"):
        sampler_of(mixture(files), plain).load_state_dict(state)


def test_groups_count_the_tokens_of_their_source(files: dict[str, str], plain: Any) -> None:
    config = mixture(files, add={"rate": 1}, talk={"rate": 1})
    groups = load_groups(config, plain).groups
    source = GroupSampler(groups, sampler=mixture_sampler(config, [g.prompt for g in groups], 0, 8))
    drawn = source.next(8)
    tokens = sum(len(g.completions[0].tokens) for g in drawn if g.prompt.columns[COLUMN] == "add")
    metrics = source.metrics()
    assert metrics["data/add/tokens"] == tokens
    assert metrics["data/epoch"] == 8 / 24
    again = GroupSampler(groups, sampler=mixture_sampler(config, [g.prompt for g in groups], 0, 8))
    again.load_state_dict(source.state_dict())
    assert again.metrics() == metrics


def test_held_out_rows_of_the_sources_alternate(files: dict[str, str], plain: Any) -> None:
    assert not has_held_out(mixture(files))
    with pytest.raises(DataError, match="no source of `mixture` has evaluation rows"):
        load_prompts(mixture(files), plain, "test")
    config = mixture(files, add={"holdout": 2}, talk={"holdout": 3})
    held_out = load_prompts(config, plain, "test").prompts
    assert [p.columns[COLUMN] for p in held_out] == ["add", "talk", "add", "talk", "talk"]
    assert len(load_prompts(config, plain)) == 19
    few = config.model_copy(update={"limit": 3, "mixture": {**config.mixture}})
    assert len(load_prompts(few, plain)) == 6


async def play(row: dict[str, Any], session: Any) -> float:
    return 0.0


BAD = [
    ({"add": {"rate": 0}, "talk": {"rate": 0}}, r"rates of all sources are 0 at progress 0"),
    ({"add": {"rate": [[0, 1], [0.5, 0]]}, "talk": {"rate": 0}}, r"are 0 at progress 0\.5"),
    ({"add": {"rate": 1}}, r"no rate for talk: give every source one"),
    ({"add": {"rate": -1}, "talk": {"rate": 1}}, "must not be negative"),
    ({"add": {"rate": [[0.5, 1]]}, "talk": {"rate": 1}}, "stages are"),
    ({"add": {"rate": "much"}, "talk": {"rate": 1}}, "write a number, a schedule"),
    ({"add": {"rate": {"start": 1}}, "talk": {"rate": 1}}, "not a schedule: end: Field required"),
    ({"add": {"rate": 1}, "talk": {"rate": 1}, "mixing": "proportional"}, "leave out the rate of talk, add"),
    ({"add": {"environment": {"kind": "klass"}}}, "input should be|Input should be"),
    ({"add": {"environment": {"kind": "function", "path": play}}}, "play was passed as an object"),
    ({"add": {"wieght": 1}}, "wieght"),
    ({"path": "x.jsonl"}, "`path` does not apply to `kind: mixture`"),
    ({"streaming": True}, "`streaming` does not apply"),
    ({"add": {"holdout": 1, "task": "chain_sum"}}, r"`mixture.add`: `task` does not apply"),
    ({"mixture": {"a.b": {"path": "x.jsonl"}}}, "letters, digits"),
    ({"mixture": {"mean": {"path": "x.jsonl"}}}, "choose another name"),
    ({"mixture": {"A": {"path": "x.jsonl"}, "a": {"path": "x.jsonl"}}}, "A and a differ only in case"),
    ({"mixture": {}, "kind": "mixture"}, "needs `mixture"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_mistakes_in_the_config(files: dict[str, str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        mixture(files, **changes)
    assert len(caught.value.errors()) == 1  # type: ignore[attr-defined]


def test_an_empty_source_is_named(files: dict[str, str], tmp_path: Path, plain: Any) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"mixture.add: .*empty.jsonl: the dataset is empty"):
        load_prompts(mixture(files, add={"path": empty}), plain)


def test_a_column_of_the_reserved_name_is_refused(files: dict[str, str], tmp_path: Path, plain: Any) -> None:
    rows = [{"prompt": "a", COLUMN: "b"}]
    with pytest.raises(DataError, match=f"row 1, column '{COLUMN}'"):
        load_prompts(mixture(files, add={"path": write(tmp_path / "c.jsonl", rows)}), plain)


def run_config(files: dict[str, str], **changes: Any) -> Config:
    raw = {"algorithm": "grpo", "data": mixture(files, **changes.pop("data", {})).model_dump(), **changes}
    return parse_config(raw)


FACTS = Facts("cpu", "hf", True, frozenset(), 0, frozenset({0}), 1)
TWO = [{"function": "math"}, {"function": "length"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"add": {"rewards": ["math", "maths"]}}}, r"data.mixture.add.rewards: maths is not among"),
        ({"data": {"add": {"rewards": ["math"]}, "talk": {"rewards": ["math"]}}}, "length scores no"),
        ({"rewards": [{"function": "math", "name": "add"}]}, r"data.mixture.add: a reward has this name too"),
        ({"train": {"curriculum": {}}}, "train.curriculum"),
        (
            {"warm_start": {"data": {"mixture": {"a": {"path": "a", "environment": {"kind": "tools"}}}}}},
            r"warm_start.data.mixture.a.environment: only rows of `data` are played",
        ),
        (
            {"rewards": {"functions": TWO, "combine": "vector", "direction": [1, 1]},
             "data": {"add": {"rewards": ["math"]}}},
            "combine: vector needs every reward",
        ),
    ],
)  # fmt: skip
def test_mistakes_across_sections(files: dict[str, str], changes: dict[str, Any], message: str) -> None:
    config = run_config(files, **{"rewards": TWO, **changes})
    found = [text for wrong, text in mixture_checks(config, FACTS) if wrong]
    assert len(found) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found[0])


def test_yaml_and_overrides(files: dict[str, str], tmp_path: Path) -> None:
    stages = {"rate": [[0, 1], [0.5, 0.25]]}
    config = run_config(files, data={"add": stages, "talk": {"rate": {"start": 1, "end": 0.5}}})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(file) == config
    changed = load_config(file, ["data.mixture.talk.rate=0.3", "data.mixture.add.epochs=2"])
    assert changed.data.mixture["talk"].rate == 0.3
    assert changed.data.mixture["add"].epochs == 2
    with pytest.raises(ConfigError, match=r"data.mixture.talk.rat: unknown key.*rate"):
        load_config(file, ["data.mixture.talk.rat=0.3"])
