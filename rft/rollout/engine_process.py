"""The main module of the processes that vLLM spawns: make their imports quick.

Such a process imports the main module of its parent first, which in a replica would be that of Ray's workers.
"""

from __future__ import annotations

from rft.utils.quick_imports import start_quickly

start_quickly()
