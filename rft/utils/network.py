"""Select the network interface for process groups."""

from __future__ import annotations

import os
import socket


def use_interface_of(host: str) -> None:
    """Make gloo and NCCL use the network interface that reaches `host`: by default they take the one that
    this machine's name resolves to, which is often the loopback."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing; the kernel chooses the route
        address = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return
