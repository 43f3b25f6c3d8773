"""Certificates and keys of a coordinator process, as settings name them."""

from pathlib import Path
from typing import Any

import pytest
import structlog

from pdcoord.runtime.secured import SecretError, Secured, SecuredSettings
from pdcoord.runtime.settings import SettingsError, load_settings

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


def test_reloads_are_counted_by_what_they_are_of(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a:" + "s" * 40)
    path.chmod(0o600)
    made = Secured(SecuredSettings(plan_keys_file=path), structlog.get_logger())
    ((_, before),) = made.samples()
    assert {value for _, value in before} == {0.0}
    made._tell("plan-keys", None)
    made._tell("plan-keys", "why")
    ((_, after),) = made.samples()
    counted = {labels for labels, value in after if value}
    assert counted == {("plan-keys", "accepted"), ("plan-keys", "refused")}
