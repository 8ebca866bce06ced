"""What the machine is: GPU, driver, clocks, memory, processor, versions."""

from __future__ import annotations

import os
from typing import Any

import torch
from harness import settings


def gpu() -> dict[str, Any]:
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "memory_gib": round(p.total_memory / 2**30, 1),
        "processors": p.multi_processor_count,
        "devices": torch.cuda.device_count(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
    }


if __name__ == "__main__":
    s = settings("environment", __doc__)
    host = {
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    s.finish({"host": host, "gpu": None if s.small else gpu()})
