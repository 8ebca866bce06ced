"""Damaged model folders: each is refused by name before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from rft.config.load import load_config
from rft.errors import ConfigError
from rft.plan import make_plan

Damage = Callable[[Path], object]
CONFIG = """
model: {path: %s}
algorithm: grpo
rewards: [math]
data: {kind: arithmetic, limit: 8}
eval: {every: 0}
"""


def config_is(value: object) -> Damage:
    return lambda folder: (folder / "config.json").write_text(json.dumps(value))


def entry(file: str, **changes: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def text(file: str, content: str | bytes) -> Damage:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(raw)


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    names = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[1]")


def empty_index(folder: Path) -> None:
    bad_index(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def refused(folder: Path, out: Path, *overrides: str) -> list[str]:
    """Return the problems of a config with this model."""
    (out / "c.yaml").write_text(CONFIG % folder)
    overrides = (f"output_dir={out}", "train.batch_size=4", *overrides)
    with pytest.raises(ConfigError) as error:
        make_plan(load_config(str(out / "c.yaml"), overrides))
    return error.value.problems


NO_MODEL, NO_TOKENIZER = "transformers cannot build a model from its config.json", "cannot be loaded"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (config_is([]), NO_MODEL),
        (config_is({}), NO_MODEL),
        (config_is(None), NO_MODEL),
        (config_is(3), NO_MODEL),
        (text("config.json", b"\xff\xfe\x00"), "its config.json cannot be read"),
        (entry("config.json", model_type="nope"), NO_MODEL),
        (entry("config.json", hidden_size="wide"), "hidden_size"),
        (entry("config.json", layer_types=["x"]), "layer_types"),
        (entry("config.json", quantization_config=5), NO_MODEL),
        (entry("config.json", dtype="float3"), "float3"),
        (text("tokenizer.json", '{"a":'), NO_TOKENIZER),
        (text("tokenizer.json", "[]"), NO_TOKENIZER),
        (text("tokenizer.json", '{"model": {"type": "BPE", "vocab": 5}}'), NO_TOKENIZER),
        (lambda folder: (folder / "tokenizer.json").unlink(), NO_TOKENIZER),
        (text("tokenizer_config.json", "[]"), NO_TOKENIZER),
        (entry("tokenizer_config.json", tokenizer_class=5), NO_TOKENIZER),
        (entry("tokenizer_config.json", eos_token=5), NO_TOKENIZER),
        (entry("tokenizer_config.json", model_max_length="x"), "its model_max_length is 'x'"),
        (text("chat_template.jinja", "{% for x in %}"), "the chat template rejects these messages"),
        (text("chat_template.jinja", "{{ 1 / 0 }}"), "the chat template rejects these messages"),
        (text("generation_config.json", "[]"), "generation_config.json is damaged"),
        (entry("generation_config.json", eos_token_id="x"), "generation_config.json is damaged"),
        (cut, "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights (model.safetensors"),
        (shards, "lacks model-2-of-2.safetensors, which model.safetensors.index.json lists"),
        (bad_index, "model.safetensors.index.json is damaged"),
        (empty_index, "model.safetensors.index.json lists no weights"),
        (
            entry("config.json", num_hidden_layers=9, layer_types=["full_attention"] * 9),
            "has the weights of 2 layers, and its config.json says 9",
        ),
        (entry("tokenizer_config.json", model_max_length=-3), "its model_max_length is -3"),
        (entry("generation_config.json", eos_token_id=1.5), "eos_token_id is 1.5, not a token id"),
        (entry("generation_config.json", eos_token_id=True), "eos_token_id is True, not a token id"),
        (entry("generation_config.json", eos_token_id=[1, "2"]), "eos_token_id is [1, '2'], not a token id"),
        (entry("generation_config.json", eos_token_id=368), "eos_token_id 368 is not in the model's vocab"),
        (entry("generation_config.json", eos_token_id=-1), "eos_token_id -1 is not in the model's vocab"),
        (entry("generation_config.json", eos_token_id=[1, 999]), "ids are 0 to 367; write the id of the"),
        (entry("config.json", pad_token_id=368), "pad_token_id is 368, and the vocabulary has 368 tokens"),
        (entry("config.json", vocab_size=300), "token ids up to 367, but the model's vocabulary has 300"),
        (entry("config.json", num_attention_heads=3), "num_attention_heads is 3, and must be a multiple of"),
        (entry("config.json", num_key_value_heads=4), "multiple of num_key_value_heads, 4; correct it"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(
    tiny_folder: Path, tmp_path: Path, damage: Damage, words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    told = "\n".join(refused(folder, tmp_path))
    assert words in told
    assert str(folder) in told or "chat template" in told or "model.tokenizer" in told


@pytest.mark.parametrize("size", [0, -4])
@pytest.mark.parametrize(
    "name",
    [
        *("vocab_size", "hidden_size", "head_dim", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings"),
    ],
)
def test_a_size_below_one_is_refused_by_name(tiny_folder: Path, tmp_path: Path, name: str, size: int) -> None:
    """Transformers builds a model with some of them, and divides by others."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    entry("config.json", **{name: size})(folder)
    assert refused(folder, tmp_path) == [
        f"model.path: {str(folder)!r}: in its config.json, {name} is {size}, and must be at least 1; correct "
        "it, or copy the file again"
    ]


def test_sizes_are_known_by_the_names_of_other_classes_and_in_a_text_model(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    GPT2Config(vocab_size=368, n_layer=1, n_head=0, n_embd=64).save_pretrained(folder)
    assert "n_head is 0, and must be at least 1" in "\n".join(refused(folder, tmp_path))
    config_is({"model_type": "gemma3", "text_config": {"hidden_size": 0}})(folder)
    assert "hidden_size is 0, and must be at least 1" in "\n".join(refused(folder, tmp_path))


def test_a_stop_token_of_the_config_must_be_in_the_vocabulary(tiny_folder: Path, tmp_path: Path) -> None:
    for token in (368, -1):
        problem = (
            f"rollout.sampling.stop_token_ids: {token} is not in the model's vocabulary, whose ids are 0"
        )
        problems = refused(tiny_folder, tmp_path, f"rollout.sampling.stop_token_ids=[367, {token}]")
        assert problems == [f"{problem} to 367; write the id of a token, or remove it"]


def test_damaged_weights_of_a_reference_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(tiny_folder, reference)
    cut(reference)
    (tmp_path / "c.yaml").write_text(CONFIG % tiny_folder)
    changes = [f"output_dir={tmp_path}", "train.batch_size=4", "algorithm={name: grpo, beta: 0.1}"]
    config = load_config(str(tmp_path / "c.yaml"), [*changes, f"model.reference={reference}"])
    with pytest.raises(ConfigError, match=r"model\.reference: .*/reference/model\.safetensors is damaged"):
        make_plan(config)
