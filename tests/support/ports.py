"""Ports that nobody takes by chance: below those that the system gives to whoever asks for any."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of loopback that is free now, and that no outgoing connection gets until it is listened on."""
    first = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    for port in random.SystemRandom().sample(range(10_000, max(first, 20_000)), 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
