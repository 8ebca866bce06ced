"""What a check prints and imports: no log output of other libraries, and none of the heavy ones."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rft.config.schema import ModelConfig
from rft.preflight.memory import ModelShape
from rft.utils.quiet import ENVIRONMENT, quiet_libraries

CONFIG = """
algorithm: grpo
output_dir: {folder}
model: {{path: tiny}}
data: {{kind: arithmetic, limit: 64}}
rewards: [{{function: math}}]
"""


def test_a_check_prints_the_plan_only(tmp_path: Path) -> None:
    """Makes the tiny model, which saves it with transformers and imports DeepSpeed where it is installed."""
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(folder=tmp_path / "runs"))
    environment = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    command = [sys.executable, "-m", "rft.cli", "check", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    strange = [line for line in done.stdout.splitlines() if not re.match(r"(?=.{13}\S)[a-z ]{12} ", line)]
    assert not strange


def test_libraries_print_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    quiet_libraries()
    quiet_libraries()
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.WARNING)  # as DeepSpeed does when it is imported
        logger.warning("Setting accelerator to CPU")
        logger.error("broken")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().out == "broken\n"
    assert len(logger.filters) == 1


HEAVY = (
    *("ray", "vllm", "deepspeed", "transformers.models", "transformers.modeling_utils"),
    *("torch.nn", "peft", "bitsandbytes"),  # torch is there, but not loaded
    *("scipy", "sympy", "pandas", "pyarrow", "datasets", "matplotlib", "sklearn"),
)
CHECK = """
import json, sys
from rft.cli import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as ended:
    code = ended.code
print("LOADED", code, json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""


def loaded_by(*arguments: str, among: tuple[str, ...] = HEAVY) -> str:
    """The exit code of a command in a fresh process, and the modules that it imported."""
    command = [sys.executable, "-c", CHECK, json.dumps(arguments), json.dumps(among)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return next(x for x in done.stdout.splitlines() if x.startswith("LOADED"))


def test_a_check_imports_what_it_needs_only(tmp_path: Path) -> None:
    """The first check builds the tiny model and counts its parameters; later ones read the count."""
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(folder=tmp_path / "runs"))
    loaded = [loaded_by("check", str(file)) for _ in range(2)]
    assert "transformers.modeling_utils" in loaded[0]
    assert loaded[1] == "LOADED 0 []"


def test_help_and_the_list_of_keys_import_no_libraries_of_a_run() -> None:
    assert loaded_by("--help", among=(*HEAVY, "transformers", "numpy")) == "LOADED 0 []"
    assert loaded_by("config", "learner", among=(*HEAVY, "transformers")) == "LOADED 0 []"


LATE = """
import pickle, sys, threading
from rft.utils.quick_imports import load_torch_late
load_torch_late()
import cloudpickle, torch
assert "torch.nn" not in sys.modules
assert pickle.loads(cloudpickle.dumps(lambda: torch))() is torch and "torch.nn" not in sys.modules
sums = []
threads = [threading.Thread(target=lambda: sums.append(torch.ones(3).sum().item())) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
from torch import Tensor
import torch.nn.functional
print(sums, torch is sys.modules["torch"], isinstance(torch.ones(1), Tensor), hasattr(torch, "nothing"))
"""


def test_torch_is_loaded_at_its_first_use_whatever_the_thread() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert done.stdout == "[3.0, 3.0, 3.0, 3.0] True True False\n", done.stderr


ENGINE = """
import sys, multiprocessing
from rft.rollout.vllm import _quick_processes
main = sys.modules["__main__"]
with _quick_processes(), multiprocessing.get_context("spawn").Pool(1) as pool:
    print(pool.apply(eval, ("__import__('gc').get_threshold()[0]",)))
    print(pool.apply(eval, ("'ray' in __import__('sys').modules",)))
    print(pool.apply(eval, ("'scipy.signal._peak_finding' in __import__('sys').modules",)))
    print(pool.apply(eval, ("__import__('scipy.signal').signal.find_peaks([0, 1, 0])[0].tolist()",)))
print(sys.modules["__main__"] is main)
"""


def test_processes_of_an_engine_import_what_text_needs_only() -> None:
    done = subprocess.run([sys.executable, "-c", ENGINE], capture_output=True, text=True)
    assert done.stdout.split() == ["100000", "False", "False", "[1]", "True"], done.stderr


def test_init_imports_what_it_needs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = [loaded_by("init", f"{number}.yaml") for number in range(2)]
    assert "transformers.modeling_utils" in loaded[0]
    assert loaded[1] == "LOADED 0 []"


FIRST = """
import importlib, sys
from rft.utils.quick_imports import load_torch_late
load_torch_late()
part = importlib.import_module(sys.argv[1])
import torch
for name in sys.argv[1].split(".")[1:]:
    torch = getattr(torch, name)
print(torch is part is sys.modules[sys.argv[1]], part.__spec__.name, len(sys.meta_path))
"""


@pytest.mark.parametrize("part", ["torch.autograd", "torch.utils.data", "torch.distributed"])
def test_a_part_of_torch_that_is_imported_first_runs_once(part: str) -> None:
    """Torch imports it while it is loaded; twice, some parts end the process."""
    plain = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.meta_path))"], capture_output=True
    )
    done = subprocess.run([sys.executable, "-c", FIRST, part], capture_output=True, text=True)
    assert done.stdout.split() == ["True", part, plain.stdout.decode().strip()], done.stderr


BROKEN = """
from rft.utils.quick_imports import load_torch_late
load_torch_late()
import torch
for number in range(2):
    try:
        torch.Tensor
    except ImportError as error:
        print(error)
"""


def test_a_torch_that_cannot_be_loaded_says_so_at_each_use(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libgomp is missing')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, env=environment)
    assert done.stdout == "libgomp is missing\n" * 2, done.stderr


SCANS = """
import importlib.metadata, importlib.util
from rft.utils.quick_imports import Distributions, start_quickly
start_quickly()
import transformers
import transformers.utils.import_utils as quick
spec = importlib.util.spec_from_file_location("transformers.utils.plain", quick.__file__)
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)
assert isinstance(quick.PACKAGE_DISTRIBUTION_MAPPING, Distributions), "the quick scans are not used"
assert not quick.PACKAGE_DISTRIBUTION_MAPPING, "the full table was made"
models = [m.define_import_structure(transformers.__path__[0] + "/models") for m in (plain, quick)]
assert models[0] == models[1] and len(models[0]) > 1
for name in importlib.metadata.packages_distributions():
    versions = [m._is_package_available(name, return_version=True) for m in (plain, quick)]
    assert versions[0] == versions[1], (name, versions)
print("equal")
"""


def test_quick_scans_give_the_results_of_the_plain_ones() -> None:
    done = subprocess.run([sys.executable, "-c", SCANS], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_a_damaged_model_size_is_counted_again(tiny_folder: Path, tmp_path: Path) -> None:
    fresh = ModelShape.of(str(tiny_folder), ModelConfig())
    assert ModelShape.of(str(tiny_folder), ModelConfig(), tmp_path) == fresh
    (file,) = tmp_path.glob("shape-*.json")
    assert ModelShape(**json.loads(file.read_text())) == fresh
    for damaged in ("", "[]", '{"parameters": 1}', file.read_text().replace('"hidden"', '"width"')):
        file.write_text(damaged)
        assert ModelShape.of(str(tiny_folder), ModelConfig(), tmp_path) == fresh
        assert json.loads(file.read_text()) == json.loads(json.dumps(vars(fresh)))


def test_a_program_gets_its_own_settings_of_libraries_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from transformers.utils import logging as settings

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings, "_tqdm_active", True)
    hub_bars, bars = (sys.modules[f"{name}.utils.tqdm"] for name in ("huggingface_hub", "datasets"))
    monkeypatch.setattr(hub_bars, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "_hf_datasets_progress_bars_disabled", False)
    before = settings.get_verbosity()
    settings.set_verbosity_info()
    logger = logging.getLogger("accelerate")
    for filtered in list(logger.filters):  # by commands that ran in this process
        logger.removeFilter(filtered)
    try:
        with quiet_libraries():
            assert settings.get_verbosity() == logging.ERROR and not settings.is_progress_bar_enabled()
            assert datasets.utils.are_progress_bars_disabled() and logger.filters
            assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        assert settings.get_verbosity() == logging.INFO and settings.is_progress_bar_enabled()
        assert not datasets.utils.are_progress_bars_disabled() and not logger.filters
        assert not set(ENVIRONMENT) & set(os.environ)
    finally:
        settings.set_verbosity(before)
