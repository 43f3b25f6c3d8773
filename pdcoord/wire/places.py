"""Addresses that a process is told to listen on, tried before anything starts."""

import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass

_ANY = frozenset({"0.0.0.0", "::"})  # noqa: S104  # compared, not listened on
_OF_PORT = frozenset({errno.EADDRINUSE, errno.EACCES, errno.EPERM})


class PlaceError(OSError):
    """An address that cannot be listened on; the message names the setting at fault and the remedy."""


@dataclass(frozen=True, slots=True)
class Place:
    """One address, with the settings that name its parts as an operator would write them."""

    host: str
    port: int
    host_setting: str
    port_setting: str


def check_places(places: Iterable[Place]) -> None:
    """Bind each address and let it go again.

    Raises:
        PlaceError: for the first that is not to be had, or is asked for twice.
    """
    taken: list[Place] = []
    for place in places:
        owner = next((each for each in taken if _overlap(each, place)), None)
        if owner is not None:
            setting = owner.port_setting
            raise PlaceError(f"{place.port_setting} is {place.port}, which {setting} is too; give another")
        _bind(place)
        taken.append(place)


def _overlap(one: Place, other: Place) -> bool:
    is_same_host = one.host == other.host or not _ANY.isdisjoint({one.host, other.host})
    return bool(one.port) and one.port == other.port and is_same_host


def _bind(place: Place) -> None:
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((place.host, place.port))
    except OSError as error:
        why = error.strerror or str(error)
        where = f"[{place.host}]:{place.port}" if ":" in place.host else f"{place.host}:{place.port}"
        if error.errno in _OF_PORT:
            remedy = f"{place.port_setting} is {place.port}; give another"
        else:
            remedy = f"{place.host_setting} is {place.host!r}; give an address of this host"
        raise PlaceError(f"cannot listen on {where}: {why}: {remedy}") from error
