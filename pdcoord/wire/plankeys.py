"""The keys of plan signatures from a file that may change, with the clock that signatures are dated by."""

import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pdcoord.protocol.signing import PLAN_SIGNATURE, Doubt, KeysError, PlanKeys, Steering, read_keys
from pdcoord.wire.files import read_regular
from pdcoord.wire.followed import Stamp

_FILE_BYTES_MAX = 1 << 17


def unix_now_s() -> float:
    """Unix time in seconds."""
    return datetime.now(UTC).timestamp()


class KeysFileError(KeysError):
    """A file of keys that cannot be used; the message names it and the remedy.

    Attributes:
        remedy: the message without the file's name.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        super().__init__(f"{path}: {remedy}")
        self.remedy = remedy


class PlanKeysFile:
    """Signs and verifies with what the file last held."""

    name = "plan-keys"

    def __init__(self, path: Path, now_s: Callable[[], float] = unix_now_s) -> None:
        """Reads the file.

        Raises:
            KeysFileError: if it cannot be used.
        """
        self._path = path
        self._now_s = now_s
        self._stamp = Stamp((path,))
        self._stamp.is_changed()
        self._keys = self._read()

    def look(self) -> bool:
        """As `followed.Followed.look`; raises KeysFileError."""
        if not self._stamp.is_changed():
            return False
        self._keys = self._read()
        return True

    def headers(self, what: Steering) -> list[tuple[bytes, bytes]]:
        """The signature as a header."""
        return [(PLAN_SIGNATURE, self._keys.sign(what, self._now_s()))]

    def doubt(self, what: Steering, signature: bytes | None) -> Doubt | None:
        """Why a signature does not count; None if it does."""
        return self._keys.doubt(what, signature, self._now_s())

    def _read(self) -> PlanKeys:
        try:
            mode = stat.S_IMODE(self._path.stat().st_mode)
            raw = read_regular(self._path, _FILE_BYTES_MAX)
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise KeysFileError(self._path, f"cannot be read ({why}); give a readable text file") from error
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            remedy = (
                f"mode {mode:04o} lets everyone at it: chmod o-rwx (a Kubernetes Secret: defaultMode 0440)"
            )
            raise KeysFileError(self._path, remedy)
        if len(raw) > _FILE_BYTES_MAX:
            raise KeysFileError(self._path, f"is longer than {_FILE_BYTES_MAX} bytes; is it a file of keys?")
        try:
            return read_keys(text)
        except KeysError as error:
            raise KeysFileError(self._path, str(error)) from error
