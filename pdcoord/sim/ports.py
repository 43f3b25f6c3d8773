"""Free ports for servers that are about to start; each process is given those of a share of its own."""

import contextlib
import itertools
import os
import socket

_PORTS = range(20_000, 32_000)
"""Below those that Linux gives to outgoing connections, one of which could take a port before its server."""
_SHARE_PORTS = 300
"""Neighbours by process id, which start servers at the same time, are given ports from other shares."""
_STRIDE_PORTS = 7
"""An engine listens above its port, too, with one port for each rank; shares no factor with _SHARE_PORTS."""

_asked = itertools.count()


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds now on any address of this host.

    They are free, not held: start their servers soon. None is given again before the rest of the share.

    Raises:
        OSError: if the share of this process has not so many.
    """
    share = range(os.getpid() * _SHARE_PORTS % len(_PORTS), len(_PORTS))[:_SHARE_PORTS]
    found: list[int] = []
    for asked in itertools.islice(_asked, _SHARE_PORTS):
        port = _PORTS[share[asked * _STRIDE_PORTS % _SHARE_PORTS]]
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"{count} free ports were not found between {_PORTS[share[0]]} and {_PORTS[share[-1]]}")
