"""Format, matching, length, boxes and instructions: hand-computed values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rft.rewards import BUILTINS, load_reward
from rft.rewards.load import SpecError


def one(spec: str, completion: Any, *, options: dict[str, Any] | None = None, **columns: Any) -> float | None:
    reward = load_reward(spec, **(options or {}))
    value: float | None = reward(
        prompts=["p"], completions=[completion], **{k: [v] for k, v in columns.items()}
    )[0]
    return value


def outcome(spec: str, completion: Any, *, options: dict[str, Any] | None = None, **columns: Any) -> str:
    reward: Any = load_reward(spec, **(options or {}))
    return str(reward.score(["p"], [completion], **{k: [v] for k, v in columns.items()})[0].outcome)


def test_tags() -> None:
    assert one("format", "<think>a</think>\n<answer>b</answer>") == 1.0
    assert one("format", "a</think> <answer>b</answer>") == 1.0  # the template opened <think>
    assert one("format", "<think>a</think> so <answer>b</answer>") == 0.0
    assert one("format", "<think></think><answer>b</answer>") == 0.0
    assert one("format", "<think>a</think><answer>b</answer><answer>c</answer>") == 0.0
    assert one("format", "<think>a</think>", options={"partial": True}) == 0.5
    assert one("format", "<a>x</a>", options={"tags": ["a"]}) == 1.0


def test_regex() -> None:
    assert one("regex", "ends in 5", options={"pattern": r"\d$"}) == 1.0
    assert one("regex", "x5", options={"pattern": r"\d", "full": True}) == 0.0


def test_json_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert one("json_schema", '{"n": 1}', schema=schema) == 1.0
    assert one("json_schema", 'text\n```json\n{"n": 1}\n```', schema=json.dumps(schema)) == 1.0
    assert one("json_schema", '{"n": "1"}', schema=schema) == 0.0
    assert outcome("json_schema", "{n: 1}", schema=schema) == "unparseable"
    assert one("json_schema", "[1]", options={"default_schema": {"type": "array"}}) == 1.0


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("(B)", 1.0),
        ("B", 1.0),
        ("The answer is B.", 1.0),
        (r"\boxed{\text{(B)}}", 1.0),
        ("C", 0.0),
        ("A or B", 0.0),
    ],
)
def test_choice(completion: str, value: float) -> None:
    assert one("choice", completion, answer="B") == value


def test_matching() -> None:
    assert one("exact_match", " yes ", answer="yes") == 1.0
    assert one("exact_match", "Yes", answer="yes") == 0.0
    assert one("exact_match", [{"role": "assistant", "content": "yes"}], answer="yes") == 1.0
    assert (
        one("class_label", "<think>hm</think><answer>Golden retriever.</answer>", answer="golden retriever")
        == 1.0
    )
    assert one("class_label", "<answer>retriever</answer>", answer="golden retriever") == 0.0
    assert one("f1", "the cat sat", answer="the cat ran") == pytest.approx(2 / 3)
    assert one("rouge_l", "a b c d", answer="a x c d") == pytest.approx(0.75)
    assert one("rouge_l", "", answer="a") == 0.0


def test_length_and_repetition() -> None:
    def over(n: int) -> float | None:
        return one("overlong", "", num_tokens=n, options={"max_length": 100, "cache": 20})

    assert [over(n) for n in (50, 80, 90, 100, 130)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert one("length", "", num_tokens=15, options={"target": 10}) == -0.5
    assert one("length", "one two", options={"target": 2}) == 0.0
    assert one("repetition", "a b c d e") == 0.0
    assert one("repetition", "a b a b a b", options={"n": 2}) == pytest.approx(-3 / 5)
    assert one("not_truncated", "x", truncated=True) == -1.0
    assert one("not_truncated", "x", truncated=False) == 0.0


def test_boxes() -> None:
    assert one("iou", "<answer>[0, 0, 10, 10]</answer>", boxes=[0, 0, 10, 10]) == 1.0
    assert one("iou", "[0, 0, 10, 10]", boxes=[[5, 0, 15, 10]]) == pytest.approx(1 / 3)
    assert one("iou", "[0,0,10,10] [50,50,60,60]", boxes=[[0, 0, 10, 10]]) == 0.5
    assert (
        one("iou", "[0,0,10,10]", boxes=[[0, 0, 10, 10], [9, 9, 20, 20]], options={"mode": "threshold"})
        == 0.5
    )
    assert outcome("iou", "nothing", boxes=[[0, 0, 1, 1]]) == "unparseable"


INSTRUCTIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["sun"]}, "The Sun.", "The moon."),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a b a", "a b"),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, "another", "no way"),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
        "z",
        "zz",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", "a b c"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "One. Two!",
        "One.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "a\n\nSo it is",
        "so\n\nit is",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "hi [name]", "hi name"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\nP.S. y", "x"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "an *idea*", "an idea"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nx\nSection 2",
        "Section 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a}"),
    ("detectable_format:title", {}, "<<A title>>\nx", "A title"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("change_case:english_capital", {}, "LOUD 1", "Loud"),
    ("change_case:english_lowercase", {}, "quiet", "Quiet"),
    ("change_case:capital_word_frequency", {"capital_frequency": 1}, "a BIG one", "a big one"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("startend:end_checker", {"end_phrase": "The end."}, "x. the end.", "the end. x"),
    ("startend:quotation", {}, '"x"', "x"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, "Say hi\nhi", "hi"),
    ("combination:two_responses", {}, "a\n******\nb", "a"),
]


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), INSTRUCTIONS)
def test_instructions(name: str, kwargs: dict[str, Any], good: str, bad: str) -> None:
    columns = {"instruction_id_list": [name], "kwargs": [{**kwargs, "unused": None}]}
    assert one("instructions", good, **columns) == 1.0
    assert one("instructions", bad, **columns) == 0.0


def test_instructions_by_fraction_and_unknown_names() -> None:
    columns = {
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, {}],
    }
    assert one("instructions", "Up", options={"scoring": "fraction"}, **columns) == 0.5
    with pytest.raises(RuntimeError, match="did you mean 'punctuation:no_comma'"):
        one("instructions", "x", instruction_id_list=["punctuation:no_coma"], kwargs=[{}])


def test_every_builtin_resolves() -> None:
    from rft.rewards.load import builtin

    for name in BUILTINS:
        assert builtin(name).__doc__, name


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("mth", {}, "did you mean 'math'"),
        ("math", {"tolerence": 1}, "no option 'tolerence'"),
        ("math", {"extraction": ["box"]}, "'extraction'"),
        ("regex", {}, "needs the option 'pattern'"),
        ("nowhere.py:f", {}, "no file"),
        ("no_such_module:f", {}, "no module 'no_such_module'"),
        ("reward.py", {}, "a file needs the function's name"),
        ("json:dump_it", {}, "has no function or class 'dump_it' (did you mean 'dump"),
    ],
)
def test_mistakes_are_named(spec: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_reward(spec, **options)
    assert words in str(caught.value)
