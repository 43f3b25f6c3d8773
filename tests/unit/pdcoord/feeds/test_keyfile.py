"""A file of secrets is checked, followed, and never quoted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pdcoord.feeds.keyfile import SecretFile, parse_admin_key, parse_engine_key
from pdcoord.policy.errors import PolicyError

KEY = b"0123456789abcdef0123456789abcdef"


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def admin(path: Path) -> SecretFile[bytes]:
    return SecretFile(path, "admin-key", parse_admin_key)


def test_white_space_at_the_ends_is_not_part_of_a_key(tmp_path: Path) -> None:
    assert admin(write(tmp_path / "k", b"\n " + KEY + b"\r\n")).load_first() == KEY


@pytest.mark.parametrize(
    ("parse", "content", "said"),
    [
        (parse_admin_key, b"short", "holds 5 bytes, expected 32 to 4096, such as from openssl rand -hex 32"),
        (parse_admin_key, b"s" * 5_000, "holds 5000 bytes"),
        (parse_admin_key, KEY + b" " + KEY, "holds a blank or what is not visible ASCII"),
        (parse_admin_key, "é".encode() * 40, "holds a blank or what is not visible ASCII"),
        (parse_engine_key, b" \n", "holds 0 bytes, expected 1 to 4096"),
        (parse_engine_key, b"a\r\nx: y", "holds a blank or what is not visible ASCII"),
    ],
)
def test_what_no_header_could_bring_or_anybody_could_guess_is_refused(
    tmp_path: Path, parse: Callable[[bytes, str], bytes], content: bytes, said: str
) -> None:
    file = SecretFile(write(tmp_path / "k", content), "k", parse)
    with pytest.raises(PolicyError, match=said) as refused:
        file.load_first()
    assert file.problems == refused.value.problems
    assert (
        content.decode().strip()[:6] not in str(refused.value).replace(str(tmp_path), "")
        or not content.strip()
    )


def test_an_engines_key_may_be_anything_an_engine_takes(tmp_path: Path) -> None:
    assert SecretFile(write(tmp_path / "k", b"EMPTY\n"), "k", parse_engine_key).load_first() == b"EMPTY"


@pytest.mark.parametrize("mode", [0o604, 0o666, 0o602])
def test_a_file_that_everybody_gets_at_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(PolicyError, match=r"lets everyone at it: chmod o-rwx"):
        admin(write(tmp_path / "k", KEY, mode)).load_first()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        admin(tmp_path / "k").load_first()


def test_a_change_counts_when_two_looks_find_it_and_a_bad_one_leaves_the_last_good(tmp_path: Path) -> None:
    path = write(tmp_path / "k", KEY)
    file = admin(path)
    file.load_first()
    assert file.poll() is None
    write(path, KEY[::-1])
    assert file.poll() is None
    assert file.poll() == KEY[::-1]
    assert file.poll() is None
    write(path, b"bad")
    file.poll()
    with pytest.raises(PolicyError):
        file.poll()
    assert file.problems
    assert file.poll() is None
    write(path, KEY)
    file.poll()
    assert (file.poll(), file.problems) == (KEY, ())


def test_a_secret_of_kubernetes_changes_by_its_link(tmp_path: Path) -> None:
    for name, content in (("one", KEY), ("two", KEY[::-1])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "k", content)
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "k").symlink_to("..data/k")
    file = admin(tmp_path / "k")
    assert file.load_first() == KEY
    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").rename(tmp_path / "..data")
    file.poll()
    assert file.poll() == KEY[::-1]


def test_a_file_refused_for_its_mode_is_taken_once_that_is_mended(tmp_path: Path) -> None:
    path = write(tmp_path / "k", KEY)
    file = admin(path)
    file.load_first()
    write(path, KEY[::-1], 0o644)
    file.poll()
    with pytest.raises(PolicyError, match="lets everyone at it"):
        file.poll()
    assert file.poll() is None, "said once"
    path.rename(tmp_path / "away")
    assert file.poll() is None, "what is gone is not taken"
    (tmp_path / "away").rename(path)
    path.chmod(0o600)
    assert file.poll() == KEY[::-1]
    assert file.problems == ()
    assert file.poll() is None
