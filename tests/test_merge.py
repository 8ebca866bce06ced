"""`rft merge`: every equation against numbers computed by hand, folders shard by shard, refusals by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rft.cli import main
from rft.errors import ConfigError
from rft.tasks.tiny import build_tiny
from rft.tools import merge as merging
from rft.tools.merge import (
    Options,
    layer_scale,
    lora_delta,
    merge,
    soup,
    sum_of,
)
from rft.tools.model_files import ModelFiles
from rft.tools.prune import prune, recover
from rft.utils.hashing import model_digest
from rft.utils.tensor_names import layer_number

T = torch.tensor
CONFIG = {"model_type": "qwen3", "hidden_size": 2}


def model(folder: Path, scale: float = 1.0, **changes: Any) -> Path:
    """A made-up model of two layers in two shards, with a tokenizer."""
    folder.mkdir(parents=True)
    embed, head = T([[1.0, 2.0], [3.0, 4.0]]) * scale, T([[0.5, -1.0]]) * scale
    first = {"model.embed_tokens.weight": embed, "model.layers.0.mlp.weight": T([[1.0, -2.0, 4.0]]) * scale}
    second = {"model.layers.1.mlp.weight": T([[8.0, 0.0, -1.0]]) * scale, "lm_head.weight": head} | changes
    shards = {"model-1-of-2.safetensors": first, "model-2-of-2.safetensors": second}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    index = {"weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}})
    )
    return folder


def merged(method: str, out: Path, *folders: Path, score: Any = None, **options: Any) -> dict[str, Tensor]:
    merge(method, {f.name: str(f) for f in folders}, out, Options(**options), score)
    files = ModelFiles(out)
    return {name: files.read(name) for name in files.tensors}


def refused(method: str, out: Path, *folders: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        merged(method, out, *folders, **options)
    assert not out.exists(), "nothing is written"
    return "\n".join(error.value.problems)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, *args, **changes: model(tmp_path / name, *args, **changes)


# -- equations ---------------------------------------------------------------------------------------------


def test_soup_and_sums_by_hand() -> None:
    a, b = T([1.0, 3.0]), T([3.0, -1.0])
    assert soup([a, b]).tolist() == [2.0, 1.0]
    assert sum_of([a, b], [1.0, -0.5]).tolist() == [-0.5, 3.5]


def test_lines_grows_with_the_layer() -> None:
    scales = [layer_scale(layer, 3, 0.2, 0.6, False) for layer in range(3)]
    assert scales == pytest.approx([0.2, 0.5, 0.8])
    assert layer_scale(None, 3, 0.2, 0.6, behind=False) == 0.2
    assert layer_scale(None, 3, 0.2, 0.6, behind=True) == pytest.approx(0.8)
    assert layer_scale(0, 1, 0.2, 0.6, False) == 0.2
    assert [layer_number(n) for n in ("model.layers.12.mlp.weight", "h.3.attn", "lm_head.weight")] == [
        12,
        3,
        None,
    ]


def test_lora_delta_by_hand() -> None:
    a, b = T([[1.0, 2.0]]), T([[3.0], [4.0]])
    assert lora_delta(a, b, 0.5).tolist() == [[1.5, 3.0], [2.0, 4.0]]
    assert lora_delta(a, b, 0.5, transposed=True).tolist() == [[1.5, 2.0], [3.0, 4.0]]


# -- folders -----------------------------------------------------------------------------------------------


def test_folders_are_merged_shard_by_shard(make: Callable[..., Path], tmp_path: Path) -> None:
    base, tuned = make("base"), make("tuned", 2.0)
    name = "model.layers.0.mlp.weight"
    out = tmp_path / "wise"
    assert merged("wise-ft", out, base, tuned, alpha=0.25)[name].tolist() == [[1.25, -2.5, 5.0]]
    assert ModelFiles(out).shards == ModelFiles(base).shards
    assert json.loads((out / "config.json").read_text()) == CONFIG and (out / "tokenizer.json").exists()
    lineage = json.loads((out / "merge.json").read_text())
    assert lineage["method"] == "wise-ft" and lineage["options"]["alpha"] == 0.25
    assert [m["weights"] for m in lineage["models"]] == [model_digest(str(f)) for f in (base, tuned)]
    layered = merged("lines", tmp_path / "lines", base, tuned, alpha=0.0, beta=1.0)
    assert torch.equal(layered[name], load_file(base / "model-1-of-2.safetensors")[name]), "first layer: 0"
    assert layered["model.layers.1.mlp.weight"].tolist() == [[16.0, 0.0, -2.0]], "last layer: 1"
    assert layered["lm_head.weight"].tolist() == [[1.0, -2.0]]
    assert layered["model.embed_tokens.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    third = make("third", -1.0)
    moved = merged("difference", tmp_path / "moved", base, tuned, third)
    assert moved[name].abs().sum() == 0, "third + (tuned - base) = -1 + 1"


def test_the_result_has_the_dtype_of_the_first_model(make: Callable[..., Path], tmp_path: Path) -> None:
    half = make("half", **{"lm_head.weight": T([[0.5, -1.0]], dtype=torch.bfloat16)})
    assert merged("soup", tmp_path / "out", half, make("full", 3.0))["lm_head.weight"].dtype is torch.bfloat16


def test_a_greedy_soup_keeps_what_does_not_harm(make: Callable[..., Path], tmp_path: Path) -> None:
    """Accuracy falls with the distance of a weight from 2: the models have 1, 3.5 and 8."""
    folders = [make(name, scale) for name, scale in (("far", 8.0), ("one", 1.0), ("three", 3.5))]

    def score(folder: str) -> float:
        files = ModelFiles(folder)
        return -abs(float(files.read("model.embed_tokens.weight")[0, 0]) - 2)

    out = tmp_path / "out"
    result = merged("greedy", out, *folders, score=score)
    assert result["model.embed_tokens.weight"][0, 0] == 2.25, "the mean of 1 and 3.5"
    used = {m["name"]: m["used"] for m in json.loads((out / "merge.json").read_text())["models"]}
    assert used == {"far": False, "one": True, "three": True}
    assert not list(tmp_path.glob("rft-merge-*")), "no candidate is left"


def test_what_does_not_fit_is_refused_by_name(make: Callable[..., Path], tmp_path: Path) -> None:
    base, out = make("base"), tmp_path / "out"
    wide = make("wide", **{"lm_head.weight": T([[0.5, -1.0, 2.0]])})
    told = refused("soup", out, base, wide)
    assert "lm_head.weight has shape [1, 2] in base and [1, 3] in wide" in told
    more = make("more", **{"score.weight": T([1.0])})
    assert "base lacks score.weight (1 such tensors), which more has" in refused("soup", out, base, more)
    packed = make("packed", **{"lm_head.weight": T([[1, 2]], dtype=torch.uint8)})
    assert "packed: lm_head.weight is stored as U8; quantised weights" in refused("soup", out, packed, base)
    other = make("other")
    (other / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "c": 1}, "merges": ["a b"]}})
    )
    told = refused("soup", out, base, other)
    assert "the tokenizers of base and other differ in 2 entries: 'b' has the id 1 and none" in told
    twin = make("twin")
    assert "wise-ft: it takes START TUNED, not 1 model" in refused("wise-ft", out, base)
    assert "--weights: soup does not use it, only linear, lines" in refused(
        "soup", out, base, twin, weights=[1.0, 1.0]
    )
    assert "--beta: soup does not use it, only lines" in refused("soup", out, base, twin, beta=1.0)
    assert "--weights: 1 numbers, but ties of 3 models needs 2" in refused(
        "ties", out, base, twin, other, weights=[1.0]
    )
    assert "--density: 0 is not a share" in refused("dare", out, base, twin, density=0.0)
    assert "ties: it takes BASE MODEL..., not 1 model" in refused("ties", out, base)
    assert "--weights: [nan] is not finite" in refused("dare", out, base, twin, weights=[float("nan")])
    assert "--alpha: inf is not finite" in refused("wise-ft", out, base, twin, alpha=float("inf"))
    assert "--density 0.9 and --gamma 0.5 sum to more than 1" in refused(
        "breadcrumbs", out, base, twin, gamma=0.5
    )
    assert "stock: it takes BASE MODEL MODEL" in refused("stock", out, base, twin)
    assert "--gamma: ties does not use it" in refused("ties", out, base, twin, gamma=0.1)
    assert "greedy: name a config" in refused("greedy", out, base, twin)
    (tmp_path / "empty").mkdir()
    assert "empty: it has no model.safetensors" in refused("soup", out, base, tmp_path / "empty")


def test_damaged_weights_are_refused_by_name(make: Callable[..., Path], tmp_path: Path) -> None:
    base, damaged = make("base"), make("damaged")
    shard, index = damaged / "model-2-of-2.safetensors", damaged / "model.safetensors.index.json"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"damaged: {shard} is damaged (" in refused("soup", tmp_path / "out", base, damaged)
    shard.unlink()
    lacks = f"damaged: {damaged} lacks {shard.name}, which {index.name} lists; copy it there"
    assert lacks in refused("soup", tmp_path / "out", base, damaged)
    damages = {"{": "is damaged (", "[]": "is damaged (", '{"weight_map": {}}': "lists no weights"}
    for text, reason in damages.items():
        index.write_text(text)
        assert f"damaged: {index} {reason}" in refused("soup", tmp_path / "out", base, damaged)


def test_one_shard_with_an_index_is_written_with_one(make: Callable[..., Path], tmp_path: Path) -> None:
    """Such folders are on the hub; a model is not found in them without the index."""
    base, shard = make("base"), "model-00001-of-00001.safetensors"
    files = ModelFiles(base)
    save_file({name: files.read(name) for name in files.tensors}, base / shard)
    for name in files.shards:
        (base / name).unlink()
    index = {"weight_map": dict.fromkeys(files.tensors, shard)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merged("soup", tmp_path / "out", base, make("other")).keys() == files.tensors.keys()
    assert ModelFiles(tmp_path / "out").shards == [shard]


def test_a_single_file_comes_before_an_index(make: Callable[..., Path]) -> None:
    """As in transformers: the index of a folder that was sharded before is left over."""
    folder = make("both")
    save_file({"lm_head.weight": T([[7.0]])}, folder / "model.safetensors")
    assert ModelFiles(folder).read("lm_head.weight").tolist() == [[7.0]]
    assert set(ModelFiles(folder).tensors) == {"lm_head.weight"}


# -- adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the tiny model that peft saved."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).save_pretrained(
        tmp_path / "lora"
    )
    return tmp_path / "lora"


def test_an_adapter_is_merged_as_peft_does(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(["merge", "adapter", str(tiny_folder), str(adapter), "--out", str(tmp_path / "out")]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), adapter)
    expected, ours = model.merge_and_unload().state_dict(), ModelFiles(tmp_path / "out")
    changed = [n for n in ours.tensors if "q_proj" in n or "down_proj" in n]
    assert len(changed) == 4
    for name in ours.tensors:
        assert torch.allclose(ours.read(name), expected[name], rtol=0, atol=1e-6), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_wrong_base_is_refused_by_name(
    tiny_folder: Path, adapter: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    out, other = tmp_path / "out", make("other")
    assert "lora: wrong base: other has no model.layers." in refused("adapter", out, other, adapter)
    wide = tmp_path / "wide"
    shutil.copytree(tiny_folder, wide)
    weights = load_file(wide / "model.safetensors")
    save_file(
        {n: torch.cat([t, t]) if "q_proj" in n else t for n, t in weights.items()}, wide / "model.safetensors"
    )
    assert "wrong base: model.layers." in refused("adapter", out, wide, adapter)
    (adapter / "lineage.json").write_text(json.dumps({"base": {"name": "mine", "weights": "f" * 64}}))
    told = refused("adapter", out, tiny_folder, adapter)
    assert "lora: wrong base: it was trained on mine with weights ffffffffffff, and tiny has" in told
    (adapter / "lineage.json").unlink()
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**raw, "use_dora": True}))
    assert "only plain LoRA is merged by files, and it is DoRA" in refused(
        "adapter", out, tiny_folder, adapter
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_files_are_named(
    tiny_folder: Path, adapter: Path, make: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    (broken / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"broken: .*config\.json"):
        prune(str(broken), "broken", tmp_path / "x", 0.5, 0)
    prune(str(tiny_folder), "tiny", tmp_path / "small", 0.5, 0)
    (tmp_path / "small" / "pruning.json").write_text(text)
    told = refused("loram", tmp_path / "y", tiny_folder, tmp_path / "small", adapter)
    assert "pruning.json is damaged" in told
    (adapter / "adapter_config.json").write_text(text)
    told = refused("adapter", tmp_path / "z", tiny_folder, adapter)
    assert "lora: " in told and ("damaged" in told or "it is None" in told)


def test_what_was_learned_about_kept_neurons_goes_back_to_their_places() -> None:
    kept = {"neurons": {"0": [1, 3]}, "heads": {}}
    change, shape = T([[1.0, 2.0], [3.0, 4.0]]), torch.Size((4, 2))
    rows = recover("model.layers.0.mlp.up_proj.weight", change, shape, kept)
    assert rows.tolist() == [[0, 0], [1, 2], [0, 0], [3, 4]]
    columns = recover("model.layers.0.mlp.down_proj.weight", change, torch.Size((2, 4)), kept)
    assert columns.tolist() == [[0, 1, 0, 2], [0, 3, 0, 4]]
    for same in ("self_attn.q_proj.weight", "mlp.down_proj.bias", "self_attn.q_norm.weight"):
        assert recover(f"model.layers.0.{same}", change, change.shape, kept) is change


def test_what_was_learned_about_kept_heads_goes_back_to_their_places() -> None:
    """Three key/value heads of size 2 with one or two query heads each; the last one is kept."""
    kept, layer = {"neurons": {}, "heads": {"1": [2]}}, "model.layers.1.self_attn"
    keys = recover(f"{layer}.k_proj.weight", T([[1.0], [2.0]]), torch.Size((6, 1)), kept)
    assert keys.flatten().tolist() == [0, 0, 0, 0, 1, 2]
    bias = recover(f"{layer}.v_proj.bias", T([1.0, 2.0]), torch.Size((6,)), kept)
    assert bias.tolist() == [0, 0, 0, 0, 1, 2]
    queries = recover(f"{layer}.q_proj.weight", T([[1.0], [2.0], [3.0], [4.0]]), torch.Size((12, 1)), kept)
    assert queries.flatten().tolist() == [0] * 8 + [1, 2, 3, 4]
    output = recover(f"{layer}.o_proj.weight", T([[1.0, 2.0, 3.0, 4.0]]), torch.Size((1, 12)), kept)
    assert output.tolist() == [[0] * 8 + [1, 2, 3, 4]]
    two = {"neurons": {}, "heads": {"1": [0, 2]}}
    change = torch.arange(1.0, 9.0)[:, None]
    spread = recover(f"{layer}.q_proj.weight", change, torch.Size((12, 1)), two)
    assert spread.flatten().tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 7, 8]


SIZES = {  # nine query heads and three key/value heads, as SmolLM2 has them
    "vocab_size": 64,
    "hidden_size": 72,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def built(folder: Path, kind: str, **sizes: Any) -> Path:
    """A random model of transformers, whose biases and norms are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | sizes))
        for parameter in network.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_an_adapter_of_a_pruned_model_serves_the_whole_one(kind: str, tmp_path: Path) -> None:
    """The pruned model computes what the whole one does without the pruned neurons and heads, and the merged
    one differs from the whole one by the adapter's change where something was kept, and nowhere else."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, small, out = built(tmp_path / "base", kind), tmp_path / "small", tmp_path / "large"
    options = ["--share", "0.25", "--heads", "0.6", "--seed", "3", "--out", str(small)]
    assert main(["prune", str(base), *options]) == 0
    facts = json.loads((small / "pruning.json").read_text())
    neurons, heads = facts["kept"], facts["kept_heads"]
    assert all(len(k) == 12 and k == sorted(set(k)) for k in neurons.values())
    assert all(len(k) == 2 and k == sorted(set(k)) for k in heads.values()) and set(heads) == {"0", "1"}
    assert neurons["0"] != neurons["1"], "each layer keeps others"
    whole = AutoModelForCausalLM.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    size = before["model.layers.0.self_attn.k_proj.weight"].shape[0] // 3
    where: dict[str, list[int]] = {}  # of each pruned matrix: rows or columns that are kept
    for number, layer in enumerate(whole.model.layers):
        groups = heads[str(number)]
        keys = [g * size + i for g in groups for i in range(size)]
        queries = [(3 * g + h) * size + i for g in groups for h in range(3) for i in range(size)]
        places = dict.fromkeys(("q", "o"), queries) | dict.fromkeys(("k", "v"), keys)
        where |= {f"model.layers.{number}.self_attn.{p}_proj.weight": at for p, at in places.items()}
        names = (f"model.layers.{number}.mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
        where |= dict.fromkeys(names, neurons[str(number)])
        dropped = [
            sorted(set(range(n)) - set(at)) for n, at in ((9 * size, queries), (48, neurons[str(number)]))
        ]
        layer.self_attn.o_proj.weight.data[:, dropped[0]] = 0
        layer.mlp.down_proj.weight.data[:, dropped[1]] = 0
    pruned, tokens = AutoModelForCausalLM.from_pretrained(small), torch.arange(8)[None]
    config = pruned.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, size)
    assert torch.allclose(pruned(tokens).logits, whole(tokens).logits, atol=1e-5)

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(pruned, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    after = merged("loram", out, base, small, tmp_path / "lora")
    start, changed = ModelFiles(small), tuned.merge_and_unload().state_dict()
    assert set(where) < set(after) and len(where) == 14
    for name, weight in after.items():
        expected = torch.zeros_like(weight)
        if name in where:
            dim = int("down_proj" in name or "o_proj" in name)
            change = changed[name] - start.read(name)
            assert change.abs().max() > 0.01
            expected.index_copy_(dim, T(where[name]), change)
        assert torch.allclose(weight - before[name], expected, atol=1e-6), name
        assert torch.equal((weight - before[name])[expected == 0], expected[expected == 0]), name
    assert ModelFiles(out).config() == ModelFiles(base).config()


def test_old_prunings_and_those_of_one_part_are_recovered(
    tiny_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neurons alone, heads alone, and a pruning.json that was written before heads were pruned."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    small = tmp_path / "neurons"
    assert main(["prune", str(tiny_folder), "--heads", "1", "--out", str(small)]) == 0
    assert capsys.readouterr().out == f"{tiny_folder}: 64 of 128 MLP neurons in each of 2 layers kept\n"
    facts = json.loads((small / "pruning.json").read_text())
    assert facts.pop("kept_heads") == {} and facts.pop("heads") == 1
    (small / "pruning.json").write_text(json.dumps(facts))
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    network = AutoModelForCausalLM.from_pretrained(small)
    assert network.config.num_attention_heads == 2
    get_peft_model(network, lora).save_pretrained(tmp_path / "lora")
    after, name = (
        merged("loram", tmp_path / "large", tiny_folder, small, tmp_path / "lora"),
        "model.layers.1.mlp.up_proj.weight",
    )
    moved = (after[name] - ModelFiles(tiny_folder).read(name)).abs().sum(1)
    assert moved.nonzero().flatten().tolist() == facts["kept"]["1"]

    assert (
        main(["prune", str(tiny_folder), "--share", "1", "--heads", "0.1", "--out", str(tmp_path / "h")]) == 0
    )
    line = f"{tiny_folder}: 1 of 2 key/value heads, with their query heads, in each of 2 layers kept\n"
    assert capsys.readouterr().out == line, "at least one is kept"
    assert ModelFiles(tmp_path / "h").config()["intermediate_size"] == 128


def test_the_number_of_heads_is_one_that_transformers_accepts(tmp_path: Path) -> None:
    """Llama wants hidden_size to be a multiple of the number of heads: of 8 groups of 2 with a hidden size of
    96, 5 and 7 cannot be kept."""
    sizes = {"hidden_size": 96, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8}
    base = built(tmp_path / "base", "llama", **sizes)
    for share, heads in ((0.5, 8), (0.65, 12), (0.3, 4), (0.9, 16)):
        line = prune(str(base), "base", tmp_path / str(share), 1, 0, share)
        assert ModelFiles(tmp_path / str(share)).config()["num_attention_heads"] == heads
        assert f"{heads // 2} of 8 key/value heads" in line


def test_what_cannot_be_pruned_or_recovered(
    tiny_folder: Path, adapter: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    def refusal(folder: Path, share: float = 0.5, heads: float | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            prune(str(folder), folder.name, tmp_path / "x", share, 0, heads)
        assert not (tmp_path / "x").exists()
        return str(caught.value)

    assert "neurons are pruned only where MLPs are dense" in refusal(make("other"))
    assert "other: its config.json has no num_attention_heads; keep all heads" in refusal(tmp_path / "other")
    assert "--share: 1 keeps all neurons, and all heads" in refusal(tiny_folder, 1.0)
    assert "--share: 0 is not a share above 0, up to 1" in refusal(tiny_folder, 0.0)
    assert "--heads: 1.5 is not a share above 0, up to 1" in refusal(tiny_folder, 0.5, 1.5)
    assert "it has no pruning.json" in refused("loram", tmp_path / "y", tiny_folder, make("third"), adapter)
    prune(str(tiny_folder), "tiny", tmp_path / "small", 0.5, 0)
    told = refused("loram", tmp_path / "z", make("fourth"), tmp_path / "small", adapter)
    assert "small: wrong base: it was pruned from tiny" in told
    (tmp_path / "file").write_text("")
    for taken in ("small", "file"):
        with pytest.raises(ConfigError, match=f"{taken} is not an empty folder: choose another one"):
            prune(str(tiny_folder), "tiny", tmp_path / taken, 0.5, 0)
    fused = built(tmp_path / "phi3", "phi3")
    assert "phi3: layer 0 has no up_proj, which is pruned; keep all neurons" in refusal(fused, 0.5, 1)
    assert "phi3: layer 0 has no q_proj, which is pruned; keep all heads (`--heads 1`)" in refusal(
        fused, 1, 0.5
    )
    narrow = built(tmp_path / "stablelm", "stablelm")
    assert "builds model.layers.0.self_attn.q_proj.weight of stablelm with shape [72, 72], and the " in (
        refusal(narrow)
    )
    assert "of olmo2 with shape" in refusal(built(tmp_path / "olmo2", "olmo2")), "q_norm is of all heads"
    config = json.loads((tiny_folder / "config.json").read_text()) | {"head_dim": 16}
    shutil.copytree(tiny_folder, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    assert "_proj.weight has shape [64, 64], and by config.json it has 32 rows" in refusal(tmp_path / "odd")
    quantised = {"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2, dtype=torch.uint8)}
    assert "stored as U8; quantised weights cannot be pruned" in refusal(make("packed", **quantised))


def test_heads_that_vllm_would_build_otherwise_are_named(tmp_path: Path) -> None:
    from rft.preflight.model import check_vllm_heads

    lines = prune(str(built(tmp_path / "base", "qwen2")), "base", tmp_path / "small", 0.5, 0)
    assert "base: vLLM cannot run qwen2 with fewer heads: train with rollout.engine: hf" in lines
    assert check_vllm_heads(str(tmp_path / "base"), {}) == []
    assert check_vllm_heads(str(tmp_path / "small"), {"model_impl": "transformers"}) == []
    problem = check_vllm_heads(str(tmp_path / "small"), {})[0]
    assert "ignores the head_dim 8" in problem and "set rollout.engine to hf" in problem


# -- mergekit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model `base`, and two that moved the same way from it, with other noise: `one`, `two`."""
    folder = tmp_path_factory.mktemp("moved")
    build_tiny(folder / "base", seed=1)
    weights = load_file(folder / "base" / "model.safetensors")
    noise = torch.Generator().manual_seed(3)
    common = {n: 0.02 * torch.randn(t.shape, generator=noise) for n, t in weights.items()}
    for name in ("one", "two"):
        shutil.copytree(folder / "base", folder / name)
        changed = {
            n: t + common[n] + 0.01 * torch.randn(t.shape, generator=noise) for n, t in weights.items()
        }
        save_file(changed, folder / name / "model.safetensors", {"format": "pt"})
    return folder.joinpath


def largest(vector: Tensor, density: float, gamma: float = 0.0) -> Tensor:
    """The vector with the share `density` of its values that follows the largest share `gamma`."""
    size = vector.numel()
    first = int(gamma * size)
    kept = vector.abs().flatten().sort(descending=True).indices[first : first + int(density * size)]
    mask = torch.zeros(size)
    mask[kept] = 1
    return vector * mask.view_as(vector)


def elected(a: Tensor, b: Tensor, density: float, weights: tuple[float, float]) -> Tensor:
    """TIES by its text: trim, elect the sign of the greater total, average the values that have it."""
    a, b = largest(a, density), largest(b, density)
    sign = torch.where(weights[0] * a + weights[1] * b >= 0, 1.0, -1.0)
    total, shares = torch.zeros_like(a), torch.zeros_like(a)
    for vector, weight in ((a, weights[0]), (b, weights[1])):
        agrees = vector.sign() == sign
        total += weight * vector * agrees
        shares += weight * agrees
    return total / torch.where(shares == 0, 1.0, shares)


def shortened(a: Tensor, b: Tensor) -> Tensor:
    """Model Stock of two vectors."""
    c = float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return 2 * c / (1 + c) * (a + b) / 2


@pytest.mark.parametrize(
    ("method", "options", "of_vectors"),
    [
        ("arithmetic", {"weights": [0.75, -0.5]}, lambda a, b: 0.75 * a - 0.5 * b),
        ("ties", {"density": 0.5}, lambda a, b: elected(a, b, 0.5, (1, 1))),
        ("ties", {}, lambda a, b: elected(a, b, 0.2, (1, 1))),
        (
            "ties",
            {"weights": [3, 1], "density": 0.5, "alpha": 0.5},
            lambda a, b: elected(a, b, 0.5, (3, 1)) / 2,
        ),
        (
            "breadcrumbs",
            {"density": 0.5, "gamma": 0.25},
            lambda a, b: largest(a, 0.5, 0.25) + largest(b, 0.5, 0.25),
        ),
        ("breadcrumbs", {"weights": [2, -1]}, lambda a, b: 2 * largest(a, 0.9, 0.01) - largest(b, 0.9, 0.01)),
        ("stock", {}, shortened),
        ("dare", {"density": 1.0, "weights": [0.5, 2]}, lambda a, b: 0.5 * a + 2 * b),
    ],
)
def test_mergekit_does_what_the_papers_say(
    moved: Callable[[str], Path],
    tmp_path: Path,
    method: str,
    options: dict[str, Any],
    of_vectors: Callable[[Tensor, Tensor], Tensor],
) -> None:
    base, one, two = (load_file(moved(n) / "model.safetensors") for n in ("base", "one", "two"))
    out = tmp_path / "out"
    done = merged(method, out, moved("base"), moved("one"), moved("two"), **options)
    assert done.keys() == base.keys()
    for name, value in done.items():
        expected = base[name] + of_vectors(one[name] - base[name], two[name] - base[name])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=f"{method} {name}")
    assert max(float((t - base[n]).abs().max()) for n, t in done.items()) > 0.005
    assert json.loads((out / "merge.json").read_text())["method"] == method
    assert {f.name for f in out.iterdir()} == {f.name for f in moved("base").iterdir()} | {"merge.json"}
    assert not list(tmp_path.glob("rft-merge-*")), "mergekit's own folder is gone"


def test_a_mean_that_is_weighed(moved: Callable[[str], Path], tmp_path: Path) -> None:
    one, two = (load_file(moved(n) / "model.safetensors") for n in ("one", "two"))
    done = merged("linear", tmp_path / "out", moved("one"), moved("two"), weights=[3, 1])
    for name, value in done.items():
        torch.testing.assert_close(value, 0.75 * one[name] + 0.25 * two[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["one@v2", "one+two", "a@b@c"])
def test_folders_whose_names_mean_more_to_mergekit(
    moved: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """mergekit reads a string as PATH@REVISION and PATH+ADAPTER."""
    for copied in ("one", name):
        shutil.copytree(moved("one"), tmp_path / copied)
    weights = load_file(moved("one") / "model.safetensors")
    save_file({n: 5 * t for n, t in weights.items()}, tmp_path / name / "model.safetensors", {"format": "pt"})
    two = load_file(moved("two") / "model.safetensors")
    for tensor, value in merged("linear", tmp_path / "out", tmp_path / name, moved("two")).items():
        torch.testing.assert_close(value, (5 * weights[tensor] + two[tensor]) / 2, rtol=1e-5, atol=1e-6)
    done = merged("arithmetic", tmp_path / "base", tmp_path / name, moved("two"), weights=[0.0])
    torch.testing.assert_close(done["model.norm.weight"], 5 * weights["model.norm.weight"])


def test_dare_keeps_a_share_and_the_sum_of_magnitudes(moved: Callable[[str], Path], tmp_path: Path) -> None:
    base, one = (load_file(moved(n) / "model.safetensors") for n in ("base", "one"))
    runs = [
        merged("dare", tmp_path / str(i), moved("base"), moved("one"), density=0.25, seed=seed)
        for i, seed in enumerate((3, 3, 4))
    ]
    name = max(base, key=lambda n: base[n].numel())
    first, again, other = (run[name] for run in runs)
    assert torch.equal(first, again) and not torch.equal(first, other)
    change, whole = first - base[name], one[name] - base[name]
    kept = change.abs() > 1e-7
    share, error = float(kept.float().mean()), (0.25 * 0.75 / kept.numel()) ** 0.5
    assert abs(share - 0.25) < 5 * error, "five standard errors"
    torch.testing.assert_close(change.abs().sum(), whole.abs().sum(), rtol=1e-3, atol=0)


def test_mergekits_result_keeps_dtypes_and_answers(moved: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(moved("base"), dtype=torch.bfloat16).save_pretrained(half)
    for file in moved("base").glob("tokenizer*"):
        shutil.copy(file, half / file.name)
    out = tmp_path / "out"
    done = merged("ties", out, half, moved("one"), moved("two"))
    assert {t.dtype for t in done.values()} == {torch.bfloat16}
    assert (
        AutoModelForCausalLM.from_pretrained(out).generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape[1]
        > 2
    )


def test_without_mergekit_its_methods_name_the_extra(
    moved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "find_spec", lambda name: None)
    told = refused("ties", tmp_path / "out", moved("base"), moved("one"))
    assert told == "ties: mergekit does it, and it is not installed: pip install 'rft[mergekit]'"
    merged("lines", tmp_path / "lines", moved("base"), moved("one"))


def test_what_mergekit_cannot_merge_is_said(make: Callable[..., Path], tmp_path: Path) -> None:
    told = refused("ties", tmp_path / "out", make("base"), make("other", 2.0))
    assert told.startswith("ties: mergekit ")
    assert not list(tmp_path.glob("rft-merge-*"))


def test_the_command_names_mistakes(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["merge", "tise", str(tiny_folder), str(tiny_folder), "--out", out]) == 2
    assert "unknown method 'tise' (did you mean 'ties'?)" in capsys.readouterr().err
    assert main(["merge", "soup", str(tiny_folder), "./missing", "--out", out]) == 2
    assert "./missing: no such folder" in capsys.readouterr().err
    assert main(["merge", "soup", "smollm2", "smollm2", "--out", out]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == ["  - smollm2: it is named twice"], "and not converted"
    Path(out).write_text("a file")
    assert main(["merge", "soup", str(tiny_folder), "other", "--out", out]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
