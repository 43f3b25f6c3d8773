"""The dates that are read from a certificate are those that were written."""

import base64
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.wire.validity import Validity, validity_of

KEY = ec.generate_private_key(ec.SECP256R1())
FIRST, LAST = datetime(1951, 1, 1), datetime(9999, 12, 31, 23, 59, 59)  # noqa: DTZ001  # as hypothesis wants
MOMENTS = st.datetimes(FIRST, LAST, timezones=st.just(UTC)).map(lambda moment: moment.replace(microsecond=0))


def make(begins: datetime, ends: datetime, name: str = "n") -> bytes:
    """A certificate in PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
    builder = builder.public_key(KEY.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(begins).not_valid_after(ends)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@given(st.tuples(MOMENTS, MOMENTS).map(sorted), st.text("ab", min_size=1, max_size=64))
def test_both_dates_in_either_form_are_read(moments: list[datetime], name: str) -> None:
    begins, ends = moments
    found = validity_of(make(begins, ends, name))
    assert found == Validity(begins.timestamp(), ends.timestamp())


def test_the_first_certificate_counts_whatever_is_around_it() -> None:
    begins, ends = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    first, other = make(begins, ends), make(begins, datetime(2030, 1, 1, tzinfo=UTC))
    key = KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    expected = Validity(begins.timestamp(), ends.timestamp())
    assert validity_of(key + b"subject=n\n" + first + other) == expected
    assert validity_of(first.replace(b"\n", b"\r\n")) == expected
    assert validity_of(first.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE")) == expected


@given(st.binary(max_size=200))
def test_what_is_no_certificate_is_refused(der: bytes) -> None:
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    for text in (der, pem):
        with pytest.raises(ValueError, match=r"^holds (no certificate in PEM|a certificate whose dates)"):
            validity_of(text)


def test_a_certificate_that_is_cut_short_is_refused() -> None:
    whole = make(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC))
    der = base64.b64decode(b"".join(whole.splitlines()[1:-1]))
    for length in range(len(der) - 1):
        cut = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der[:length])
        with pytest.raises(ValueError, match=r"^holds"):
            validity_of(cut + b"-----END CERTIFICATE-----\n")


def test_dates_are_held_against_the_clock() -> None:
    validity = Validity(100.0, 200.0)
    assert [validity.fault(now_s) for now_s in (100.0, 150.0, 200.0)] == [None, None, None]
    assert str(validity.fault(99.0)).startswith("is not valid yet; look at its dates")
    assert str(validity.fault(201.0)).startswith("has expired; renew it")
