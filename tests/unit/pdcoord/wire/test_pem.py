"""Each PEM file that cannot be used is told from the others."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from pdcoord.extproc.listener import self_signed
from pdcoord.wire.pem import PemError, check_pem


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate and its key."""
    key, cert = self_signed()
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "cert").write_bytes(cert)
    return tmp_path / "cert", tmp_path / "key"


def refused(cert: Path | None, key: Path | None, ca: Path | None) -> PemError:
    with pytest.raises(PemError) as caught:
        check_pem(cert, key, ca)
    return caught.value


def test_good_files_and_none_pass(pair: tuple[Path, Path]) -> None:
    check_pem(*pair, pair[0])
    check_pem(None, None, None)


@pytest.mark.parametrize("part", ["cert", "cert_key", "ca"])
@pytest.mark.parametrize(("content", "said"), [(b"no pem", "in PEM; give"), (None, "cannot be read: ")])
def test_the_file_at_fault_is_named(
    part: str, content: bytes | None, said: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    files = {"cert": pair[0], "cert_key": pair[1], "ca": pair[0]} | {part: bad}
    error = refused(files["cert"], files["cert_key"], files["ca"])
    assert (error.part, error.path) == (part, bad)
    assert said in error.remedy


def test_a_key_of_another_certificate(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(self_signed()[0])
    error = refused(pair[0], other, None)
    assert (error.part, error.remedy) == ("cert_key", f"is not the key of {pair[0]}; give that one")


def test_a_key_with_a_passphrase_asks_nobody(pair: tuple[Path, Path]) -> None:
    key = serialization.load_pem_private_key(pair[1].read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"words"),
    )
    pair[1].write_bytes(locked)
    assert "without a passphrase" in refused(*pair, None).remedy
