"""Files that a process looks at again: read anew when they change, the last good reading stays in force."""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

LOOK_INTERVAL_S = 1.0


class Followed(Protocol):
    """What is made of files.

    Attributes:
        name: what the files are for, for logs and metrics.
    """

    name: str

    def look(self) -> bool:
        """Read again if the files have changed; True if that replaced what was in force.

        Raises:
            ValueError: if they cannot be used; said once for each change, the last good stays.
        """
        ...


class Stamp:
    """Tells whether any of some files has changed since the last look."""

    def __init__(self, paths: Iterable[Path | None]) -> None:
        self._paths = tuple(path for path in paths if path is not None)
        self._seen: tuple[tuple[int, ...] | None, ...] = ()

    def is_changed(self) -> bool:
        """A file that is gone counts as changed, once."""
        now = tuple(map(_look, self._paths))
        is_changed = now != self._seen
        self._seen = now
        return is_changed


def _look(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    # The mode too: a file may be refused for who can read it, and chmod changes nothing else.
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode


async def follow(
    parts: Iterable[Followed],
    tell: Callable[[str, str | None], None],
    *,
    interval_s: float = LOOK_INTERVAL_S,
) -> None:
    """Look at each from time to time until cancelled.

    Args:
        tell: called with the name when one was replaced, and with why when one could not be.
    """
    followed = tuple(parts)
    while True:
        await asyncio.sleep(interval_s)
        for part in followed:
            try:
                if part.look():
                    tell(part.name, None)
            except ValueError as error:
                tell(part.name, str(error))
