"""Chat data as people have it, through templates that behave like those of common families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rft.config.data import DataConfig
from rft.data import DataError, chat, load_groups, load_prompts
from rft.data.groups import common_text
from tests.cases.families import (
    CHATML,
    CLOSE,
    PLAIN_ROLES,
    PREFILL,
    PRINTS,
    QWEN3,
    R1,
    START,
    TOOLS,
    gemma_tokenizer,
    glm_tokenizer,
    make_tokenizer,
    phi_tokenizer,
)  # fmt: skip

CASES = Path(__file__).parent
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
HI = [{"role": "user", "content": "hi"}]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def write(tmp_path: Path, rows: list[Any]) -> str:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(file)


def trained(
    source: Path | list[Any], tokenizer: Any, tmp_path: Path, kind: Any = "sft", **config: Any
) -> tuple[str, list[str]]:
    """The first row as (prompt, response); what has a loss stands between « and »."""
    path = str(source) if isinstance(source, Path) else write(tmp_path, source)
    group = load_groups(DataConfig(path=path, **config), tokenizer, kind)[0]
    texts = []
    for c in group.completions:
        text, before = "", False
        for token, inside in zip(c.tokens, c.mask or [True] * len(c.tokens), strict=True):
            text += "«" if inside and not before else "»" if before and not inside else ""
            text, before = text + tokenizer.decode([token]), inside
        texts.append(text + "»" * before)
    return tokenizer.decode(group.prompt.tokens), texts


def prompts(rows: list[Any] | Path, tokenizer: Any, tmp_path: Path, **config: Any) -> list[str]:
    path = str(rows) if isinstance(rows, Path) else write(tmp_path, rows)
    return [
        tokenizer.decode(p.tokens) for p in load_prompts(DataConfig(path=path, **config), tokenizer).prompts
    ]


# -- content, keys and forms -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sft_parts_all", "sft_parts_user_only", "sft_sharegpt"])
@pytest.mark.parametrize("template", [CHATML, PRINTS])
def test_parts_and_sharegpt_are_read_as_text(case: str, template: str, tmp_path: Path) -> None:
    found = trained(CASES / f"{case}.jsonl", make_tokenizer(template), tmp_path)
    assert found == (PROMPT.format("hi"), ["«hello<|im_end|>»"])


def test_prompts_of_parts_are_read_as_text(tmp_path: Path) -> None:
    found = prompts(CASES / "grpo_parts.jsonl", make_tokenizer(PRINTS), tmp_path)
    assert found == [PROMPT.format("2+2?"), PROMPT.format("2+3?")]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "image": "a.png"}, "an image (image)"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "an image (image_url)"),
        ({"type": "input_audio", "input_audio": {}}, "an audio (input_audio)"),
        ({"type": "text", "text": 3}, "a part"),
        ({"type": "document"}, "a document"),
    ],
)
def test_other_media_are_refused_by_name_and_row(part: Any, words: str, tmp_path: Path) -> None:
    bad = said("user", [{"type": "text", "text": "see"}, part])
    rows = [{"messages": [*HI, said("assistant", "a")]}, {"messages": [bad, said("assistant", "a")]}]
    with pytest.raises(DataError) as caught:
        trained(rows, make_tokenizer(), tmp_path)
    assert words in str(caught.value) and "1 row (2): message 1 (user)" in str(caught.value)
    with pytest.raises(DataError, match=r"1 row \(2\): message 1 \(user\) of `prompt` contains"):
        prompts([{"prompt": "a"}, {"prompt": [bad]}], make_tokenizer(), tmp_path)


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("template", [CHATML, PRINTS])
def test_null_content_is_a_bad_row_never_the_word_none(role: str, template: str, tmp_path: Path) -> None:
    messages = [said("user", "a"), said("assistant", "b")]
    messages = [{**m, "content": None if m["role"] == role else "x"} for m in messages]
    with pytest.raises(DataError, match=rf"1 row \(1\): message \d \({role}\) of `messages` has no content"):
        trained([{"messages": messages}], make_tokenizer(template), tmp_path)


def test_null_keys_that_arrow_adds_are_no_keys(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    other = {"function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"messages": [*HI, said("assistant", "", tool_calls=[call])]},
        {"messages": [*HI, said("assistant", "", tool_calls=[other])]},
        {"messages": [*HI, said("assistant", "hello")]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    tokenizer = make_tokenizer(TOOLS)
    groups = load_groups(DataConfig(path=str(tmp_path / "train.parquet")), tokenizer)
    texts = [tokenizer.decode(g.completions[0].tokens) for g in groups]
    assert texts[2] == "hello<|im_end|>" and not any("null" in text or "None" in text for text in texts)
    assert '"arguments": {"zone": "UTC"}' in texts[0]


def test_messages_as_json_text_are_messages(tmp_path: Path) -> None:
    text = json.dumps([*HI, said("assistant", "hello")])
    assert trained([{"messages": text}], make_tokenizer(), tmp_path)[1] == ["«hello<|im_end|>»"]
    assert prompts([{"prompt": json.dumps(HI)}], make_tokenizer(), tmp_path) == [PROMPT.format("hi")]
    plain = '["a", "list", "to", "sort"]'
    assert prompts([{"prompt": plain}], make_tokenizer(), tmp_path) == [PROMPT.format(plain)]
    with pytest.raises(DataError, match=r"`messages` must be a list of .*, not text"):
        trained([{"messages": "hello"}], make_tokenizer(), tmp_path)


def test_sharegpt_roles_and_pairs(tmp_path: Path) -> None:
    talk = [{"from": "system", "value": "S"}, {"from": "human", "value": "hi"}]
    row = {
        "conversations": talk,
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    found = trained([row], make_tokenizer(), tmp_path, "preference")
    assert found == (
        "<|im_start|>system\nS<|im_end|>\n" + PROMPT.format("hi"),
        ["«a<|im_end|>»", "«b<|im_end|>»"],
    )
    with pytest.raises(DataError, match="message 1 of `conversations` is from 'narrator'"):
        trained([{"conversations": [{"from": "narrator", "value": "x"}]}], make_tokenizer(), tmp_path)


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_a_template_that_writes_them(as_text: bool, tmp_path: Path) -> None:
    row = json.loads((CASES / "sft_tools.jsonl").read_text(encoding="utf-8"))
    if as_text:
        row["tools"] = json.dumps(row["tools"])
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = "{}"
    prompt, (response,) = trained([row], make_tokenizer(TOOLS), tmp_path)
    assert '"description": "time now"' in prompt
    assert response == (
        '«<call>[{"type": "function", "function": {"name": "clock", "arguments": {}}}]</call><|im_end|>»'
    )
    asked = [{"prompt": row["messages"][:1], "tools": row["tools"]}]
    assert "time now" in prompts(asked, make_tokenizer(TOOLS), tmp_path)[0]


def test_tools_are_refused_where_the_template_leaves_them_out(tmp_path: Path) -> None:
    row = json.loads((CASES / "sft_tools.jsonl").read_text(encoding="utf-8"))
    with pytest.raises(DataError, match=r"1 row \(1\): the chat template leaves out `tools`"):
        trained([row], make_tokenizer(CHATML), tmp_path)
    with pytest.raises(DataError, match=r"1 row \(1\): the chat template leaves out `tool_calls`"):
        trained([{"messages": row["messages"]}], make_tokenizer(CHATML), tmp_path)
    with pytest.raises(DataError, match=r"1 row \(1\): the chat template leaves out `tools`"):
        prompts([{"prompt": HI, "tools": row["tools"]}], make_tokenizer(CHATML), tmp_path)
    with pytest.raises(DataError, match="`tools` are given, but the tokenizer has no chat template"):
        prompts([{"prompt": "hi", "tools": row["tools"]}], make_tokenizer(None), tmp_path)


# -- which turns are learned, and how they end -----------------------------------------------------


def test_two_assistant_messages_in_a_row_are_two_turns(tmp_path: Path) -> None:
    found = trained(CASES / "sft_two_assistants.jsonl", make_tokenizer(), tmp_path)
    assert found[1] == ["«one<|im_end|>»\n<|im_start|>assistant\n«two<|im_end|>»"]
    with pytest.raises(DataError, match=r"1 row \(1\): the chat template rejects .*roles must alternate"):
        trained(CASES / "sft_two_assistants.jsonl", gemma_tokenizer(), tmp_path)


TALK = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]


def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path: Path) -> None:
    weighed = [TALK[0], {**TALK[1], "weight": 0}, TALK[2], {**TALK[3], "weight": 1}]
    prompt, response = trained([{"messages": weighed}], make_tokenizer(), tmp_path)
    assert "assistant\nb<|im_end|>" in prompt and response == ["«d<|im_end|>»"]
    none = [{**m, "weight": 0} for m in TALK]
    with pytest.raises(DataError, match="no assistant message to learn from; each has weight 0"):
        trained([{"messages": none}], make_tokenizer(), tmp_path)
    half = [*TALK[:3], {**TALK[3], "weight": 0.5}]
    with pytest.raises(DataError, match=r"message 4 has weight 0\.5; it must be 0 or 1"):
        trained([{"messages": half}], make_tokenizer(), tmp_path)


def test_a_turn_that_the_next_role_ends_is_learned_with_that_token(tmp_path: Path) -> None:
    prompt, response = trained([{"messages": TALK}], glm_tokenizer(), tmp_path)
    assert prompt == "<|user|>\na<|assistant|>\n"  # as it is when the model generates
    assert response == ["«b\n<|user|>»\nc\n<|assistant|>\n«d\n<|user|>»"]


def test_a_turn_without_a_special_token_behind_it_is_learned_as_the_last_only(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(PLAIN_ROLES)
    with pytest.raises(
        DataError, match="special token, so sampling could not stop there; write `train_on: last`"
    ):
        trained([{"messages": TALK}], tokenizer, tmp_path)
    assert trained([{"messages": TALK}], tokenizer, tmp_path, train_on="last")[1] == ["«d\n<|im_end|>»"]


def test_no_end_token_is_learned_twice(tmp_path: Path) -> None:
    file = CASES / "sft_end_token_twice.jsonl"
    for template in (CHATML, None):
        assert trained(file, make_tokenizer(template), tmp_path)[1] == ["«4<|im_end|>»"]
    row = {"messages": [said("user", "q<|im_end|>"), said("assistant", "4<|im_end|>\n<|im_end|>")]}
    assert trained([row], make_tokenizer(), tmp_path) == (PROMPT.format("q"), ["«4<|im_end|>»"])
    assert prompts([{"prompt": "q<|im_end|>"}], make_tokenizer(), tmp_path) == [PROMPT.format("q")]


def test_a_base_tokenizer_with_a_chat_template_ends_turns_as_the_template_does(tmp_path: Path) -> None:
    base = make_tokenizer(CHATML, eos="<|endoftext|>")
    assert trained([{"prompt": "q", "completion": "4"}], base, tmp_path)[1] == ["«4<|im_end|>»"]


# -- thoughts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [R1, PREFILL])
def test_a_model_that_opens_its_thought_in_the_prompt_learns_its_own_samples(
    template: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(template)
    opened = PROMPT.format("2+2") + "<think>\n"
    wanted = (opened, ["«first I add\n</think>\n\n4<|im_end|>»"])
    assert trained(CASES / "sft_r1_own_sample.jsonl", tokenizer, tmp_path) == wanted
    whole = [{"prompt": "2+2", "completion": "<think>\nfirst I add\n</think>\n\n4"}]
    assert trained(whole, tokenizer, tmp_path) == wanted  # the prompt's <think> does not come twice
    pair = [{"prompt": "2+2", "chosen": "a</think>4", "rejected": "b</think>5"}]
    assert trained(pair, tokenizer, tmp_path, "preference") == (
        opened, ["«a</think>4<|im_end|>»", "«b</think>5<|im_end|>»"],
    )  # fmt: skip
    with pytest.raises(DataError, match=r"opens <think>, and the response never closes it"):
        trained([{"prompt": "2+2", "completion": "4"}], tokenizer, tmp_path)


@pytest.mark.parametrize("template", [QWEN3, R1, PREFILL])
def test_several_thoughts_name_the_remedy(template: str, tmp_path: Path) -> None:
    file, tokenizer = CASES / "sft_qwen3_two_thoughts.jsonl", make_tokenizer(template)
    with pytest.raises(DataError, match=r"1 row \(1\): .*assistant turn 2.*write `train_on: last`"):
        trained(file, tokenizer, tmp_path)
    _, (response,) = trained(file, tokenizer, tmp_path, train_on="last")
    assert response.endswith("add\n</think>\n\n6<|im_end|>»")


def test_a_thought_that_the_template_leaves_out_is_no_silent_loss(tmp_path: Path) -> None:
    row = {"messages": [*HI, said("assistant", "4", reasoning_content="add")]}
    assert trained([row], make_tokenizer(QWEN3), tmp_path)[1] == ["«<think>\nadd\n</think>\n\n4<|im_end|>»"]
    with pytest.raises(DataError, match="omits a part of assistant turn 2"):
        trained([row], make_tokenizer(CHATML), tmp_path)


# -- prompts ---------------------------------------------------------------------------------------


def test_a_rendered_prompt_is_used_as_it_is_with_a_warning(tmp_path: Path) -> None:
    file, tokenizer = CASES / "grpo_already_templated.jsonl", make_tokenizer()
    loaded = load_prompts(DataConfig(path=str(file)), tokenizer)
    assert tokenizer.decode(loaded.prompts[0].tokens) == PROMPT.format("What is 2+2?")
    assert "1 row (1): already rendered with the chat template" in str(loaded)
    row = {"prompt": PROMPT.format("q"), "completion": "4<|im_end|>"}
    assert trained([row], tokenizer, tmp_path) == (PROMPT.format("q"), ["«4<|im_end|>»"])
    with pytest.raises(DataError, match=r"1 row \(1\): the prompt is already rendered, so `system` cannot"):
        prompts(file, tokenizer, tmp_path, system="Add.")


@pytest.mark.parametrize("bos", ["<|im_start|>", ""])
def test_no_bos_comes_twice_and_none_is_lost(bos: str, tmp_path: Path) -> None:
    rendered = bos + "<turn>user\nq<eot>\n<turn>model\n"
    wanted = ["<|im_start|><turn>user\nq<eot>\n<turn>model\n"]
    assert prompts([{"prompt": rendered}], gemma_tokenizer(), tmp_path) == wanted
    assert prompts([{"prompt": "q"}], gemma_tokenizer(), tmp_path) == wanted
    plain = make_tokenizer(None, bos_first=True)
    assert prompts([{"prompt": bos + "q"}], plain, tmp_path) == ["<|im_start|>q"]


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("bos_first", [True, False])
def test_texts_encoded_in_one_call_get_the_ids_of_each(
    template: str | None, bos_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TEXTS_PER_CALL", 2)
    render = chat.Renderer(DataConfig(), make_tokenizer(template, bos_first=bos_first))
    texts = ["What is 2+2?", f"{START}What is 2+3?", "", f"4{CLOSE}", "What is 2+2? The answer is 4."]
    assert list(render.encode_all(texts)) == [render.encode(text) for text in texts]
    assert list(render.encode_all([])) == []


def test_a_prompt_that_ends_with_the_assistant_is_continued(tmp_path: Path) -> None:
    begun = [*HI, said("assistant", "The answer is")]
    row = {"prompt": begun, "completion": " 4"}
    wanted = PROMPT.format("hi") + "The answer is"
    assert prompts([row], make_tokenizer(), tmp_path) == [wanted]
    assert trained([row], make_tokenizer(), tmp_path) == (wanted, ["« 4<|im_end|>»"])


def test_prompts_of_messages_are_rendered(tmp_path: Path) -> None:
    found = prompts(CASES / "grpo_messages.jsonl", make_tokenizer(), tmp_path)
    assert found == [PROMPT.format("What is 2+2?"), PROMPT.format("2+3?")]


def test_a_null_in_the_only_row_of_a_template_is_named(tmp_path: Path) -> None:
    file = CASES / "grpo_null_in_template.jsonl"
    with pytest.raises(DataError, match=r"1 row \(1\): `template` needs text, and `question` is null"):
        prompts(file, make_tokenizer(), tmp_path, template="Q: {question}")


@pytest.mark.parametrize("value", [None, ["a"], HI, {"a": 1}])
def test_a_template_over_what_is_no_text_is_a_bad_row(value: Any, tmp_path: Path) -> None:
    rows = [{"question": "a"}, {"question": value}]
    kind = "null" if value is None else "an object" if isinstance(value, dict) else "a list"
    with pytest.raises(DataError, match=rf"1 row \(2\): `template` needs text, and `question` is {kind}"):
        prompts(rows, make_tokenizer(), tmp_path, template="Q: {question}")
    found = prompts([{"question": 3}], make_tokenizer(None), tmp_path, template="Q: {question:03d} {{}}")
    assert found == ["Q: 003 {}"]


def test_a_template_that_fails_on_a_row_names_the_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": [said("tool", "x"), said("user", "y")]}]
    with pytest.raises(
        DataError, match=r"1 row \(2\): the chat template rejects these messages \(roles: tool"
    ):
        prompts(rows, gemma_tokenizer(), tmp_path)


# -- implicit prompts of pairs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "common"),
    [
        ("It is good morning", "It is goodbye", "It is"),
        ("A: 12", "A: 123", "A:"),
        ("one two", "one two three", "one"),  # neither response is empty
        ("one two", "one twofold", "one"),
        ("pi is 3.14", "pi is 3.15", "pi is"),
        ("Q\n\nyes", "Q\n\nyesterday", "Q\n\n"),
        ("问：一加一？答：二", "问：一加一？答：三", "问：一加一？答："),
        ("e\u0301a", "e\u0300a", ""),
        ("say e\u0301", "say e\u0300", "say"),
        ("same", "same", ""),
    ],
)
def test_a_common_beginning_never_cuts_a_word(chosen: str, rejected: str, common: str) -> None:
    assert common_text(chosen, rejected) == common_text(rejected, chosen) == common


def test_pairs_of_assistant_messages_need_a_prompt(tmp_path: Path) -> None:
    file = CASES / "dpo_assistant_only.jsonl"
    with pytest.raises(DataError, match=r"1 row \(1\): .*begin with the assistant, and there is no `prompt`"):
        trained(file, make_tokenizer(), tmp_path, "preference")
    row = {**json.loads(file.read_text(encoding="utf-8")), "prompt": "hi"}
    found = trained([row], make_tokenizer(), tmp_path, "preference")
    assert found == (PROMPT.format("hi"), ["«good<|im_end|>»", "«bad<|im_end|>»"])


# -- templates that put a token at the very end, or leave out a message ------------------------------

TWO_TURNS = [said("user", "q"), said("assistant", "one"), said("user", "r"), said("assistant", "two")]


def test_a_turn_ends_at_its_first_end_token(tmp_path: Path) -> None:
    found = trained([{"messages": TWO_TURNS}], phi_tokenizer(), tmp_path)
    asked = "<|user|>\nq<|end|>\n<|assistant|>\n"
    assert found == (asked, ["«one<|end|>»\n<|user|>\nr<|end|>\n<|assistant|>\n«two<|end|>»"])


def test_a_message_that_the_template_leaves_out_is_named(tmp_path: Path) -> None:
    messages = [said("system", "Be brief."), said("user", "q")]
    words = r"the chat template leaves out message 1 \(system\)"
    with pytest.raises(DataError, match=words):
        prompts([{"prompt": messages}], phi_tokenizer(), tmp_path)
    with pytest.raises(DataError, match=words):
        prompts([{"prompt": "q"}], phi_tokenizer(), tmp_path, system="Be brief.")
    with pytest.raises(DataError, match=words):
        trained([{"messages": [*messages, said("assistant", "a")]}], phi_tokenizer(), tmp_path)


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_a_null_in_a_demonstration_is_a_bad_row(column: str, tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "a", column: None}
    with pytest.raises(DataError, match=f"`{column}` is null"):
        trained([row], make_tokenizer(CHATML), tmp_path)


def test_a_score_beyond_floats_is_a_bad_row(tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "a", "score": 10**400}
    with pytest.raises(DataError, match="`score` must be a finite number"):
        trained([row], make_tokenizer(CHATML), tmp_path, "scored")
