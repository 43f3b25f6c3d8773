"""What is looked at before a coordinator process starts, without any network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pdcoord.feeds.declared import DeclaredFeed
from pdcoord.policy.registry import PolicyRegistry
from pdcoord.runtime.extproc import ExtprocSettings
from pdcoord.runtime.settings import ENV_PREFIX, GatewaySettings, load_settings
from pdcoord.runtime.startup import PICKER_ONLY, StartError, check_start, doubts

POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: m}
model: {name: org/model}
pools:
  - name: both
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    ENDPOINTS
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}
"""
LISTED = 'endpoints: [{name: a, address: "127.0.0.1:9"}]'
SELECTOR = "selector: {match_labels: {a: b}}"


class _Nobody:
    """Takes what the feed tells."""

    def handle(self, _event: object) -> Sequence[object]:
        return ()


def said(folder: Path, where: str = LISTED, environment: dict[str, str] | None = None, **given: Any) -> str:
    path = folder / "policy.yaml"
    path.write_text(POLICY.replace("ENDPOINTS", where))
    settings = load_settings(policy=path, **given)
    files = DeclaredFeed(_Nobody(), PolicyRegistry(path))
    files.load_first()
    return "\n".join(doubts(settings, files, environment or {}))


def test_what_is_meant_is_not_doubted(tmp_path: Path) -> None:
    assert said(tmp_path) == ""
    (tmp_path / "e.yaml").write_text("")
    assert said(tmp_path, SELECTOR, endpoints=tmp_path / "e.yaml") == ""
    assert said(tmp_path, SELECTOR, kubernetes_pods=True) == ""


def test_a_selector_without_endpoints_is_doubted(tmp_path: Path) -> None:
    assert "pools both have a selector, and nothing tells of endpoints" in said(tmp_path, SELECTOR)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "coordinator"])
def test_an_open_control_stream_is_doubted(host: str, tmp_path: Path) -> None:
    assert f"PDCOORD_CONTROL_HOST is {host!r}" in said(tmp_path, control_host=host, control_port=9010)


@pytest.mark.parametrize(
    "given",
    [
        {"control_host": "127.0.0.1", "control_port": 9010},
        {"control_host": "localhost", "control_port": 9010},
        {"control_host": "0.0.0.0"},
        {"control_host": "0.0.0.0", "control_port": 9010, "control_key_file": Path("k")},
    ],
)
def test_a_closed_one_is_not(given: dict[str, Any], tmp_path: Path) -> None:
    assert said(tmp_path, **given) == ""


def test_variables_of_all_processes_are_known(tmp_path: Path) -> None:
    fields = set(GatewaySettings.model_fields) | set(ExtprocSettings.model_fields)
    own = {ENV_PREFIX + field.upper(): "" for field in fields}
    others = {"PDCOORD_SIDECAR_PROT": "1", "PDCOORD_KV_KEY_FILE": "k", "PDCOORD_ADMIN_URL": "u"}
    assert said(tmp_path, environment=own | others) == ""
    assert set(PICKER_ONLY) == set(ExtprocSettings.model_fields) - set(GatewaySettings.model_fields)
    assert "PDCOORD_PORT is meant?" in said(tmp_path, environment={"PDCOORD_PROT": "8080"})


@pytest.mark.parametrize("part", ["KEY", "CERT", "CERT_KEY", "CA"])
def test_a_file_of_the_control_stream_is_named_by_its_variable(part: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef0123")
    (tmp_path / "key").chmod(0o600)
    bad = tmp_path / "bad"
    given: dict[str, Any] = {}
    if part != "KEY":
        given = dict.fromkeys(("control_cert_file", "control_cert_key_file"), bad)
    if part == "CA":
        given["control_ca_file"] = bad
    if part == "CERT_KEY":
        from pdcoord.extproc.listener import self_signed

        (tmp_path / "cert").write_bytes(self_signed()[1])
        given["control_cert_file"] = tmp_path / "cert"
    key = bad if part == "KEY" else tmp_path / "key"
    settings = load_settings(policy=Path("p"), control_port=0, control_key_file=key, **given)
    with pytest.raises(StartError) as caught:
        check_start(settings)
    assert str(caught.value).startswith(f"PDCOORD_CONTROL_{part}_FILE is {str(bad)!r}: ")


def test_a_gateway_that_strangers_reach_without_keys_is_doubted(tmp_path: Path) -> None:
    assert "PDCOORD_HOST is '0.0.0.0', where anybody may use every model" in said(tmp_path, host="0.0.0.0")
    assert said(tmp_path, host="0.0.0.0", keys_file=Path("k")) == ""


def test_an_admin_listener_that_strangers_reach_needs_a_key(tmp_path: Path) -> None:
    given: dict[str, Any] = {"policy": tmp_path / "p", "port": 0, "admin_port": 0, "admin_host": "0.0.0.0"}
    with pytest.raises(
        StartError, match=r"PDCOORD_ADMIN_HOST \(--admin-host\) is '0.0.0.0'.*_ADMIN_KEY_FILE"
    ):
        check_start(load_settings(**given))
    check_start(load_settings(**given, admin_key_file=Path("k")))
