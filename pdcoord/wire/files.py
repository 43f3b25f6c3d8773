"""Files that somebody else may replace by anything at any time, read without waiting for anybody."""

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path, bytes_max: int) -> bytes:
    """What a regular file holds, of more than bytes_max the first bytes_max + 1.

    A pipe, a device or a socket in its place is refused, not waited for: whoever reads would never come back.

    Raises:
        OSError: if it cannot be read, or is no regular file; `strerror` says so.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return file.read(bytes_max + 1)
