"""Each PEM file that cannot be used is told from the others."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pdcoord.extproc.listener import self_signed
from pdcoord.wire.pem import PemError, check_pem, date_fault
from pdcoord.wire.tls import ClientTls, ServerTls


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


def write_dated(folder: Path, first_day: int, last_day: int) -> tuple[Path, Path]:
    """A pair that is valid from one day to another, counted from today."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dated")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now + timedelta(first_day)).not_valid_after(now + timedelta(last_day))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(pem))
    (folder / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return folder / "cert", folder / "key"


def test_dates_are_held_against_the_clock(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert date_fault(*pair) is None
    assert date_fault(*write_dated(tmp_path, -1, 1)) is None
    assert str(date_fault(*write_dated(tmp_path, -2, -1))).startswith("has expired; renew it")
    assert str(date_fault(*write_dated(tmp_path, 1, 2))).startswith("is not valid yet; look at")


def test_an_expired_pair_is_a_doubt_at_the_start_and_a_fault_at_a_renewal(tmp_path: Path) -> None:
    cert, key = write_dated(tmp_path, -2, -1)
    listener = ServerTls("listener", cert, key)
    upstream = ClientTls("upstream", cert, cert=cert, key=key)
    assert [str(tls.doubt).startswith(f"{cert}: has expired") for tls in (listener, upstream)] == [True, True]
    write_dated(tmp_path, -1, 1)
    assert listener.look()
    assert listener.doubt is None
    write_dated(tmp_path, -2, -1)
    with pytest.raises(PemError, match="has expired"):
        listener.look()
    assert listener.doubt is None, "the last good pair is in force"
