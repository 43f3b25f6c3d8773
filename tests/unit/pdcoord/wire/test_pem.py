"""Each PEM file that cannot be used is told from the others."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pdcoord.extproc.listener import self_signed
from pdcoord.wire.pem import PemError, check_pem, read_validity
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


def signed_leaf(folder: Path) -> tuple[Path, Path]:
    """An authority, and a certificate that it signed for somebody."""
    now, pem = datetime.now(UTC), serialization.Encoding.PEM
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("root", "leaf")]
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
    paths = []
    for name, key in zip(names, keys, strict=True):
        is_root = name is names[0]
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(names[0])
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now).not_valid_after(now + timedelta(1))
        limits = x509.BasicConstraints(ca=is_root, path_length=None)
        builder = builder.add_extension(limits, critical=True)
        paths.append(folder / ("root" if is_root else "leaf"))
        paths[-1].write_bytes(builder.sign(keys[0], hashes.SHA256()).public_bytes(pem))
    return paths[0], paths[1]


def test_an_authority_that_could_verify_nobody_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    root, leaf = signed_leaf(tmp_path)
    check_pem(None, None, root)
    assert "CA:TRUE" in refused(None, None, leaf).remedy
    both = tmp_path / "both"
    both.write_bytes(leaf.read_bytes() + root.read_bytes())
    check_pem(None, None, both)
    check_pem(None, None, pair[0])


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused(None, None, tmp_path / "pipe").remedy


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


def write_dated(
    folder: Path, first_day: int, last_day: int, use: x509.ObjectIdentifier | None = None
) -> tuple[Path, Path]:
    """A pair that is valid from one day to another, counted from today; for any use unless one is given."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dated")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now + timedelta(first_day)).not_valid_after(now + timedelta(last_day))
    if use is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(pem))
    (folder / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return folder / "cert", folder / "key"


def test_a_file_without_dates_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cert"
    for content, said in (
        (None, "cannot be read: "),
        (b"no pem", "holds no certificate in PEM; give another"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PemError) as caught:
            read_validity(path)
        assert (caught.value.part, caught.value.path) == ("cert", path)
        assert caught.value.remedy.startswith(said)


@pytest.mark.parametrize("use", [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
def test_what_a_certificate_may_be_used_for_hides_no_bad_date(
    tmp_path: Path, use: x509.ObjectIdentifier
) -> None:
    cert, key = write_dated(tmp_path, -2, -1, use)
    assert "has expired" in str(ServerTls("listener", cert, key).doubt)
    assert "has expired" in str(ClientTls("upstream", cert, cert=cert, key=key).doubt)


def test_an_expired_pair_is_a_doubt_at_the_start_and_a_fault_at_a_renewal(tmp_path: Path) -> None:
    cert, key = write_dated(tmp_path, -2, -1)
    listener = ServerTls("listener", cert, key)
    upstream = ClientTls("upstream", cert, cert=cert, key=key)
    assert [str(tls.doubt).startswith(f"{cert}: has expired") for tls in (listener, upstream)] == [True, True]
    write_dated(tmp_path, -1, 1)
    assert listener.look()
    assert listener.doubt is None
    in_force = listener.validity
    assert in_force is not None
    assert in_force.ends_s - in_force.begins_s == 2 * 86_400
    write_dated(tmp_path, -4, -1)
    with pytest.raises(PemError, match="has expired"):
        listener.look()
    assert listener.doubt is None, "the last good pair is in force"
    assert listener.validity == in_force
    assert ClientTls("upstream", cert).validity is None, "an authority is shown to nobody"


@pytest.mark.parametrize(("days", "said"), [((-4, -1), "has expired"), ((1, 2), "is not valid yet")])
def test_an_authority_with_bad_dates_is_a_doubt_at_the_start_and_a_fault_at_a_renewal(
    tmp_path: Path, pair: tuple[Path, Path], days: tuple[int, int], said: str
) -> None:
    folder = tmp_path / "authority"
    folder.mkdir()
    authority, _ = write_dated(folder, *days)
    listener, upstream = ServerTls("listener", *pair, authority), ClientTls("upstream", authority)
    assert [str(tls.doubt).startswith(f"{authority}: ") for tls in (listener, upstream)] == [True, True]
    assert said in str(upstream.doubt)
    bad = authority.read_bytes()
    write_dated(folder, -1, 1)
    good = authority.read_bytes()
    for tls in (listener, upstream):
        assert tls.look()
        assert tls.doubt is None
    in_force = upstream.context.inner
    authority.write_bytes(bad + bad)
    for tls in (listener, upstream):
        with pytest.raises(PemError, match=said) as caught:
            tls.look()
        assert (caught.value.part, caught.value.path) == ("ca", authority)
    assert upstream.context.inner is in_force, "the last good one"
    authority.write_bytes(bad + good)
    assert upstream.look(), "one that is good is enough"


def test_a_certificate_that_verifies_nobody_lends_an_expired_authority_no_date(tmp_path: Path) -> None:
    _, leaf = signed_leaf(tmp_path)
    expired, _ = write_dated(tmp_path, -2, -1)
    expired.write_bytes(leaf.read_bytes() + expired.read_bytes())
    assert "has expired" in str(ClientTls("upstream", expired).doubt)


def test_a_bad_pair_and_a_bad_authority_are_both_told(tmp_path: Path) -> None:
    cert, key = write_dated(tmp_path, -2, -1)
    assert str(ServerTls("listener", cert, key, cert).doubt).count("has expired") == 2
