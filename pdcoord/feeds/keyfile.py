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
        return None if reading is None else self._use(reading)

    def _use(self, reading: Reading) -> Content:
        try:
            if isinstance(reading.content, PolicyError):
                raise reading.content
            self._check_mode()
            content = self._parse(reading.content, str(self.path))
        except PolicyError as error:
            self.problems = error.problems
            raise
        self.problems = ()
        return content

    def _check_mode(self) -> None:
        try:
            mode = stat.S_IMODE(self.path.stat().st_mode)
        except OSError:
            return  # Gone again between the two looks; the next one says so.
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            remedy = (
                f"mode {mode:04o} lets everyone at it: chmod o-rwx (a Kubernetes Secret: defaultMode 0440)"
            )
            raise refused(str(self.path), remedy)


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
