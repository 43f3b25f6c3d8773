"""A watched file is read if it is one, and nothing else is waited for."""

import os
import socket
from pathlib import Path

import pytest

from pdcoord.wire.files import read_regular


def test_a_file_is_read_through_links_and_no_further_than_one_byte_past_the_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_regular(tmp_path / "link", 10) == b"0123456789"
    assert read_regular(tmp_path / "link", 4) == b"01234"


def test_a_pipe_that_nobody_writes_to_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        read_regular(tmp_path / "pipe", 10)


def test_so_is_whatever_else_is_no_file(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (tmp_path, tmp_path / "socket", Path(os.devnull), tmp_path / "missing"):
            with pytest.raises(OSError):  # noqa: PT011  # which of several the kernel says first is its own
                read_regular(path, 10)
