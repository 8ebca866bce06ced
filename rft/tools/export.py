"""`rft export`: write the policy of a run as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from rft import checkpoint
from rft.config.load import load_config
from rft.config.schema import Config
from rft.errors import ConfigError
from rft.learner.learner import Learner
from rft.plan import make_plan
from rft.preflight.data import warm_start_folder
from rft.preflight.model import resolve_model
from rft.run_dir import final_model

ADAPTER = "adapter"  # subfolder of a model whose run trained an adapter


def export_run(run_dir: Path, out: Path) -> Path:
    """Write a run's final model, or the policy of its newest checkpoint, to `out`; return the source folder.

    Raises ConfigError if `out` is not empty, if the run has neither, or if a model or data that its config
    names is needed and missing.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError([f"{out} is not empty: choose another folder"])
    source = final_model(run_dir)
    if source is None:
        newest = checkpoint.latest(run_dir / "checkpoints")
        if newest is None:
            raise ConfigError(
                [
                    f"{run_dir} has neither a final model nor a checkpoint: name the folder of a "
                    "run that saved one"
                ]
            )
        source = newest.path / "model"
        if not source.exists():  # an adapter checkpoint: the base model is the one the run started from
            _merge_adapter(run_dir / "config.yaml", newest.path, out)
            return newest.path
    shutil.copytree(source, out, dirs_exist_ok=True)
    return source


def export_adapter(run_dir: Path, out: Path) -> Path:
    """Write the adapter of a run's final model, or of its newest checkpoint, to `out`; return the source
    folder.

    Raises ConfigError as `export_run`, and if the run trained no adapter.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError([f"{out} is not empty: choose another folder"])
    source = final_model(run_dir)
    if source is None:
        with TemporaryDirectory(prefix="rft-export-") as scratch:
            newest = export_run(run_dir, Path(scratch) / "model")
            return _copy_adapter(run_dir, Path(scratch) / "model" / ADAPTER, out) and newest
    return _copy_adapter(run_dir, source / ADAPTER, out)


def _copy_adapter(run_dir: Path, source: Path, out: Path) -> Path:
    if not (source / "adapter_config.json").exists():
        raise ConfigError([f"{run_dir}: the run trained no adapter (learner.adapter); leave --adapter out"])
    shutil.copytree(source, out, dirs_exist_ok=True)
    return source


def weights_of(target: str, scratch: Path) -> tuple[str, str]:
    """Return the weights of a model or of a run, and their name: the model itself, a run's final model, or a
    copy of its newest checkpoint in `scratch`, since a run removes its older checkpoints.

    Raises ConfigError as `export_run`.
    """
    run = Path(target)
    if not (run / "checkpoints").is_dir() and not (run / "config.yaml").exists():
        return target, target
    if (final := final_model(run)) is not None:
        return str(final), str(final)
    source = export_run(run, scratch / "model")
    return str(scratch / "model"), str(source)


def start_of(config: Config) -> str:
    """Return the folder or hub name of the weights that a run began to train: the model, or its warm start.

    Raises ModelError if the config's model no longer exists.
    """
    model = resolve_model(config)
    if config.warm_start is None:
        return model
    return str(warm_start_folder(config, config.warm_start, model))


def _merge_adapter(config: Path, newest: Path, out: Path) -> None:
    plan = make_plan(load_config(config), starts=False)
    if (stage := plan.config.warm_start) is not None:
        plan = plan.with_model(str(warm_start_folder(plan.config, stage, plan.model)))
    learner = Learner(plan.learner_spec())
    learner.read_state(newest)
    learner.export(str(out))
