"""Keys of plan signatures from a file."""

from pathlib import Path

import pytest

from pdcoord.protocol.signing import PLAN_SIGNATURE, Doubt, Steering
from pdcoord.wire.plankeys import KeysFileError, PlanKeysFile

WHAT = Steering(b"POST", b"/v1/completions", b"r")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_file_that_changes_signs_anew_and_a_bad_one_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", f"a:{'s' * 32}\n")
    keys = PlanKeysFile(path, lambda: 100.0)
    ((name, first),) = keys.headers(WHAT)
    assert name == PLAN_SIGNATURE
    assert first.startswith(b"v1;kid=a;ts=100;")
    assert not keys.look()
    write(path, f"b:{'t' * 32}\na:{'s' * 32}\n")
    assert keys.look()
    assert keys.headers(WHAT)[0][1].startswith(b"v1;kid=b;")
    assert keys.doubt(WHAT, first) is None
    write(path, "nonsense")
    with pytest.raises(KeysFileError, match="line 1 is not NAME:SECRET"):
        keys.look()
    assert not keys.look()
    assert keys.doubt(WHAT, first) is None
    assert keys.doubt(WHAT, None) is Doubt.MISSING


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0o600, "cannot be read"),
        (b"a:\xff" + b"s" * 40, 0o600, "not UTF-8 text"),
        (b"a:" + b"s" * 40, 0o644, "lets everyone at it"),
        (b"#" * (1 << 18), 0o600, "is longer than"),
        (b"", 0o600, "there are 0 keys"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(
    tmp_path: Path, content: bytes | None, mode: int, said: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(KeysFileError, match=said) as caught:
        PlanKeysFile(path)
    assert str(path) in str(caught.value)
    assert str(path) not in caught.value.remedy
    assert "sss" not in str(caught.value)


def test_a_file_refused_for_its_mode_is_taken_once_that_is_mended(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", f"a:{'s' * 32}\n")
    keys = PlanKeysFile(path, lambda: 100.0)
    path.write_text(f"b:{'t' * 32}\n")
    path.chmod(0o644)
    with pytest.raises(KeysFileError, match="lets everyone at it"):
        keys.look()
    assert not keys.look(), "said once"
    path.chmod(0o600)
    assert keys.look()
    assert keys.headers(WHAT)[0][1].startswith(b"v1;kid=b;")
