import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rft.tasks import TASKS
from rft.tasks.tiny import build_tiny, build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build_tiny(path, seed=1)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_it_is_a_small_qwen3_that_transformers_loads(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen3" and model.config.max_position_embeddings >= 2048
    assert 100_000 < model.num_parameters() < 2_000_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer)
    ids = tokenizer("1+2=", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_the_same_seed_gives_the_same_files_in_another_process(folder, tmp_path):
    code = f"from rft.tasks.tiny import build_tiny; build_tiny({str(tmp_path)!r}, seed=1)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names)
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_another_seed_gives_other_weights_and_no_global_state_is_touched(folder, tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    build_tiny(tmp_path, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (folder / "model.safetensors").read_bytes() != (tmp_path / "model.safetensors").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer("Mia has 1234 coins, 12+30=42")["input_ids"]]
    digits = [p for p in pieces if any(c.isdigit() for c in p)]
    assert digits == list("1234123042")


def test_problems_and_solutions_are_short(tokenizer):
    for row in TASKS["arithmetic"]().rows("train", 200, 1):
        assert len(tokenizer(row["prompt"])["input_ids"]) <= 32
        assert len(tokenizer(row["completion"])["input_ids"]) < 32


def test_special_tokens_are_single_and_different(tokenizer):
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids) == 3 and None not in ids
    assert tokenizer("a" + tokenizer.eos_token)["input_ids"][-1] == tokenizer.eos_token_id


def test_the_chat_template_marks_what_the_assistant_says(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    out = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(said) == f"3{tokenizer.eos_token}4{tokenizer.eos_token}"
    asked = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat[:3], tokenize=False)
    assert whole == asked + "3" + tokenizer.eos_token


def test_real_problems_fit(tokenizer):
    text = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?"
    )  # GSM8K, training split, first problem
    assert len(tokenizer(text)["input_ids"]) < 200


def test_sizes_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match="hidden_size"):
        build_tiny(tmp_path, hidden_size=100, heads=3)
    with pytest.raises(ValueError, match="vocab_size must be at least 262"):
        build_tokenizer(vocab_size=200)


def test_the_generation_config_stops_at_the_end_token(folder, tokenizer):
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
