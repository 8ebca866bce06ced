"""Start Python processes whose imports a user's files cannot shadow.

Python searches the folder of the script, or the working folder, before its standard library: a `json.py` or
`torch.py` there would replace the real module in every process that rft starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

SAFE_PYTHON = (sys.executable, "-P")
"""The interpreter, without the script's or the working folder in front of its search path."""


def search_path() -> list[str]:
    """Return this process's search path for a child, with the working and the script's folder last."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    late = {os.getcwd(), *([os.path.dirname(os.path.realpath(script))] if script else [])}
    entries = [entry or os.getcwd() for entry in sys.path]
    entries = list(dict.fromkeys(entries))
    return [e for e in entries if e not in late] + [e for e in entries if e in late]


def safe_workers() -> dict[str, Any]:
    """Return `ray.init` arguments that make Ray's workers search the working folder last.

    Ray prepends the driver's working folder and its script's folder to their search path.
    """
    from ray.job_config import JobConfig

    def working_folder_last() -> None:  # local, to be pickled by value: rft itself may be in that folder
        import os
        import sys

        here = os.getcwd()
        sys.path[:] = [e for e in sys.path if (e or here) != here] + [here]

    job = JobConfig()
    job._py_driver_sys_path = _Fixed()
    # The variable too: child processes of a worker, such as vLLM's, inherit it.
    environment = {"PYTHONSAFEPATH": "1"}
    return {
        "job_config": job,
        "runtime_env": {"env_vars": environment, "worker_process_setup_hook": working_folder_last},
    }


class _Fixed(list[str]):
    """A list that ignores `extend`."""

    def extend(self, _: Iterable[str]) -> None:
        return
