"""A cluster of two nodes that the test starts itself, the second one in a network namespace of its own.

Needs root and `ip`. The two nodes see each other over a pair of virtual interfaces alone, as two machines
would, and share the file system. What a folder that is not shared leads to is tested by hiding one from the
second node in a mount namespace.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import ENV, ROOT

SPACE, HEAD, OTHER = "rft-test", "10.231.77.1", "10.231.77.2"
# A token of its own: Ray would take the user's where there is one, and a cluster has one token only.
CLUSTER = {**ENV, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
RAY = [sys.executable, "-m", "ray.scripts.scripts"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip"),
]


def do(*command: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=CLUSTER)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} -> {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@dataclass
class Cluster:
    address: str
    hidden: Path  # a folder that the second node sees empty


def node(*args: str) -> list[str]:
    return [*RAY, "start", *args, "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    hidden = tmp_path_factory.mktemp("hidden")
    scratch = tmp_path_factory.mktemp("ray")
    port = 6399
    do("ip", "netns", "add", SPACE)
    try:
        do("ip", "link", "add", "rft-a", "type", "veth", "peer", "name", "rft-b", "netns", SPACE)
        do("ip", "addr", "add", f"{HEAD}/24", "dev", "rft-a")
        do("ip", "link", "set", "rft-a", "up")
        inside = ["ip", "netns", "exec", SPACE]
        do(*inside, "ip", "addr", "add", f"{OTHER}/24", "dev", "rft-b")
        do(*inside, "ip", "link", "set", "rft-b", "up")
        do(*inside, "ip", "link", "set", "lo", "up")
        head = node("--head", f"--port={port}", f"--node-ip-address={HEAD}", "--include-dashboard=false")
        do(*head, f"--temp-dir={scratch}")
        start = " ".join(node(f"--address={HEAD}:{port}", f"--node-ip-address={OTHER}"))
        do(*inside, "unshare", "-m", "bash", "-c", f"mount -t tmpfs none {hidden} && {start}")
        yield Cluster(f"{HEAD}:{port}", hidden)
    finally:
        for process in nodes_of(str(scratch)):
            process.kill()
        do("ip", "netns", "del", SPACE, check=False)
        do("ip", "link", "del", "rft-a", check=False)


def nodes_of(scratch: str) -> list:
    """Ray's processes of this cluster, which name its folder or its addresses, and what they started."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if scratch in line or f"{HEAD}:6399" in line:
            found += [process, *process.children(recursive=True)]
    return [p for p in found if p.pid != os.getpid()]


def train(folder: Path, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    small = [
        "train.steps=2",
        "train.batch_size=2",
        "train.num_generations=4",
        "eval.every=0",
        "warm_start=null",
        "rollout.engine=hf",
        "rollout.replicas=2",
        "rollout.sampling.max_completion_length=8",
        "checkpoint.every=0",
        "sync.timeout_s=60",
    ]
    where = [f"output_dir={folder}", "name=cluster", f"ray.address={address}"]
    return subprocess.run(
        [sys.executable, "-m", "rft.cli", "train", "examples/arithmetic.yaml", *where, *small, *more],
        cwd=ROOT,
        env=CLUSTER,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("transport", ["gloo", "file"])
def test_two_nodes_train_one_policy(cluster: Cluster, tmp_path: Path, transport: str) -> None:
    """Replicas stand on both nodes, and both report every version that the learner sends."""
    folder = [f"sync.folder={tmp_path}"] if transport == "file" else []
    done = train(tmp_path, cluster.address, f"sync.transport={transport}", *folder)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "cluster/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert rows[-1]["engine/0/version"] == rows[-1]["engine/1/version"] == 2
    assert max(r["sync/logp_gap"] for r in rows[1:]) < 1e-3
    events = [json.loads(line) for line in (tmp_path / "cluster/events.jsonl").read_text().splitlines()]
    nodes = {e["node"] for e in events if e["kind"] == "engine/started"}
    assert len(nodes) == 2


def test_a_model_that_one_node_lacks_is_told_with_the_node(cluster: Cluster, tiny_folder: Path) -> None:
    model = cluster.hidden / "model"
    shutil.copytree(tiny_folder, model)
    done = train(cluster.hidden.parent / "runs", cluster.address, f"model.path={model}", "model.options={}")
    assert done.returncode == 1
    assert f"{model} does not exist on node" in done.stderr and OTHER in done.stderr
