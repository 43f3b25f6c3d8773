"""Flags that need each other."""

from typing import Any

import pytest

from sidecar.errors import SettingsError
from sidecar.settings import parse


@pytest.mark.parametrize(
    ("flags", "at", "said"),
    [
        (["--tls-cert-file", "c"], "--tls-cert-file", "give --tls-key-file too"),
        (["--tls-key-file", "k"], "--tls-key-file", "give --tls-cert-file too"),
        (["--tls-client-ca-file", "a"], "--tls-client-ca-file", "give --tls-cert-file too"),
        (["--upstream-cert-key-file", "k"], "--upstream-cert-key-file", "give --upstream-cert-file too"),
        (
            ["--upstream-cert-file", "c", "--upstream-cert-key-file", "k"],
            "--upstream-cert-file",
            "give --upstream-ca-file too",
        ),
        (["--bodies-bytes-max", "2048"], "--bodies-bytes-max", "give no less than --body-bytes-max"),
        (["--upstream-tls-name", "n"], "--upstream-tls-name", "give --upstream-ca-file too"),
        (
            ["--upstream-tls-name", "a b", "--upstream-ca-file", "a"],
            "--upstream-tls-name",
            "give a host's name",
        ),
    ],
)
def test_what_is_of_no_use_alone_is_refused(flags: list[str], at: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(flags, {})
    assert str(caught.value).startswith(at)
    assert said in str(caught.value)


def test_all_of_them_are_taken_together() -> None:
    files: dict[str, Any] = {
        name: name
        for name in (
            "tls-cert",
            "tls-key",
            "tls-client-ca",
            "upstream-ca",
            "upstream-cert",
            "upstream-cert-key",
        )
    }
    flags = [word for name in files for word in (f"--{name}-file", name)]
    made = parse([*flags, "--upstream-tls-name", "n", "--plan-keys-file", "p"], {})
    assert (str(made.tls_client_ca_file), made.upstream_tls_name, str(made.plan_keys_file)) == (
        "tls-client-ca",
        "n",
        "p",
    )
