"""Files that `rft export` adds to the weights: dtype, model card and lineage; upload to a hub, conversion
to GGUF."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rft.config.load import parse_config
from rft.config.schema import Config, algorithm_name
from rft.errors import ConfigError, ModelError
from rft.metrics.log import read_jsonl
from rft.tools.export import export_adapter, export_run, start_of
from rft.utils import yaml_files
from rft.utils.hashing import file_digest, model_digest

LINEAGE_FILE = "lineage.json"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Publishing:
    """Further outputs of an export. push: a hub repository. gguf: a file, written by `converter`."""

    adapter: bool = False
    dtype: str | None = None
    push: str | None = None
    private: bool = False
    gguf: Path | None = None
    converter: Path | None = None


def publish(run: Path, out: Path, wanted: Publishing) -> list[str]:
    """Export a run's policy with model card and lineage; return lines that describe the work.

    Raises ConfigError with all problems before anything is written.
    """
    problems = _problems(wanted)
    hub = None
    if wanted.push is not None and not problems:
        hub, problems = _open_hub(wanted.push)
    if problems:
        raise ConfigError(problems)
    source = export_adapter(run, out) if wanted.adapter else export_run(run, out)
    lines, lineage = [f"{source} -> {out}"], lineage_of(run)
    if wanted.dtype is not None:
        cast(out, getattr(torch, wanted.dtype))
    (out / LINEAGE_FILE).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(lineage, adapter=wanted.adapter), encoding="utf-8")
    if hub is not None:
        assert wanted.push is not None
        hub.create_repo(wanted.push, private=wanted.private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=wanted.push, folder_path=out, commit_message=f"rft export of {lineage['run']}"
        )
        lines.append(f"{out} -> {getattr(commit, 'commit_url', commit)}")
    if wanted.gguf is not None and wanted.converter is not None:
        convert(out, wanted.gguf, wanted.converter)
        lines.append(f"{out} -> {wanted.gguf}")
    return lines


def _problems(wanted: Publishing) -> list[str]:
    problems = []
    if wanted.dtype not in (None, *DTYPES):
        problems.append(f"--dtype: {wanted.dtype!r} is not one of {', '.join(DTYPES)}")
    if (wanted.gguf is None) != (wanted.converter is None):
        problems.append(
            "--gguf and --converter belong together: the file, and llama.cpp's convert_hf_to_gguf.py"
        )
    if wanted.converter is not None and not wanted.converter.is_file():
        problems.append(
            f"--converter: {wanted.converter} is not a file; name llama.cpp's convert_hf_to_gguf.py"
        )
    if wanted.adapter and wanted.gguf is not None:
        problems.append("--gguf: only a whole model is converted; leave --adapter out")
    if wanted.private and wanted.push is None:
        problems.append("--private: it applies to --push; name a repository there, or remove it")
    return problems


# -- weights -----------------------------------------------------------------------------------------------


def cast(folder: Path, dtype: torch.dtype) -> None:
    """Convert the floating-point weights of a folder, one file at a time, and the dtype in its config."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    config = folder / "config.json"
    if config.exists():
        raw = json.loads(config.read_text(encoding="utf-8"))
        raw["dtype"] = str(dtype).removeprefix("torch.")
        raw.pop("torch_dtype", None)
        config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def convert(folder: Path, out: Path, converter: Path) -> None:
    """Run llama.cpp's converter. Raises ConfigError with its last lines if it fails."""
    command = [sys.executable, str(converter), str(folder), "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not out.exists():
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:]) or "it wrote no file"
        raise ConfigError([f"--converter: {converter} failed with exit code {done.returncode}: {last}"])


# -- lineage -----------------------------------------------------------------------------------------------


def lineage_of(run: Path) -> dict[str, Any]:
    """Return the origin of a model: algorithm and settings, base and data with hashes, last evaluation."""
    if not (run / "config.yaml").exists():
        raise ConfigError([f"{run} is not a run folder: it has no config.yaml"])
    raw = yaml_files.read(run / "config.yaml")
    config = parse_config(raw)
    rows = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    evaluation: dict[str, float] = {}
    for row in rows:
        if measured := {k: v for k, v in row.items() if k.startswith("eval/") and v is not None}:
            evaluation = measured
    algorithm = raw["algorithm"]
    return {
        "run": config.name,
        "rft": version("rft"),
        "algorithm": algorithm if isinstance(algorithm, dict) else {"name": algorithm_name(config.algorithm)},
        "steps": max((row["step"] for row in rows), default=0),
        "planned_steps": config.train.steps,
        "base": base_of(config),
        "data": list(data_of(raw)),
        "rewards": [f.label for f in config.rewards.functions],
        "metrics": evaluation,
        "config": raw,
    }


def base_of(config: Config) -> dict[str, Any]:
    """Return the model that the run trained, with a digest of its weights (None: it is no longer there)."""
    base: dict[str, Any] = {"name": config.model.path, "weights": None}
    if config.warm_start is not None:
        base["warm_start"] = True
    with suppress(ModelError, OSError, ValueError):  # a hub that cannot be reached, a folder that was moved
        folder = start_of(config)
        if Path(folder).is_dir() or config.warm_start is None:
            base["weights"] = model_digest(folder)
    return base


def data_of(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the files of data that a config names, with their hashes; of generated tasks, kind and seed."""
    seen = set()
    for where, section in _data_sections(raw):
        paths = [section.get(key) for key in ("path", "eval_path") if section.get(key)]
        if not paths and not section.get("mixture"):
            shown = {"kind": section.get("kind") or "arithmetic", "seed": section.get("seed", 0)}
            yield {"section": where, **shown}
        for path in paths:
            place = Path(str(path)).expanduser()
            files = sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
            for file in files:
                if file not in seen:
                    seen.add(file)
                    digest = file_digest(file) if file.is_file() else None
                    yield {"section": where, "path": str(file), "sha256": digest}


def _data_sections(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    sections: list[tuple[str, Any]] = [("data", raw.get("data") or {})]
    sections.append(("warm_start.data", (raw.get("warm_start") or {}).get("data")))
    for name, held_out in ((raw.get("eval") or {}).get("sets") or {}).items():
        sections.append((f"eval.sets.{name}.data", held_out.get("data")))
    for where, section in sections:
        if isinstance(section, Mapping):
            yield where, section
            for name, source in (section.get("mixture") or {}).items():
                if isinstance(source, Mapping):
                    yield f"{where}.mixture.{name}", source


def model_card(lineage: Mapping[str, Any], *, adapter: bool = False) -> str:
    """Return the README of a hub repository: the model, how it was made, and its last evaluation."""
    base, algorithm = lineage["base"], lineage["algorithm"]
    name, head = algorithm["name"], ["---", "library_name: peft" if adapter else "library_name: transformers"]
    if "/" in base["name"] and not base["name"].startswith((".", "/", "~")):
        head.append(f"base_model: {base['name']}")
    head += ["tags:", "- rft", f"- {name}", "---"]
    settings = ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in algorithm.items() if k != "name")
    kind = "An adapter for" if adapter else "A model trained from"
    digest, warmed = base["weights"] or "unknown", " after a warm start" if base.get("warm_start") else ""
    text = [
        f"# {lineage['run']}",
        f"{kind} `{base['name']}` with the algorithm `{name}` of rft {lineage['rft']}, {lineage['steps']} of "
        f"{lineage['planned_steps']} steps.",
        f"- base: `{base['name']}`{warmed}, weights `{digest}`",
        f"- settings of the algorithm: {settings or 'defaults'}",
        f"- rewards: {', '.join(f'`{r}`' for r in lineage['rewards']) or 'none'}",
    ]
    rows = [f"| `{k}` | {v:.4g} |" for k, v in lineage["metrics"].items()]
    text += ["", "## Last evaluation", "", "| metric | value |", "|---|---|", *rows] if rows else []
    text += ["", "## Data", ""]
    for part in lineage["data"]:
        if "path" in part:
            text.append(
                f"- `{part['section']}`: `{Path(part['path']).name}`, SHA-256 `{part['sha256'] or 'unknown'}`"
            )
        else:
            text.append(f"- `{part['section']}`: generated task `{part['kind']}`, seed {part['seed']}")
    text += ["", f"The whole config is in `{LINEAGE_FILE}`."]
    return "\n".join(head) + "\n\n" + "\n\n".join(text[:2]) + "\n\n" + "\n".join(text[2:]) + "\n"


# -- the hub -----------------------------------------------------------------------------------------------


def _open_hub(repository: str) -> tuple[Any, list[str]]:
    """Return an authorised client of the hub, and problems of the repository's name or of the token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        api.whoami()
    except HFValidationError as error:
        return None, [f"--push: {error}"]
    except LocalTokenNotFoundError:
        return None, ["--push: there is no token of the hub; set HF_TOKEN to one that may write"]
    except HfHubHTTPError as error:
        return None, [f"--push: the hub refuses the token: {error}; set HF_TOKEN to one that may write"]
    except OSError as error:
        return None, [f"--push: the hub cannot be reached: {error}"]
    return api, []
