"""Files that hold secrets and may be replaced at any time: the last good content stays in force."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from pdcoord.policy.errors import PolicyError, Problem
from pdcoord.policy.watch import FileWatch, Reading

Content = TypeVar("Content")

SECRET_BYTES_MAX = 4_096
ADMIN_KEY_BYTES_MIN = 32
"""What `openssl rand -hex 16` prints; an engine's key is not ours to judge."""
_OF_ALL = stat.S_IROTH | stat.S_IWOTH
_VISIBLE_BYTES = frozenset(range(0x21, 0x7F))


class SecretFile(Generic[Content]):
    """What is made of a file of secrets, looked at again from time to time.

    Args:
        name: what it is for, in logs and metrics.
        parse: of its bytes and its name; raises PolicyError.

    Attributes:
        problems: why what the file holds now is not in force; empty when it is.
    """

    def __init__(self, path: Path, name: str, parse: Callable[[bytes, str], Content]) -> None:
        self.path = path
        self.name = name
        self.problems: tuple[Problem, ...] = ()
        self._parse = parse
        self._watch = FileWatch(path)
        self._open_to_all: Reading | None = None

    def load_first(self) -> Content:
        """What a process starts with.

        Raises:
            PolicyError: if the file cannot be used.
        """
        return self._use(self._watch.read_now())

    def poll(self) -> Content | None:
        """What the file holds, once for every change; a change counts when two polls in a row find it.

        Raises:
            PolicyError: if it changed to what cannot be used.
        """
        reading = self._watch.poll()
        refused_before = self._open_to_all if self._watch.is_settled else None
        if reading is None and refused_before is not None and self._is_mended():
            reading = refused_before  # chmod changes no content, which is what is watched.
        return None if reading is None else self._use(reading)

    def _use(self, reading: Reading) -> Content:
        try:
            self._open_to_all = None
            if isinstance(reading.content, PolicyError):
                raise reading.content
            self._check_mode(reading)
            content = self._parse(reading.content, str(self.path))
        except PolicyError as error:
            self.problems = error.problems
            raise
        self.problems = ()
        return content

    def _check_mode(self, reading: Reading) -> None:
        mode = self._mode()
        if mode is not None and mode & _OF_ALL:
            self._open_to_all = reading
            remedy = (
                f"mode {mode:04o} lets everyone at it: chmod o-rwx (a Kubernetes Secret: defaultMode 0440)"
            )
            raise refused(str(self.path), remedy)

    def _is_mended(self) -> bool:
        mode = self._mode()
        return mode is not None and not mode & _OF_ALL

    def _mode(self) -> int | None:
        try:
            return stat.S_IMODE(self.path.stat().st_mode)
        except OSError:
            return None  # Gone again between two looks; the next one says so.


def refused(file: str, message: str) -> PolicyError:
    """A whole file that is not taken."""
    return PolicyError([Problem(file, None, (), message)])


def parse_admin_key(raw: bytes, file: str) -> bytes:
    """The admin listener's key, without white space at its ends.

    Raises:
        PolicyError: if it is too short to be safe, or no header could bring it.
    """
    return _parse_key(raw, file, ADMIN_KEY_BYTES_MIN)


def parse_engine_key(raw: bytes, file: str) -> bytes:
    """The key that engines ask for, without white space at its ends.

    Raises:
        PolicyError: if it is empty, or no header could bring it.
    """
    return _parse_key(raw, file, 1)


def _parse_key(raw: bytes, file: str, bytes_min: int) -> bytes:
    key = raw.strip()
    if not bytes_min <= len(key) <= SECRET_BYTES_MAX:
        sizes = f"{bytes_min} to {SECRET_BYTES_MAX}"
        raise refused(file, f"holds {len(key)} bytes, expected {sizes}, such as from openssl rand -hex 32")
    if not _VISIBLE_BYTES.issuperset(key):
        raise refused(
            file, "holds a blank or what is not visible ASCII; give one word, as openssl rand -hex 32"
        )
    return key
