"""A TCP proxy on a loopback port that cuts connections at random."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def cutting_proxy(port: int, chance: float, seed: int = 0) -> Iterator[int]:
    """Pass bytes to a local port; cut a connection before a block with this chance. Yields its own port."""
    rng, lock = random.Random(seed), threading.Lock()
    listener = socket.create_server(("127.0.0.1", 0))
    running = threading.Event()
    running.set()

    def passes(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(65536):
                with lock:
                    cut = running.is_set() and rng.random() < chance
                if cut:
                    break
                target.sendall(block)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def accepts() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=passes, args=pair, daemon=True).start()

    thread = threading.Thread(target=accepts, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        running.clear()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(60)
