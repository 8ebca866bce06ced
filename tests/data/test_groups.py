"""Offline groups: which tokens have a loss, how prompts are found, and what each bad row is answered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rft.batch import Batch, Group
from rft.config.data import DataConfig
from rft.data import DataError, GroupSet, load_groups, load_prompts
from tests.data.conftest import MARKED_TEMPLATE, SHIFTING_TEMPLATE, THINKING_TEMPLATE, make_tokenizer

SYSTEM = {"role": "system", "content": "Add."}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TURNS = [said("user", "1+1?"), said("assistant", "two"), said("user", "2+2?"), said("assistant", "four")]


def groups(path: Path, rows: list[Any], tokenizer: Any, kind: Any = "sft", **changes: Any) -> GroupSet:
    file = path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return load_groups(DataConfig(path=str(file), **changes), tokenizer, kind)


def trained_text(group: Group, tokenizer: Any, index: int = 0) -> list[str]:
    """The text of each run of tokens that has a loss."""
    c = group.completions[index]
    runs: list[list[int]] = []
    for i, token in enumerate(c.tokens):
        if c.mask is None or c.mask[i]:
            runs.append([]) if not runs or (i and c.mask is not None and not c.mask[i - 1]) else None
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def whole_text(group: Group, tokenizer: Any, index: int = 0) -> str:
    return str(tokenizer.decode([*group.prompt.tokens, *group.completions[index].tokens]))


# -- demonstrations --------------------------------------------------------------------------------


def test_plain_text_ends_with_the_end_token(tmp_path: Path, plain: Any) -> None:
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2<|end|>"}]
    one, two = groups(tmp_path, rows, plain)
    assert plain.decode(one.prompt.tokens) == "1+1="
    assert one.completions[0].tokens == two.completions[0].tokens
    assert trained_text(one, plain) == ["2<|end|>"]
    assert one.completions[0].reward == 1.0 and one.completions[0].finish == "demonstration"


@pytest.mark.parametrize("template", ["plain", "marked", "thinking"])
def test_only_what_the_assistant_wrote_has_a_loss(tmp_path: Path, template: str) -> None:
    source = {"plain": None, "marked": MARKED_TEMPLATE, "thinking": THINKING_TEMPLATE}[template]
    tokenizer = make_tokenizer(source) if source else make_tokenizer(DEFAULT)
    (group,) = groups(tmp_path, [{"messages": TURNS}], tokenizer)
    thought = "<think>\n\n</think>\n\n" if template == "thinking" else ""
    assert trained_text(group, tokenizer) == ["two<|end|>", f"{thought}four<|end|>"]
    assert tokenizer.decode(group.prompt.tokens) == "<|user|>\n1+1?<|end|>\n<|assistant|>\n"
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert whole_text(group, tokenizer) == rendered.removesuffix("\n")
    (last,) = groups(tmp_path, [{"messages": TURNS}], tokenizer, train_on="last")
    assert trained_text(last, tokenizer) == [f"{thought}four<|end|>"]
    assert whole_text(last, tokenizer) == whole_text(group, tokenizer)


DEFAULT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def test_a_prompt_is_tokenised_as_at_generation_time(tmp_path: Path, chat: Any) -> None:
    (group,) = groups(tmp_path, [{"prompt": "1+1?", "completion": "two"}], chat, system="Add.")
    expected = chat.apply_chat_template(
        [SYSTEM, said("user", "1+1?")], add_generation_prompt=True, tokenize=False
    )
    assert list(group.prompt.tokens) == chat(expected, add_special_tokens=False)["input_ids"]
    assert trained_text(group, chat) == ["two<|end|>"]


def test_a_template_that_shifts_is_an_error_not_a_guess(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)1 row \(1\): the text before assistant turn"):
        groups(tmp_path, [{"messages": TURNS}], make_tokenizer(SHIFTING_TEMPLATE))


def test_a_template_that_closes_no_turn_gets_an_end_token(tmp_path: Path) -> None:
    bare = make_tokenizer("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    (group,) = groups(tmp_path, [{"prompt": "1+1?", "completion": "two"}], bare)
    assert trained_text(group, bare)[0].replace(" ", "") == "two<|end|>"


# -- preferences -----------------------------------------------------------------------------------


def test_pairs_share_their_prompt_tokens(tmp_path: Path, chat: Any) -> None:
    row = {"prompt": "1+1?", "chosen": "two", "rejected": "three", "margin": 2}
    (group,) = groups(tmp_path, [row], chat, "preference", numbers=("margin",))
    assert [c.reward for c in group.completions] == [1.0, 0.0]
    batch = Batch.build([group], share_prefix=True)
    assert [p.tolist() for p in batch.pairs()] == [[0], [1]]
    assert batch.columns["margin"].tolist() == [2.0, 2.0]
    assert trained_text(group, chat, 1) == ["three<|end|>"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: 1+1?\nA: two", "Q: 1+1?\nA: three", "Q: 1+1?\nA:"),
        ("The answer is 12", "The answer is 13", "The answer is"),  # no word is split
        ("Q\n\nyes", "Q\n\nno", "Q\n\n"),
        ("one two", "one two three", "one two"),
    ],
)
def test_an_implicit_prompt_is_the_common_beginning(
    tmp_path: Path, plain: Any, chosen: str, rejected: str, prompt: str
) -> None:
    rows = [{"chosen": chosen + " x", "rejected": rejected}]
    (group,) = groups(tmp_path, rows, plain, "preference")
    assert group.prompt.text == prompt
    assert whole_text(group, plain, 1) == rejected + "<|end|>"


def test_an_implicit_prompt_of_messages(tmp_path: Path, chat: Any) -> None:
    rows = [{"chosen": TURNS, "rejected": [*TURNS[:3], said("assistant", "five")], "prompt": "1+1?"}]
    (group,) = groups(tmp_path, rows, chat, "preference")
    assert group.prompt.text == TURNS[:3]
    assert trained_text(group, chat, 0) == ["four<|end|>"]
    assert trained_text(group, chat, 1) == ["five<|end|>"]


# -- other kinds -----------------------------------------------------------------------------------


def test_labelled_ranked_scored_and_stepwise_rows(tmp_path: Path, plain: Any) -> None:
    (kto,) = groups(tmp_path, [{"prompt": "a ", "completion": "b", "label": False}], plain, "unpaired")
    assert kto.completions[0].reward == 0.0
    (ranked,) = groups(tmp_path, [{"prompt": "a ", "completions": ["x", "y", "z"]}], plain, "ranked")
    assert [c.reward for c in ranked.completions] == [2.0, 1.0, 0.0]
    row = {"prompt": "a ", "completions": ["x", "y"], "scores": [0.5, 3]}
    assert [c.reward for c in groups(tmp_path, [row], plain, "ranked")[0].completions] == [0.5, 3.0]
    (scored,) = groups(tmp_path, [{"prompt": "a ", "completion": "b", "score": [1, None]}], plain, "scored")
    targets = Batch.build([scored]).columns["targets"]
    assert targets[0, 0] == 1 and targets[0, 1].isnan()
    row = {"prompt": "a ", "completions": ["one two", "three"], "labels": [True, False]}
    (steps,) = groups(tmp_path, [row], plain, "steps")
    mask = steps.completions[0].mask
    assert mask is not None and sum(mask) == 2 and mask[-1]
    assert plain.decode(steps.completions[0].tokens[: mask.index(True) + 1]) == "one two\n"
    assert Batch.build([steps]).columns["step_labels"][0, :2].tolist() == [1.0, 0.0]


def test_sources_set_the_weight_and_the_prefix(tmp_path: Path, plain: Any) -> None:
    sources = {"gpt": {"weight": 1.0, "prefix": "expert "}, "crowd": {"weight": 0.1, "prefix": ""}}
    rows = [{"prompt": "a", "completion": "b", "source": s} for s in ("gpt", "crowd")]
    gpt, crowd = groups(tmp_path, rows, plain, sources=sources)
    assert plain.decode(gpt.prompt.tokens) == "expert a"
    assert [dict(g.completions[0].values) for g in (gpt, crowd)] == [{"weight": 1.0}, {"weight": 0.1}]
    with pytest.raises(
        DataError, match=r"row 1, column 'source': 'web' is not among `sources` \(gpt, crowd\)"
    ):
        groups(tmp_path, [{**rows[0], "source": "web"}], plain, sources=sources)


# -- limits ----------------------------------------------------------------------------------------

LONG = [{"prompt": "a ", "completion": "b"}, {"prompt": "a ", "completion": "1234567890" * 5}]


def test_overlong_rows_are_rejected_skipped_or_cut(tmp_path: Path, plain: Any) -> None:
    with pytest.raises(DataError, match=r"1 row \(2\): prompt and completion are longer than max_length=12"):
        groups(tmp_path, LONG, plain, max_length=12)
    kept = groups(tmp_path, LONG, plain, max_length=12, overlong="skip")
    assert len(kept) == 1 and sum(kept.skipped.values()) == 1
    both = groups(tmp_path, LONG, plain, max_length=12, overlong="truncate")
    assert len(both) == 2 and both.truncated == 1 and "1 completions cut" in str(both)
    assert both[1].completions[0].finish == "length"
    assert len(both[1].prompt.tokens) + len(both[1].completions[0].tokens) == 12
    assert Batch.build(list(both)).truncated.tolist() == [False, True]  # type: ignore[union-attr]


def test_a_cut_that_leaves_nothing_to_learn_is_counted(tmp_path: Path, plain: Any) -> None:
    pair = {"prompt": "a ", "chosen": "1111112", "rejected": "1111113"}
    keep = {"prompt": "a ", "chosen": "1", "rejected": "2"}
    kept = groups(tmp_path, [pair, keep], plain, "preference", max_length=6, overlong="truncate")
    assert (
        kept.skipped == {"two responses are equal after they were cut to max_length": 1}
        and kept.truncated == 0
    )
    with pytest.raises(DataError, match="no row is left"):
        groups(tmp_path, [pair], plain, "preference", max_length=2, overlong="truncate")


# -- bad input -------------------------------------------------------------------------------------


def test_bad_rows_come_in_one_message_with_their_numbers(tmp_path: Path, plain: Any) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [good, {**good, "rejected": "a"}, good, {**good, "chosen": " "}, {**good, "rejected": "a"}]
    with pytest.raises(DataError) as caught:
        groups(tmp_path, rows, plain, "preference")
    text = str(caught.value)
    assert "train.jsonl" in text and "3 bad rows" in text and "bad_rows: skip" in text
    assert "2 rows (2, 5): `chosen` and `rejected` are equal" in text
    assert "1 row (4): a response is empty" in text
    assert caught.value.row == 2
    kept = groups(tmp_path, rows, plain, "preference", bad_rows="skip")
    assert len(kept) == 2 and sum(kept.skipped.values()) == 3


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("sft", {"prompt": "a", "completion": ""}, "a response is empty"),
        ("sft", {"prompt": "", "completion": "b"}, "the prompt is empty"),
        ("sft", {"prompt": "a", "completion": 3}, "must be a string or a list of"),
        ("sft", {"prompt": 3, "completion": "b"}, "`prompt` must be a string"),
        ("sft", {"prompt": "a", "answer": "b"}, "column 'completion': no such column"),
        ("sft", {"messages": TURNS}, "need a tokenizer with a chat template"),
        ("preference", {"prompt": "a", "chosen": "b"}, "column 'rejected': no such column"),
        ("preference", {"chosen": "b", "rejected": "c"}, "no common beginning"),
        ("preference", {"chosen": ["b"], "rejected": "c"}, "`chosen` must be a string or a list of"),
        ("unpaired", {"prompt": "a", "completion": "b", "label": "good"}, "must be true or false"),
        ("ranked", {"prompt": "a", "completions": ["b"]}, "at least two"),
        ("ranked", {"prompt": "a", "completions": ["b", "c"], "scores": [1]}, "2 `completions`, but 1"),
        ("ranked", {"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}, "nothing is preferred"),
        ("scored", {"prompt": "a", "completion": "b", "score": "x"}, "finite number"),
        ("scored", {"prompt": "a", "completion": "b", "score": [None]}, "is empty or has only NaN"),
        (
            "steps",
            {"prompt": "a", "completions": ["b"], "labels": []},
            "`completions` has 1 steps, so `labels` must be",
        ),
        ("steps", {"prompt": "a", "completions": ["b"] * 65, "labels": [1] * 65}, "more than 64 steps"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, plain: Any, kind: str, row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        groups(tmp_path, [row], plain, kind)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (TURNS[:1], "no assistant message"),
        (TURNS[1:], "begins with the assistant"),
        ([TURNS[0], said("assistant", "")], "a response is empty"),
        (
            [TURNS[0], {"role": "assistant", "content": None}],
            r"message 2 \(assistant\) of `messages` has no content",
        ),
        ("text", "must be a list of"),
    ],
)
def test_conversations_that_cannot_be_used(tmp_path: Path, chat: Any, messages: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        groups(tmp_path, [{"messages": messages}], chat)


def test_a_number_that_is_none(tmp_path: Path, plain: Any) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": None}
    with pytest.raises(DataError, match="`margin` must be a finite number"):
        groups(tmp_path, [row], plain, "preference", numbers=("margin",))


def test_a_pairwise_model_reads_both_orders(tmp_path: Path, chat: Any) -> None:
    (group,) = groups(tmp_path, [{"prompt": "1+1?", "chosen": "two", "rejected": "one"}], chat, "pairwise")
    assert [whole_text(group, chat, i) for i in range(2)] == [
        "1+1?\n\nCandidate A: two\n\nCandidate B: one<|end|>",
        "1+1?\n\nCandidate A: one\n\nCandidate B: two<|end|>",
    ]
    assert [trained_text(group, chat, i) for i in range(2)] == [["<|end|>"], ["<|end|>"]]
    assert [c.values["targets"] for c in group.completions] == [(1.0,), (0.0,)]
    with pytest.raises(DataError, match="must be strings"):
        groups(
            tmp_path, [{"prompt": [said("user", "1+1?")], "chosen": "a", "rejected": "b"}], chat, "pairwise"
        )


def test_judged_steps_do_not_pass_for_the_completions_that_a_reward_judges(chat: Any) -> None:
    config = DataConfig(kind="arithmetic_pairs", eval_limit=2)
    columns = load_prompts(config, chat, "test").prompts[0].columns
    assert {"answer", "completion", "labels"} <= set(columns)
    assert not {"prompt", "prompts", "completions"} & set(columns)


def test_evaluation_prompts_can_ask_for_one_class(tmp_path: Path, chat: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{i}", "source": "web"}) for i in range(4)))
    sources = {"web": {"prefix": "W: "}, "book": {"prefix": "B: "}}
    config = DataConfig(path=str(file), holdout=2, sources=sources, eval_source="book", chat_template="never")
    assert {p.text[:3] for p in load_prompts(config, chat, "train").prompts} == {"W: "}
    assert {p.text[:3] for p in load_prompts(config, chat, "test").prompts} == {"B: "}
    with pytest.raises(ValidationError, match="`eval_source: film` is not among `sources`"):
        DataConfig(path=str(file), sources=sources, eval_source="film")
