"""Certificates and keys of a coordinator process, as settings name them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pdcoord.runtime.process_metrics import CERTIFICATE_EXPIRES
from pdcoord.runtime.secured import RELOADS, SecretError, Secured, SecuredSettings
from pdcoord.runtime.settings import SettingsError, load_settings
from pdcoord.wire.pem import PemError
from pdcoord.wire.validity import Validity

FILES = Path("x")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tls_cert_file": FILES}, "PDCOORD_TLS_CERT_FILE is 'x', which needs PDCOORD_TLS_KEY_FILE"),
        ({"tls_key_file": FILES}, "PDCOORD_TLS_KEY_FILE is 'x', which needs PDCOORD_TLS_CERT_FILE"),
        ({"admin_tls_key_file": FILES}, "PDCOORD_ADMIN_TLS_KEY_FILE is 'x', which needs"),
        ({"tls_client_ca_file": FILES}, "PDCOORD_TLS_CLIENT_CA_FILE is 'x', which needs PDCOORD_TLS_CERT"),
        ({"admin_tls_client_ca_file": FILES}, "PDCOORD_ADMIN_TLS_CLIENT_CA_FILE is 'x', which needs"),
        (
            {"upstream_cert_file": FILES, "upstream_cert_key_file": FILES},
            "PDCOORD_UPSTREAM_CERT_FILE is 'x', which needs PDCOORD_UPSTREAM_CA_FILE",
        ),
        (
            {"upstream_tls_name": "a"},
            "PDCOORD_UPSTREAM_TLS_NAME is 'a', which needs PDCOORD_UPSTREAM_CA_FILE",
        ),
        ({"upstream_tls_name": "a b", "upstream_ca_file": FILES}, "PDCOORD_UPSTREAM_TLS_NAME is 'a b'"),
    ],
)
def test_what_goes_together_is_asked_for_together(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(policy=Path("p"), **given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("tls_cert_file", "tls_key_file"), "PDCOORD_TLS_CERT_FILE is"),
        (("admin_tls_cert_file", "admin_tls_key_file"), "PDCOORD_ADMIN_TLS_CERT_FILE is"),
        (("upstream_ca_file",), "PDCOORD_UPSTREAM_CA_FILE is"),
        (("plan_keys_file",), "PDCOORD_PLAN_KEYS_FILE is"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_setting(
    tmp_path: Path, fields: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "file"
    path.write_text("nothing of use")
    path.chmod(0o600)
    with pytest.raises(SecretError) as caught:
        Secured(SecuredSettings(**dict.fromkeys(fields, path)), structlog.get_logger())
    assert str(caught.value).startswith(said)
    assert str(path) in str(caught.value)
    assert "nothing of use" not in str(caught.value)


def test_without_settings_nothing_is_encrypted_or_signed() -> None:
    made = Secured(SecuredSettings(), structlog.get_logger())
    assert (made.listener, made.admin, made.upstream, made.plan_keys) == (None, None, None, None)


def reloads(secured: Secured) -> list[tuple[tuple[str, ...], float]]:
    return [sample for spec, samples in secured.samples() if spec is RELOADS for sample in samples]


def expiries(secured: Secured) -> dict[tuple[str, ...], float]:
    return dict(
        sample for spec, samples in secured.samples() if spec is CERTIFICATE_EXPIRES for sample in samples
    )


def write_pair(folder: Path, days: int) -> tuple[Path, Path, float]:
    """A pair that is good for so many days, as files, and its last second."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC).replace(microsecond=0)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(days))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(pem))
    (folder / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return folder / "cert", folder / "key", (now + timedelta(days)).timestamp()


def test_the_dates_that_are_shown_are_those_in_force(tmp_path: Path) -> None:
    cert, key, first_s = write_pair(tmp_path, 10)
    settings = SecuredSettings(tls_cert_file=cert, tls_key_file=key, upstream_ca_file=cert)
    made = Secured(settings, structlog.get_logger())
    assert made.listener is not None
    assert expiries(made) == {("listener",): first_s}, "an authority is no certificate of ours"
    _, _, second_s = write_pair(tmp_path, 20)
    assert expiries(made) == {("listener",): first_s}, "not in force yet"
    assert made.listener.look()
    assert expiries(made) == {("listener",): second_s}
    cert.write_text("nothing of use")
    with pytest.raises(PemError):
        made.listener.look()
    assert expiries(made) == {("listener",): second_s}


def test_a_certificate_that_is_followed_elsewhere_is_shown_once_there_is_one() -> None:
    made = Secured(SecuredSettings(), structlog.get_logger())
    there: list[Validity] = []
    made.watch("control", lambda: there[0] if there else None)
    assert expiries(made) == {}
    there.append(Validity(1.0, 2.0))
    assert expiries(made) == {("control",): 2.0}


def test_reloads_are_counted_by_what_they_are_of(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a:" + "s" * 40)
    path.chmod(0o600)
    made = Secured(SecuredSettings(plan_keys_file=path), structlog.get_logger())
    before = reloads(made)
    assert {value for _, value in before} == {0.0}
    made._tell("plan-keys", None)
    made._tell("plan-keys", "why")
    counted = {labels for labels, value in reloads(made) if value}
    assert counted == {("plan-keys", "accepted"), ("plan-keys", "refused")}
