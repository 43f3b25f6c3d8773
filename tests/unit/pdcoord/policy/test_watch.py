"""Tests of noticing that a file has changed and has stopped changing."""

import os
from pathlib import Path

from pdcoord.policy.errors import PolicyError
from pdcoord.policy.watch import FileWatch, Reading


def content_of(reading: Reading | None) -> bytes | str | None:
    if reading is None:
        return None
    return str(reading.content) if isinstance(reading.content, PolicyError) else reading.content


def test_a_change_counts_on_the_second_look_and_once(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    watch = FileWatch(path)
    assert content_of(watch.read_now()) == b"1"
    assert [watch.poll(), watch.poll()] == [None, None]
    path.write_bytes(b"2")
    assert [content_of(watch.poll()) for _ in range(4)] == [None, b"2", None, None]


def test_a_file_that_keeps_changing_is_left_alone_until_it_stops(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"")
    watch = FileWatch(path)
    watch.read_now()
    for length in range(1, 5):
        path.write_bytes(b"x" * length)
        assert watch.poll() is None
    assert content_of(watch.poll()) == b"xxxx"


def test_a_change_that_is_taken_back_never_happened(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    watch = FileWatch(path)
    watch.read_now()
    path.write_bytes(b"2")
    assert watch.poll() is None
    path.write_bytes(b"1")
    assert [watch.poll(), watch.poll()] == [None, None]
    path.write_bytes(b"2")
    assert [content_of(watch.poll()) for _ in range(2)] == [None, b"2"]


def test_without_a_first_reading_the_first_content_is_a_change(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    watch = FileWatch(path)
    assert [content_of(watch.poll()) for _ in range(3)] == [None, b"1", None]


def test_the_same_size_and_time_do_not_hide_a_change(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    watch = FileWatch(path)
    watch.read_now()
    before = path.stat()
    path.write_bytes(b"2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [content_of(watch.poll()) for _ in range(2)] == [None, b"2"]


def test_a_file_that_vanishes_and_returns_is_two_changes_or_none(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    watch = FileWatch(path)
    watch.read_now()
    path.unlink()
    assert watch.poll() is None
    path.write_bytes(b"1")
    assert [watch.poll(), watch.poll()] == [None, None]
    path.unlink()
    gone = f"{path}: cannot be read: No such file or directory"
    assert [content_of(watch.poll()) for _ in range(3)] == [None, gone, None]
    path.write_bytes(b"1")
    assert [content_of(watch.poll()) for _ in range(3)] == [None, b"1", None]


def test_a_path_is_followed_through_symbolic_links(tmp_path: Path) -> None:
    """As a kubelet changes a ConfigMap's volume: a new folder, then one rename of the link to it."""
    for number in (1, 2):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "f").write_bytes(str(number).encode())
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "f"
    path.symlink_to(Path("..data") / "f")
    watch = FileWatch(path)
    assert content_of(watch.read_now()) == b"1"
    (tmp_path / "..tmp").symlink_to("..2")
    (tmp_path / "..tmp").rename(tmp_path / "..data")
    (tmp_path / "..1" / "f").unlink()
    assert [content_of(watch.poll()) for _ in range(3)] == [None, b"2", None]
