"""A file that may change at any time, read only once it has stopped changing."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pdcoord.policy.errors import PolicyError
from pdcoord.policy.yamltext import read_bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """What stood in a file, or why it could not be read.

    Attributes:
        digest: equal for equal contents, and for equal reasons not to have any.
    """

    content: bytes | PolicyError
    digest: bytes


class FileWatch:
    """Notices changes of content, whatever made them.

    Content decides, not the time stamp: a Kubernetes ConfigMap changes by swapping the symbolic link
    that the path leads through, and a write in place may leave time and size as they were. A new
    content counts when two polls in a row find it, so that a file caught half-written, or in the moment
    between an editor's rename and its write, is not judged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._settled: bytes | None = None
        self._pending: bytes | None = None

    def read_now(self) -> Reading:
        """Read the file and take what is found as settled: at a start there is nothing to wait for."""
        reading = self._read()
        self._settled, self._pending = reading.digest, None
        return reading

    def poll(self) -> Reading | None:
        """The file's content once for every change; None where nothing changed or it may still."""
        reading = self._read()
        if reading.digest == self._settled:
            self._pending = None
        elif reading.digest != self._pending:
            self._pending = reading.digest
        else:
            self._settled, self._pending = reading.digest, None
            return reading
        return None

    @property
    def is_settled(self) -> bool:
        """Whether the last look found nothing that may still change."""
        return self._pending is None

    def _read(self) -> Reading:
        try:
            content = read_bytes(self._path, is_watched=True)
        except PolicyError as error:
            return Reading(error, b"!" + str(error).encode(errors="backslashreplace"))
        return Reading(content, hashlib.sha256(content).digest())
