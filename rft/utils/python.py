"""Starting Python processes that a user's files cannot lead astray.

Python looks for modules in the folder of the script, or in the working folder, before its own library: a
`json.py` or `torch.py` there would stand for the real module in every process that rft starts.
"""

from __future__ import annotations

import os
import sys

SAFE_PYTHON = (sys.executable, "-P")
"""The interpreter, without the script's or the working folder in front of its search path."""


def search_path() -> list[str]:
    """This process's search path for another one: the working and the script's folder come last."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    late = {os.getcwd(), *([os.path.dirname(os.path.realpath(script))] if script else [])}
    entries = [entry or os.getcwd() for entry in sys.path]
    entries = list(dict.fromkeys(entries))
    return [e for e in entries if e not in late] + [e for e in entries if e in late]
