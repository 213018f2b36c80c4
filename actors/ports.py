"""Free TCP ports."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port nobody listens on at this moment; another process may take it before it is used."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])
