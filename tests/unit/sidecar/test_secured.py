"""Certificates and keys of the sidecar, as flags name them."""

from pathlib import Path

import pytest

from sidecar.errors import SettingsError
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
