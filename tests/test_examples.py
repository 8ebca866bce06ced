"""Every example of the repository: `rft check` accepts it, and it trains."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from rft.algorithms import ALGORITHMS
from rft.cli import main
from rft.config.load import load_config
from rft.config.schema import algorithm_name
from rft.plan import Plan, make_plan
from rft.report.plan_text import plan_lines
from tests.specs import needs_smollm2, needs_vllm
from tests.venvs import VERIFIERS, python_with

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# Named by their path below examples/, without the suffix. Kubernetes manifests are no configs.
CONFIGS = sorted(
    path.relative_to(EXAMPLES).with_suffix("").as_posix()
    for path in EXAMPLES.rglob("*.yaml")
    if "apiVersion:" not in path.read_text()
)
FROM_THE_HUB = ("gsm8k_qwen", "gsm8k_qwen_7b", "gsm8k_lora", "gsm8k_qlora", "cluster/cluster")
NEED_A_SERVER = ("online/distill_endpoint", "logit_distill_endpoint")  # tests/test_teacher.py runs them
# One for each loop and family of online algorithms. `dpo` and `sft` also run with real actors in
# integration/test_offline_runs.py and test_gguf.py.
RUN_BY_DEFAULT = ("online/grpo", "online/online_dpo", "reward_model")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def varied(runs: Path) -> str:
    """A reward that differs within the groups of an untrained model, whose answers are all wrong."""
    path = runs / "varied.py"
    path.write_text("def varied(completions, **columns): return [len(c) % 2 for c in completions]\n")
    return f"{path}:varied"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A small untrained model of the architecture that the examples name on the hub."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def local(name: str, runs: Path, qwen: Path, tiny_folder: Path) -> list[str]:
    """Overrides for what a machine without a network lacks."""
    overrides = [f"output_dir={runs}"]
    if name in FROM_THE_HUB:
        data = ["data.kind=file", "data.path=examples/data/gsm8k", "data.subset=null"]
        overrides += [f"model.path={qwen}", *data]
    if name == "agents/verifiers":
        overrides.append(f"environment.python={python_with('RFT_VERIFIERS_PYTHON', *VERIFIERS)}")
    if name == "self_training/stage":  # the file that `rft sample` writes
        rows = (EXAMPLES / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()[:32]
        more = {"prompt": "with a hint", "reward": 1.0}
        samples = [{**row, **more, "completion": row["answer"]} for row in map(json.loads, rows)]
        (runs / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        overrides.append(f"data.path={runs / 'samples.jsonl'}")
    if name == "online/distill":
        overrides.append(f"model.reference={tiny_folder}")  # the model of another example's run
    return overrides


CLUSTER = ["ray.address=auto", "ray.device=cuda"]  # GPUs that this machine need not have


def needs(name: str) -> list[pytest.MarkDecorator]:
    """What an example needs that a minimal installation lacks."""
    if name == "agents/verifiers":  # makes a virtual environment
        return [pytest.mark.slow, pytest.mark.timeout(1200)]
    return [needs_vllm] if name in FROM_THE_HUB else [needs_smollm2] if name.startswith("smollm2") else []


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in CONFIGS])
def test_check_accepts_it(
    name: str, runs: Path, qwen: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["data.limit=128", "eval.problems=8", *(CLUSTER if name in FROM_THE_HUB else [])]
    path = str(EXAMPLES / f"{name}.yaml")
    assert main(["check", path, *local(name, runs, qwen, tiny_folder), *few]) == 0
    assert capsys.readouterr().out.strip()


def runnable(name: str) -> object:
    slow = [] if name in RUN_BY_DEFAULT else [pytest.mark.slow]
    return pytest.param(name, marks=[*slow, *(m for m in needs(name) if m is not needs_vllm)])


@pytest.mark.parametrize("name", [runnable(n) for n in CONFIGS if n not in NEED_A_SERVER])
@pytest.mark.timeout(300)
def test_it_trains_for_two_steps(
    name: str, runs: Path, qwen: Path, tiny_folder: Path, varied: str, ray_here: None
) -> None:
    """On the CPU, with the plain engine, and few rows."""
    config = load_config(EXAMPLES / f"{name}.yaml")
    overrides = [
        *local(name, runs, qwen, tiny_folder),
        f"name={name.replace('/', '-')}",
        "warm_start=null",
        "data.limit=64",
        "train.steps=2",
        "train.batch_size=4",
        f"train.num_generations={min(4, config.train.num_generations)}",
        "eval.every=2",
        "eval.problems=4",
        "eval.samples=1",
        "checkpoint.every=0",
        "tracking.display=off",
        "learner.threads=1",
        "rollout.threads=1",
        "rollout.engine=hf",
    ]
    if config.algorithm.online:
        overrides.append(f"rewards=[{{function: math}}, {{function: '{varied}'}}]")
    if name in FROM_THE_HUB:
        overrides += [
            "ray={}",
            "learner.parallel=single",
            "learner.ranks=1",
            "learner.optimizer=adamw",
            "rollout.replicas=1",
            "rollout.tensor_parallel=1",
            "rollout.sampling.max_completion_length=16",
            "sync.transport=auto",
        ]
    assert main(["train", str(EXAMPLES / f"{name}.yaml"), *overrides]) == 0
    run = runs / name.replace("/", "-")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert list(losses) == [1, 2] and all(map(math.isfinite, losses.values()))
    assert (run / "model" / "config.json").exists()


def test_every_algorithm_has_an_example_of_its_name() -> None:
    shown: dict[str, set[str]] = {}
    for name in CONFIGS:
        config = load_config(EXAMPLES / f"{name}.yaml")
        shown.setdefault(algorithm_name(config.algorithm), set()).add(config.name)
    assert all(name in shown.get(name, ()) for name in ALGORITHMS), set(ALGORITHMS) - set(shown)


def test_an_example_is_named_as_its_file() -> None:
    for name in CONFIGS:
        if name not in ("online/base", "cluster/cluster"):
            given = load_config(EXAMPLES / f"{name}.yaml").name
            assert given.replace("-", "_") == name.rpartition("/")[2]


def test_the_data_come_with_their_licence() -> None:
    folder = EXAMPLES / "data" / "gsm8k"
    assert "MIT License" in (folder / "LICENSE").read_text()
    readme = (folder / "README.md").read_text()
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert f"| `{path.name}` | {len(rows)} |" in readme
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000


# -- for GPUs and clusters -----------------------------------------------------------------------------


def planned(name: str, runs: Path, qwen: Path, *more: str) -> Plan:
    return make_plan(load_config(EXAMPLES / f"{name}.yaml", [*local(name, runs, qwen, qwen), *more]))


@needs_vllm
@pytest.mark.parametrize(
    ("name", "transport", "trains", "learner"),
    [
        ("gsm8k_qwen", "nccl", "all parameters, adamw", "1 process on cuda"),
        ("gsm8k_lora", "adapter", "an adapter (lora) of", "1 process on cuda"),
        ("gsm8k_qlora", "nccl", "on a base in nf4, paged_adamw_8bit", "1 process on cuda"),
        ("gsm8k_qwen_7b", "nccl", "all parameters, adamw", "4 ranks (fsdp2), one GPU each"),
    ],
)
def test_plans_for_gpus(name: str, transport: str, trains: str, learner: str, runs: Path, qwen: Path) -> None:
    plan = planned(name, runs, qwen, *CLUSTER)
    text = "\n".join(plan_lines(plan))
    assert plan.transport == transport and trains in text and learner in text
    assert plan.engine_spec().dtype == "bfloat16"


@needs_vllm
def test_the_large_example_runs_on_deepspeed_as_it_says(runs: Path, qwen: Path) -> None:
    plan = planned("gsm8k_qwen_7b", runs, qwen, *CLUSTER, "learner.parallel=deepspeed")
    assert "4 ranks (deepspeed stage 2), one GPU each" in "\n".join(plan_lines(plan))


@needs_vllm
def test_the_cluster_s_example_is_planned_on_a_head_without_gpus(
    runs: Path, qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned("cluster/cluster", runs, qwen)
    assert plan.device == "cuda" and plan.transport == "nccl"
    text = "\n".join(plan_lines(plan))
    assert "8 ranks (fsdp2), one GPU each, on the cluster, packed on as few machines as hold them" in text
    overrides = [*local("cluster/cluster", runs, qwen, qwen), "ray.address=null"]
    assert main(["check", str(EXAMPLES / "cluster" / "cluster.yaml"), *overrides]) == 2
    assert "cuda, but this machine has no GPU" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_said_so(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["check", str(EXAMPLES / "gsm8k_lora.yaml"), f"output_dir={runs}"]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert (
        "'Qwen/Qwen2.5-7B-Instruct' is neither a local folder nor in the local Hugging Face cache" in message
    )
    assert "Run `hf download Qwen/Qwen2.5-7B-Instruct`" in message


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
