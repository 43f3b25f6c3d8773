"""Environment variables that look like settings of a process and are none."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP|SCTP)(_|$)")
"""What Kubernetes tells a pod of the Services beside it."""
_LIKENESS = 0.8


def misspelt(
    environment: Mapping[str, str], prefix: str, known: Collection[str], others: Iterable[str] = ()
) -> list[str]:
    """A line for each variable of a prefix that no setting is named after; values are not shown.

    Args:
        known: names of settings, whole and in capitals.
        others: prefixes of other processes' variables, which are not looked at.
    """
    elsewhere = tuple(others)
    found = []
    for given, value in sorted(environment.items()):
        name = given.upper()
        if not name.startswith(prefix) or name in known or (elsewhere and name.startswith(elsewhere)):
            continue
        if value.startswith(("tcp://", "udp://", "sctp://")) or _SERVICE_LINK.search(name):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS)
        remedy = f"; {close[0]} is meant?" if close else "; see the reference of settings"
        found.append(f"{given} is set, and is no setting{remedy}")
    return found
