"""The examples of real size, accepted as they stand but for model and data, which need a network."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rft.config.load import load_config
from rft.errors import ConfigError
from rft.plan import Plan, make_plan
from tests.integration.conftest import ROOT, rft
from tests.specs import needs_vllm

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def instead(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[str]:
    """A model of the same architecture, and rows of the same form."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split in ("train", "test"):
        rows = [{"question": f"What is {i} + 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(200)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model.path={folder / 'model'}", "data.kind=file", f"data.path={folder}", "data.subset=null"]


def planned(name: str, instead: list[str], *more: str) -> Plan:
    return make_plan(load_config(EXAMPLES / name, [*instead, *more]))


CLUSTER = ["ray.address=auto", "ray.device=cuda"]  # GPUs that this machine need not have


@needs_vllm
@pytest.mark.parametrize(
    ("name", "transport", "trains", "learner"),
    [
        ("gsm8k_qwen.yaml", "nccl", "all parameters, adamw", "1 process on cuda"),
        ("gsm8k_lora.yaml", "adapter", "an adapter (lora) of", "1 process on cuda"),
        ("gsm8k_qlora.yaml", "nccl", "on a base in nf4, paged_adamw_8bit", "1 process on cuda"),
        ("gsm8k_qwen_7b.yaml", "nccl", "all parameters, adamw", "4 ranks (fsdp2), one GPU each"),
    ],
)
def test_examples_for_gpus(name: str, transport: str, trains: str, learner: str, instead: list[str]) -> None:
    plan = planned(name, instead, *CLUSTER)
    told = "\n".join(plan.lines())
    assert plan.transport == transport and trains in told and learner in told
    assert plan.engine_spec().dtype == "bfloat16"


@needs_vllm
def test_the_large_example_runs_on_deepspeed_as_it_says(instead: list[str]) -> None:
    plan = planned("gsm8k_qwen_7b.yaml", instead, *CLUSTER, "learner.parallel=deepspeed")
    assert "4 ranks (deepspeed stage 2), one GPU each" in "\n".join(plan.lines())


@needs_vllm
def test_the_cluster_s_example_is_planned_on_a_head_without_gpus(instead: list[str]) -> None:
    plan = planned("cluster/cluster.yaml", instead)
    assert plan.device == "cuda" and plan.transport == "nccl"
    told = "\n".join(plan.lines())
    assert "8 ranks (fsdp2), one GPU each, on the cluster, packed on as few machines as hold them" in told
    with pytest.raises(ConfigError, match="cuda, but this machine has no GPU"):
        planned("cluster/cluster.yaml", instead, "ray.address=null")


def test_the_memory_of_a_7b_model_follows_from_its_config_alone(
    tmp_path: Path, instead: list[str], tiny_folder: Path
) -> None:
    """Qwen2.5-7B's sizes, on a GPU: 2 bytes a parameter with LoRA, half of one of each map with QLoRA."""
    from transformers import AutoTokenizer, Qwen2Config

    from rft.config.learner import LearnerConfig
    from rft.config.schema import ModelConfig
    from rft.preflight.memory import ModelShape, learner_bytes

    Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    shape = ModelShape.of(str(tmp_path), ModelConfig(path=str(tmp_path)))
    assert shape.parameters == 7_615_616_512

    def gib(trained: int = 0, **config: Any) -> float:
        made = LearnerConfig(gradient_checkpointing=True, **config)
        return learner_bytes(shape, made, reference=False, device="cuda", adapter=trained) / 2**30

    lora = gib(80_000_000, adapter={"r": 32})
    assert 16 * 7.6e9 / 2**30 < gib() < 22 * 7.6e9 / 2**30
    assert 2 * 7.6e9 / 2**30 < lora < 2 * 7.6e9 / 2**30 + 16
    assert gib(80_000_000, adapter={"r": 32}, quantize="nf4") < lora - 8


def test_a_hub_that_cannot_be_reached_is_said_so(tmp_path: Path) -> None:
    done = rft("check", "examples/gsm8k_lora.yaml", f"output_dir={tmp_path}", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "'Qwen/Qwen2.5-7B-Instruct' is no folder here and not in the hub's local cache" in done.stderr
    assert "run `hf download Qwen/Qwen2.5-7B-Instruct`" in done.stderr


def test_the_times_of_a_preemption_fit() -> None:
    """A minute is left between the end of the grace and SIGKILL, in every cluster example."""
    for name in ("preempt.sbatch", "rft.sbatch"):
        script = (EXAMPLES / "cluster" / name).read_text()
        (warned,) = re.findall(r"^#SBATCH --signal=(?:B:)?TERM@(\d+)$", script, re.M)
        (grace,) = re.findall(r"train\.stop_grace_s=(\d+)", script)
        assert int(warned) - int(grace) == 60, name
        assert "-eq 75 ]" in script and "scontrol requeue" in script
        subprocess.run(["bash", "-n", EXAMPLES / "cluster" / name], check=True)
    job = yaml.safe_load((EXAMPLES / "cluster" / "job.yaml").read_text())["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    settings = dict(argument.split("=") for argument in container["args"])
    assert pod["terminationGracePeriodSeconds"] - int(settings["train.stop_grace_s"]) == 60
    assert container["command"][0] == "rft", "a shell would keep the signal to itself"
    codes = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {"values": []})["values"]
    }
    assert codes == {75: "Ignore", 76: "Count", 1: "FailJob", 2: "FailJob"}
    load_config(EXAMPLES / "gsm8k_qwen.yaml", container["args"])
