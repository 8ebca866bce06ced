"""Make (or find) the environment of a peer library: python benchmarks/peers/make_env.py trl

Prints the path of its Python. A peer lives in `.peers/NAME` beside the benchmarks' repository, made from
`requirements-NAME.txt`; packages that this environment already has (torch, transformers) are reused instead
of downloaded again, and whatever version the peer pins otherwise is installed on top, in its own folder.
Set RFT_PEER_TRL=/path/to/python to use one that you made yourself. A second call reuses the first's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".peers"


def peer_python(name: str) -> Path:
    """The Python of peer `name`, whose environment is made first if it is missing or out of date.

    Raises FileNotFoundError for an unknown peer or a wrong override, CalledProcessError when the
    installation fails.
    """
    override = os.environ.get(f"RFT_PEER_{name.upper()}")
    if override:
        if not Path(override).is_file():
            raise FileNotFoundError(f"RFT_PEER_{name.upper()}={override} is not a file; name a Python")
        return Path(override)
    requirements = HERE / f"requirements-{name}.txt"
    if not requirements.is_file():
        known = ", ".join(
            sorted(p.stem.removeprefix("requirements-") for p in HERE.glob("requirements-*.txt"))
        )
        raise FileNotFoundError(f"no peer {name!r}: there is no {requirements.name}; known: {known}")
    folder = ENVIRONMENTS / name
    stamp = folder / "made-from"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.executable.encode()).hexdigest()
    python = folder / "bin" / "python"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"making the environment of {name} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        share = Path(sysconfig.get_path("purelib", vars={"base": str(folder)})) / "shared.pth"
        share.write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True, stdout=sys.stderr
        )
        stamp.write_text(wanted)
    return python


def peer_packages(name: str) -> Path:
    """The folder of packages of peer `name`'s environment. Raises as `peer_python` does."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([peer_python(name), "-c", code], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def run_peer(name: str, script: Path, *arguments: str | Path) -> None:
    """Run `script` in the peer's environment, one thread; its output goes to stderr.

    Raises CalledProcessError when it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(peer_python(name)), str(script), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="the peer: the NAME of a requirements-NAME.txt here")
    print(peer_python(parser.parse_args().name))
