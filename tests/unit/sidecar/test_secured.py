"""Certificates and keys of the sidecar, as flags name them."""

import math
from pathlib import Path

import pytest

from pdcoord.extproc.listener import self_signed
from pdcoord.wire.validity import validity_of
from sidecar.errors import SettingsError
from sidecar.observe import Metrics
from sidecar.secured import Secured
from sidecar.settings import parse


@pytest.mark.parametrize(
    ("flags", "at"),
    [
        (("--tls-cert-file", "--tls-key-file"), "--tls-cert-file"),
        (("--upstream-ca-file",), "--upstream-ca-file"),
        (("--plan-keys-file",), "--plan-keys-file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_flag(
    tmp_path: Path, flags: tuple[str, ...], at: str
) -> None:
    path = tmp_path / "file"
    path.write_text("nothing of use")
    path.chmod(0o600)
    with pytest.raises(SettingsError) as caught:
        Secured(parse([word for flag in flags for word in (flag, str(path))], {}))
    assert str(caught.value).startswith(f"{at} is '{path}'")
    assert "nothing of use" not in str(caught.value)


def test_without_flags_nothing_is_encrypted_or_asked_for() -> None:
    made = Secured(parse([], {}))
    assert (made.listener, made.metrics, made.upstream, made.plan_keys) == (None, None, None, None)


def shown(metrics: Metrics) -> dict[str, float]:
    """Until when each certificate is good, by use."""
    return {
        sample.labels["use"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "pdcoord_sidecar_certificate_expires_timestamp_seconds"
    }


def test_the_dates_that_are_shown_are_those_in_force(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    own_key, own_cert = self_signed()
    key.write_bytes(own_key)
    cert.write_bytes(own_cert)
    pair = ["--tls-cert-file", str(cert), "--tls-key-file", str(key)]
    control = ["--control", "c:9000", "--control-ca-file", str(cert)]
    control += ["--control-cert-file", str(cert), "--control-cert-key-file", str(key)]
    made, metrics = Secured(parse([*pair, *control], {})), Metrics()
    made.show(metrics)
    ends_s = validity_of(own_cert).ends_s
    assert shown(metrics) == {"listener": ends_s, "control": ends_s}
    # The listener keeps what it has; the next control stream would have none.
    cert.unlink()
    assert shown(metrics)["listener"] == ends_s
    assert math.isnan(shown(metrics)["control"])
