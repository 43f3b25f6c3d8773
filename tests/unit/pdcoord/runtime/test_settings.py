"""Settings come from the environment, the command line goes before it, and errors are one line."""

from pathlib import Path
from typing import Any

import pytest

from pdcoord.runtime.settings import ENV_PREFIX, GatewaySettings, SettingsError, load_settings

PAGE = Path(__file__).parents[4] / "docs" / "gateway.md"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDCOORD_POLICY", raising=False)
    monkeypatch.delenv("PDCOORD_PORT", raising=False)


def test_the_command_line_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCOORD_POLICY", "env.yaml")
    monkeypatch.setenv("PDCOORD_PORT", "9000")
    monkeypatch.setenv("PDCOORD_DRAIN_S", "7.5")
    settings = load_settings(policy=Path("given.yaml"), port=None)
    assert (settings.policy, settings.port, settings.drain_s) == (Path("given.yaml"), 9_000, 7.5)
    assert (settings.host, settings.admin_host) == ("127.0.0.1", "127.0.0.1")


def test_a_kubernetes_service_link_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCOORD_PORT", "tcp://10.96.0.1:80")
    monkeypatch.setenv("PDCOORD_ADMIN_PORT", "tcp://10.96.0.2:80")
    settings = load_settings(policy=Path("p"))
    assert (settings.port, settings.admin_port) == (8080, 8081)


def test_every_fault_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCOORD_PORT", "99999")
    monkeypatch.setenv("PDCOORD_LOG_LEVEL", "loud")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    text = str(caught.value)
    assert "\n" not in text
    assert "PDCOORD_PORT is '99999'" in text
    assert "PDCOORD_LOG_LEVEL is 'loud'" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {},
            "PDCOORD_POLICY is not set and PDCOORD_KUBERNETES_POLICIES is not true: name a policy file, or ",
        ),
        (
            {"policy": Path("p"), "kubernetes_policies": True},
            "PDCOORD_POLICY is 'p' and PDCOORD_KUBERNETES_POLICIES is true: set one of them",
        ),
        (
            {"policy": Path("p"), "endpoints": Path("e"), "kubernetes_pods": True},
            "PDCOORD_ENDPOINTS is 'e' and PDCOORD_KUBERNETES_PODS is true: set one of them",
        ),
        (
            {"policy": Path("p"), "inference_pool": "fleet"},
            "PDCOORD_INFERENCE_POOL is 'fleet', which needs PDCOORD_KUBERNETES_PODS=true",
        ),
        (
            {
                "policy": Path("p"),
                "inference_pool": "f",
                "kubernetes_pods": True,
                "kubernetes_selector": "a=b",
            },
            "PDCOORD_INFERENCE_POOL is 'f' and PDCOORD_KUBERNETES_SELECTOR is 'a=b': the pool has a selector",
        ),
        (
            {"policy": Path("p"), "kubernetes_namespace": "no/namespace"},
            "PDCOORD_KUBERNETES_NAMESPACE is 'no/namespace': ",
        ),
    ],
)
def test_sources_that_contradict_each_other_are_named(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(**given)
    assert str(caught.value).startswith(expected)


def test_kubernetes_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCOORD_KUBERNETES_POLICIES", "true")
    monkeypatch.setenv("PDCOORD_KUBERNETES_PODS", "true")
    monkeypatch.setenv("PDCOORD_INFERENCE_POOL", "fleet")
    settings = load_settings()
    assert (settings.policy, settings.kubernetes_policies, settings.kubernetes_pods) == (None, True, True)
    assert settings.inference_pool == "fleet"


def test_settings_become_bounds() -> None:
    settings = load_settings(policy=Path("p"), body_bytes_max=2_048, stream_idle_s=5.0, scrape_interval_s=0.5)
    assert settings.limits().body_bytes_max == 2_048
    assert settings.limits().stream_idle_s == 5.0
    assert settings.scrape_limits().interval_s == 0.5
    assert settings.paths_limits().interval_s == 2.0
    slow = load_settings(policy=Path("p"), paths_interval_s=60.0).paths_limits()
    assert (slow.interval_s, slow.backoff_s_max) == (60.0, 60.0)


def test_other_processes_variables_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCOORD_SIDECAR_PORT", "x")
    monkeypatch.setenv("PDCOORD_SERVICE_HOST", "10.96.0.1")
    load_settings(policy=Path("p"))


def test_the_page_has_every_setting_with_its_default() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, field in GatewaySettings.model_fields.items():
        default = "" if field.is_required() or field.default is None else f"`{field.default}`"
        row = f"| `{ENV_PREFIX}{name.upper()}` | {default} |".replace("|  |", "| |")
        assert row in page, f"docs/gateway.md has no row that begins with {row}"
    assert page.count(f"\n| `{ENV_PREFIX}") == len(GatewaySettings.model_fields)
