"""`rft export`: dtype, adapter, model card and lineage, the upload to a hub (a local fake), the converter."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rft import checkpoint
from rft.api.runs import Run
from rft.cli import main
from rft.tools.export import weights_of
from rft.tools.model_files import ModelFiles
from rft.tools.publish import data_of, model_card
from rft.utils.hashing import file_digest, model_digest


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "runs" / "sums"
    shutil.copytree(tiny_folder, folder / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    config = {
        "name": "sums",
        "output_dir": str(tmp_path / "runs"),
        "algorithm": {"name": "grpo", "beta": 0.01},
        "model": {"path": str(tiny_folder)},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "rewards": ["math"],
        "eval": {"sets": {"hard": {"data": {"kind": "arithmetic_hard", "seed": 3}}}},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = [
        {"step": 0, "time/wall": 0, "eval/accuracy": 0.25},
        {"step": 4, "time/wall": 1, "eval/accuracy": 0.75, "train/loss": 0.1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_an_export_says_what_it_was_made_of(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--dtype", "bfloat16"]) == 0
    assert {info.dtype for info in ModelFiles(out).tensors.values()} == {"BF16"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    before = load_file(tiny_folder / "model.safetensors")
    name = next(iter(before))
    assert torch.equal(ModelFiles(out).read(name), before[name].to(torch.bfloat16))
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["base"] == {"name": str(tiny_folder), "weights": model_digest(str(tiny_folder))}
    assert lineage["steps"] == 4 and lineage["metrics"] == {"eval/accuracy": 0.75}
    assert lineage["data"] == [
        {
            "section": "data",
            "path": str(tmp_path / "rows.jsonl"),
            "sha256": file_digest(tmp_path / "rows.jsonl"),
        },
        {"section": "eval.sets.hard.data", "kind": "arithmetic_hard", "seed": 3},
    ]
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- rft\n- grpo\n---\n")
    for words in (
        "# sums",
        "`beta: 0.01`",
        "| `eval/accuracy` | 0.75 |",
        lineage["data"][0]["sha256"],
        "`math`",
    ):
        assert words in card
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out).dtype is torch.bfloat16


def test_a_run_that_goes_on_after_its_end_has_a_newer_policy(run: Path, tmp_path: Path) -> None:
    """Its final model is older than its newest checkpoint until the next one is written."""

    def policy(into: Path) -> None:
        shutil.copytree(run / "model", into / "model")
        (into / "model" / "mark").touch()

    (run / "result.json").write_text('{"steps": 4}')
    for step, newer in ((4, False), (6, True)):
        checkpoint.save(run / "checkpoints", step, policy, keep=1, meta={})
        (tmp_path / f"scratch-{step}").mkdir()
        assert main(["export", str(run), str(tmp_path / f"out-{step}")]) == 0
        assert (tmp_path / f"out-{step}" / "mark").exists() == newer
        weights, _ = weights_of(str(run), tmp_path / f"scratch-{step}")
        assert (Path(weights) / "mark").exists() == newer
        assert (Run(run).model_path is None) == newer
    (run / "result.json").write_text('{"steps": 6}')
    assert weights_of(str(run), tmp_path)[0] == str(run / "model")


def test_the_sources_of_a_mixture_are_named() -> None:
    raw = {"data": {"mixture": {"a": {"path": "missing.jsonl"}, "b": {"kind": "sums", "seed": 2}}}}
    assert list(data_of(raw)) == [
        {"section": "data.mixture.a", "path": "missing.jsonl", "sha256": None},
        {"section": "data.mixture.b", "kind": "sums", "seed": 2},
    ]


def test_an_adapter_alone_knows_its_base(run: Path, tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(run), str(tmp_path / "none"), "--adapter"]) == 2
    assert "the run trained no adapter (learner.adapter); leave --adapter out" in capsys.readouterr().err
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
    model.save_pretrained(run / "model" / "adapter")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", str(run), str(adapter), "--adapter"]) == 0
    assert not (adapter / "model.safetensors").exists()
    assert "library_name: peft" in (adapter / "README.md").read_text()
    assert main(["merge", "adapter", str(tiny_folder), str(adapter), "--out", str(merged)]) == 0
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert main(["merge", "adapter", str(other), str(adapter), "--out", str(tmp_path / "x")]) == 2
    assert "wrong base: it was trained on" in capsys.readouterr().err


def test_a_card_names_a_base_of_the_hub(run: Path) -> None:
    lineage = {
        "run": "x", "rft": "0", "algorithm": {"name": "dpo"}, "steps": 1, "planned_steps": 2, "rewards": [],
        "base": {"name": "owner/base", "weights": None}, "data": [], "metrics": {},
    }  # fmt: skip
    assert "\nbase_model: owner/base\n" in model_card(lineage)


def test_the_converter_is_called_and_its_failure_told(run: Path, tmp_path: Path, capsys: Any) -> None:
    script = tmp_path / "convert.py"
    script.write_text(
        "import sys, pathlib\n"
        "assert sys.argv[2] == '--outfile' and pathlib.Path(sys.argv[1], 'config.json').exists()\n"
        "pathlib.Path(sys.argv[3]).write_bytes(b'GGUF')\n"
    )
    words = ["--gguf", str(tmp_path / "m.gguf"), "--converter", str(script)]
    assert main(["export", str(run), str(tmp_path / "out"), *words]) == 0
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF"
    script.write_text("raise SystemExit('Model architecture not supported')")
    words[1] = str(tmp_path / "other.gguf")
    assert main(["export", str(run), str(tmp_path / "out2"), *words]) == 2
    assert "failed with exit code 1: Model architecture not supported" in capsys.readouterr().err


def test_wrong_options_are_named_before_anything_is_written(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["--dtype", "int8", "--gguf", "x.gguf", "--private"]
    assert main(["export", str(run), str(out), *words]) == 2
    told = capsys.readouterr().err
    assert "--dtype: 'int8' is not one of" in told and "--gguf and --converter belong together" in told
    assert "--private: it applies to --push" in told and not out.exists()


# -- the hub -----------------------------------------------------------------------------------------------


class FakeHub(ThreadingHTTPServer):
    """The calls that create a repository and commit files to it, as the hub answers them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.called: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None: ...

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: Any, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.called.append(f"GET {self.path}")
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/whoami-v2":
            return self._answer({"name": "me", "type": "user"})
        if "/api/models/me/sums" in self.path:
            return self._answer({"id": "me/sums", "sha": "0" * 40, "siblings": [], "private": True})
        self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self._body()
        self.server.called.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"{self.server.url}/me/sums", "id": "me/sums"})
        if "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            return self._answer({"files": modes, "commitOid": "0" * 40})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{self.server.url}/me/sums/commit/{'1' * 40}"
            return self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})
        if "validate-yaml" in self.path:
            return self._answer({"errors": [], "warnings": []})
        self._answer({"error": "not found"}, 404)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(hub: FakeHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Export the run to `out` and push it with a token; returns the exit code."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    def export(token: str) -> int:
        monkeypatch.setenv("HF_TOKEN", token)
        return main(["export", str(run), str(tmp_path / "out"), "--push", "me/sums", "--private"])

    return export


def test_a_push_creates_the_repository_and_uploads_every_file(
    hub: FakeHub, push: Callable[[str], int], run: Path, tmp_path: Path, capsys: Any
) -> None:
    assert push("hf_right") == 0, hub.called
    out = tmp_path / "out"
    assert hub.created[0]["name"] == "sums" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert (
        set(hub.files)
        == {f.name for f in out.iterdir()}
        >= {"README.md", "lineage.json", "model.safetensors"}
    )
    assert hub.files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert "/me/sums" in capsys.readouterr().out


def test_a_refused_token_is_told_before_anything_is_written(
    hub: FakeHub, push: Callable[[str], int], tmp_path: Path, capsys: Any
) -> None:
    assert push("hf_wrong") == 2
    assert "--push: the hub refuses the token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not hub.created
