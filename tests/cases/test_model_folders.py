"""Damaged model folders: each is refused by name before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
        (entry("config.json", hidden_size=-4), NO_MODEL),
        (entry("config.json", num_attention_heads=0), NO_MODEL),
        (entry("config.json", vocab_size=0), NO_MODEL),
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
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(
    tiny_folder: Path, tmp_path: Path, damage: Damage, words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    (tmp_path / "c.yaml").write_text(CONFIG % folder)
    config = load_config(str(tmp_path / "c.yaml"), [f"output_dir={tmp_path}", "train.batch_size=4"])
    with pytest.raises(ConfigError) as error:
        make_plan(config)
    told = "\n".join(error.value.problems)
    assert words in told
    assert str(folder) in told or "chat template" in told


def test_damaged_weights_of_a_reference_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(tiny_folder, reference)
    cut(reference)
    (tmp_path / "c.yaml").write_text(CONFIG % tiny_folder)
    changes = [f"output_dir={tmp_path}", "train.batch_size=4", "algorithm={name: grpo, beta: 0.1}"]
    config = load_config(str(tmp_path / "c.yaml"), [*changes, f"model.reference={reference}"])
    with pytest.raises(ConfigError, match=r"model\.reference: .*/reference/model\.safetensors is damaged"):
        make_plan(config)
