"""What a process would refuse, or take and ignore, is refused at render with path, value and remedy."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helm_python import HelmError

from pdcoord.runtime.extproc import ExtprocSettings
from pdcoord.runtime.extproc_flags import IGNORED, read_flags
from pdcoord.runtime.settings import CoordinatorSettings, GatewaySettings
from sidecar.settings import FLAGS
from transfer.settings import AgentSettings

MODEL = "models[0] (granite)"
POOL = {"vendor": "nvidia", "linkGbitPerSecond": 100}
SGLANG_DECODE = {**POOL, "name": "d", "role": "decode", "engine": "sglang"}
BOTH_NONE = {**POOL, "name": "b", "role": "both", "connector": "none"}
PEERS = [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}]
ATTACH = {"gateway.mode": "attach", "gateway.attach.gateway.name": "main"}
# (what differs, by path; what the message says)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"autoscaling.mode": "keda", "autoscaling.keda.prometheusAddress": "http://p"}
        | {"models.0.pools.0.autoscaling": {"min": 0, "max": 2}},
        "models[0].pools[0].autoscaling.min is 0: calls for a pool without servers are refused at once",
    ),
    # Pools of which none can serve, or of which no two can split.
    (
        {"models.0.pools": [SGLANG_DECODE]},
        f"pd.enabled is true but no pool of {MODEL} prefills: set role: prefill or both",
    ),
    (
        {"models.0.pools": [{**POOL, "name": "d", "role": "decode"}]},
        f"pd.enabled is true but no pool of {MODEL} prefills",
    ),
    (
        {"models.0.pools.1.connector": "nixl"},
        (
            f'models[0].pools[0].connector is "pdcoord" with role prefill, and no pool of {MODEL} that '
            "decodes has it (models[0].pools[1]: nixl), so this one would never serve: give both one"
        ),
    ),
    (
        {"models.0.pools": [{**BOTH_NONE, "connector": "pdcoord"}, SGLANG_DECODE]},
        (
            f'models[0].pools[1].connector is "sglang" with role decode, and no pool of {MODEL} that '
            "prefills has it (models[0].pools[0]: pdcoord)"
        ),
    ),
    (
        {"models.0.pools": [BOTH_NONE, {**POOL, "name": "d", "role": "decode", "connector": "nixl"}]},
        (
            f"pd.enabled is true but no two pools of {MODEL} that prefill and decode have one connector "
            "(models[0].pools[0]: both, none; models[0].pools[1]: decode, nixl): give them one"
        ),
    ),
    (
        {"models.0.pools": [BOTH_NONE, {**BOTH_NONE, "name": "c"}]},
        "pd.enabled is true but every pool of every model has connector none: nothing could be split",
    ),
    (
        {"models.0.pools.1.terminationGracePeriodSeconds": 20},
        "models[0].pools[1].terminationGracePeriodSeconds is 20, below sidecar.drainSeconds (30)",
    ),
    # The agent's settings.
    (
        {"transfer.settings.lease_s": 5},
        "transfer.settings.lease_s is 5, but the chart sets it: set pd.leaseSeconds",
    ),
    (
        {"transfer.settings.backends": ["tcp"]},
        'transfer.settings.backends is ["tcp"], but the chart sets it: set transfer.backends',
    ),
    (
        {"transfer.settings.chunk_tokens": 5},
        "transfer.settings.chunk_tokens is 5, which is no setting of the agent: give some of backend_options",
    ),
    (
        {"transfer.settings.transfer_timeout_s": 30},
        "transfer.settings.transfer_timeout_s is 30, not below pd.leaseSeconds (30)",
    ),
    (
        {"transfer.settings.backoff_first_s": 6},
        "transfer.settings.backoff_first_s is 6, above transfer.settings.backoff_max_s (5)",
    ),
    ({"transfer.settings.tcp_lanes": 17}, "/transfer/settings/tcp_lanes"),
    # Flags.
    ({"sidecar.args": ["--allow-any"]}, 'sidecar.args[0] is "--allow-any": coordinators name the targets'),
    (
        {"sidecar.args": ["--kv-port", "1", "--drain-s=5"]},
        (
            'sidecar.args[2] is "--drain-s=5", which the chart gives the process itself: '
            "set sidecar.drainSeconds"
        ),
    ),
    ({"sidecar.args": ["--kv-key-file=/a"]}, 'sidecar.args[0] is "--kv-key-file=/a", which the chart gives'),
    ({"sidecar.args": ["--help"]}, 'sidecar.args[0] is "--help", which pdcoord-sidecar does not take here'),
    ({"sidecar.args": ["loud"]}, 'sidecar.args[0] is "loud", which is neither a flag nor the value of one'),
    ({"sidecar.args": ["--answer-ms"]}, "sidecar.args ends with --answer-ms, which needs a value"),
    (
        {"sidecar.args": ["--answer-ms", "--host=::"]},
        'sidecar.args[1] is "--host=::", where the value of --answer-ms belongs: give --answer-ms=VALUE',
    ),
    (
        {"gateway.mode": "envoy", "gateway.extproc.args": ["--secure-serving"]},
        (
            'gateway.extproc.args[0] is "--secure-serving", which the chart gives the process itself: '
            "set gateway.extproc.secureServing"
        ),
    ),
    (
        {**ATTACH, "gateway.extproc.args": ["-pool-name", "main"]},
        'gateway.extproc.args[0] is "-pool-name", which the chart gives the process itself',
    ),
    (
        {**ATTACH, "gateway.extproc.args": ["--zap-encoder=json"]},
        'gateway.extproc.args[0] is "--zap-encoder=json", which pdcoord extproc does not take here',
    ),
    (
        {**ATTACH, "gateway.extproc.args": ["--cert-path=/certs"]},
        'gateway.extproc.args[0] is "--cert-path=/certs", but no volume of the pod has a certificate',
    ),
    (
        {"gateway.extproc.args": ["--fallbacks-max=1"]},
        'gateway.extproc.args is ["--fallbacks-max=1"] but gateway.mode is embedded',
    ),
    # Variables.
    (
        {"coordinator.env.PDCOORD_LOG_LEVEL": "debug"},
        'coordinator.env.PDCOORD_LOG_LEVEL is "debug", but the chart sets it: set coordinator.logLevel',
    ),
    (
        {"coordinator.env.PDCOORD_INFERENCE_POOL": "main"},
        'coordinator.env.PDCOORD_INFERENCE_POOL is "main", but the chart sets it: set adopt.podSelector',
    ),
    ({"coordinator.env.pdcoord_port": "1"}, 'coordinator.env.pdcoord_port is "1", but the chart sets it'),
    (
        {"gateway.mode": "envoy", "coordinator.env.PDCOORD_SECURE_SERVING": "true"},
        'coordinator.env.PDCOORD_SECURE_SERVING is "true", but the chart sets it',
    ),
    (
        {**ATTACH, "coordinator.env.PDCOORD_CERT_PATH": "/a"},
        'coordinator.env.PDCOORD_CERT_PATH is "/a", but no volume of the pod has a certificate',
    ),
    (
        {"coordinator.env.PDCOORD_STREAMS_MAX": "9"},
        (
            'coordinator.env.PDCOORD_STREAMS_MAX is "9", which no setting is named like with gateway.mode '
            "embedded: give some of PDCOORD_ADMIN_HOST"
        ),
    ),
    # Who is let in.
    (
        {**ATTACH, "gateway.extproc.failureMode": "FailOpen", "auth.keysSecret": "api-keys"},
        (
            'gateway.extproc.failureMode is FailOpen with auth.keysSecret "api-keys": without a coordinator '
            "the Gateway would let in calls without a key; set FailClose"
        ),
    ),
    (
        {"coordinator.env.PDCOORD_ADMIN_HOST": "0.0.0.0"},
        (
            'coordinator.env.PDCOORD_ADMIN_HOST is "0.0.0.0", where anybody may ask the admin listener, and '
            "the process would not start: set auth.adminKeySecret"
        ),
    ),
    (
        {**ATTACH, "gateway.extproc.args": ["--admin-host=::"]},
        'gateway.extproc.args[0] gives --admin-host "::", where anybody may ask the admin listener',
    ),
    (
        {**ATTACH, "gateway.extproc.args": ["-admin-host", "0.0.0.0"]},
        'gateway.extproc.args[0] gives --admin-host "0.0.0.0", where anybody may ask the admin listener',
    ),
    (
        {"coordinator.env.PDCOORD_KEYS_FILE": "/a"},
        'coordinator.env.PDCOORD_KEYS_FILE is "/a", but the chart sets it: set auth.keysSecret',
    ),
    (
        {"coordinator.env.PDCOORD_PLAN_KEYS_FILE": "/a"},
        'coordinator.env.PDCOORD_PLAN_KEYS_FILE is "/a", but the chart sets it: set auth.planKeysSecret',
    ),
    (
        {"coordinator.env.PDCOORD_TLS_CERT_FILE": "/a"},
        'coordinator.env.PDCOORD_TLS_CERT_FILE is "/a", but the chart sets it: set gateway.tls.secretName',
    ),
    (
        {"coordinator.env.PDCOORD_UPSTREAM_CA_FILE": "/a"},
        (
            'coordinator.env.PDCOORD_UPSTREAM_CA_FILE is "/a", but the chart sets it: '
            "set auth.internalTls.secretName"
        ),
    ),
    (
        {"sidecar.args": ["--plan-keys-file=/a"]},
        'sidecar.args[0] is "--plan-keys-file=/a", which the chart gives the process itself: set auth',
    ),
    (
        {"sidecar.args": ["--tls-cert-file=/a"]},
        (
            'sidecar.args[0] is "--tls-cert-file=/a", which the chart gives the process itself: '
            "set auth.internalTls.secretName"
        ),
    ),
    (
        {"coordinator.env.PDCOORD_ADMIN_TLS_CLIENT_CA_FILE": "/a"},
        (
            'coordinator.env.PDCOORD_ADMIN_TLS_CLIENT_CA_FILE is "/a", but no volume of the pod has a '
            "certificate for that"
        ),
    ),
    (
        {"gateway.mode": "envoy", "coordinator.env.PDCOORD_TLS_CERT_FILE": "/a"},
        'PDCOORD_TLS_CERT_FILE is "/a", but the chart sets it: set auth.internalTls.secretName',
    ),
    (
        {**ATTACH, "gateway.tls.secretName": "front"},
        'gateway.tls.secretName is "front" but gateway.mode is attach, where the coordinator has no front',
    ),
    # Who may reach /metrics.
    (
        {"networkPolicy.clientsFrom": PEERS, "monitoring.mode": "podmonitor"},
        (
            "networkPolicy.metricsFrom is empty with networkPolicy.clientsFrom set and monitoring.mode "
            "podmonitor: with gateway.mode embedded /metrics is on the port of requests"
        ),
    ),
]
TAKEN: list[dict[str, Any]] = [
    {"models.0.pools": [{**BOTH_NONE, "connector": "pdcoord"}]},
    {"models.0.pools": [BOTH_NONE, {**BOTH_NONE, "name": "c", "connector": "nixl"}]},
    {"models.0.pools.1.terminationGracePeriodSeconds": 30},
    {"sidecar.args": ["--allow", "10.0.0.1:8000", "--body-bytes-max=2048"]},
    {"pd.connector": "nixl", "sidecar.args": ["--kv-key-file=/a"]},
    {**ATTACH, "gateway.extproc.args": ["--fallbacks-max", "1", "--conformance", "-admin-port=8082"]},
    {"coordinator.env": {"PDCOORD_STREAM_IDLE_S": "9", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://o:4317"}},
    {"gateway.mode": "envoy", "coordinator.env.PDCOORD_STREAMS_MAX": "9"},
    {**ATTACH, "auth.keysSecret": "api-keys"},
    {**ATTACH, "auth.planKeysSecret": "plan-keys"},
    {"gateway.tls.secretName": "front"},
    {**ATTACH, "gateway.extproc.args": ["--admin-host", "127.0.0.1", "--admin-port=1"]},
    {"coordinator.env.PDCOORD_ADMIN_HOST": "127.0.0.2"},
    {"coordinator.env.PDCOORD_ADMIN_HOST": "0.0.0.0", "auth.adminKeySecret": "admin"},
    {
        "networkPolicy.clientsFrom": PEERS,
        "networkPolicy.metricsFrom": PEERS,
        "monitoring.mode": "podmonitor",
    },
    {"networkPolicy.clientsFrom": PEERS},
    {"networkPolicy.clientsFrom": PEERS, "monitoring.mode": "podmonitor", "gateway.mode": "envoy"},
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda given: str(given)[:60])
def test_it_is_refused_by_name(render: Any, changed: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError) as caught:
        render(changed(changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("changes", TAKEN, ids=lambda given: str(given)[:60])
def test_its_neighbour_is_taken(render: Any, changed: Any, changes: dict[str, Any]) -> None:
    assert render(changed(changes)).of("Deployment")


def parts(chart_folder: Path, name: str) -> Iterator[str]:
    """The bodies of a list or dict of _refusals.tpl: what it names with gateway.mode embedded, and beside."""
    text = (chart_folder / "templates" / "_refusals.tpl").read_text()
    (body,) = re.findall(rf'define "pdcoord\.{name}" -}}}}\n(.*?)\n{{{{- end -}}}}\n\n', text, re.DOTALL)
    yield from re.split(r"{{- (?:if|else)", body)


def names(chart_folder: Path, name: str, pattern: str) -> list[set[str]]:
    return [set(re.findall(pattern, part)) for part in parts(chart_folder, name)]


def test_the_sidecars_flags_are_all_known(chart_folder: Path) -> None:
    (taken,) = names(chart_folder, "sidecarFlagsSet", r'"(--[a-z-]+)"')
    (free,) = names(chart_folder, "sidecarFlagsFree", r'"(--[a-z-]+)"')
    assert not taken & free
    assert taken | free | {"--allow-any"} == {flag.name for flag in FLAGS}
    assert all(flag.metavar for flag in FLAGS if flag.name in free), "no switches among them"


def test_the_pickers_flags_are_all_known(chart_folder: Path) -> None:
    (taken,) = names(chart_folder, "extprocFlagsSet", r'"(--[a-z-]+)"')
    (free,) = names(chart_folder, "extprocFlagsFree", r'"(--[a-z-]+)"')
    known = set(re.findall(r"(?<![a-z-])(--[a-z][a-z-]+)", read_flags(["--help"], {}).help))
    assert not taken & free
    assert taken | free | {"--cert-path", "--help"} == known
    assert not {flag.removeprefix("--") for flag in taken | free} & set(IGNORED)


@pytest.mark.parametrize(("kind", "is_extproc"), [(GatewaySettings, False), (ExtprocSettings, True)])
def test_the_coordinators_variables_are_all_known(
    chart_folder: Path, kind: type[CoordinatorSettings], is_extproc: bool
) -> None:
    found: list[set[str]] = []
    for name in ("variablesSet", "variablesFree"):
        always, extproc, embedded = names(chart_folder, name, r'"(PDCOORD_[A-Z_]+)"')
        found.append(always | (extproc if is_extproc else embedded))
    assert not found[0] & found[1]
    wanted = {f"PDCOORD_{name.upper()}" for name in kind.model_fields}
    refused = ("PDCOORD_ADMIN_TLS_CLIENT_", "PDCOORD_TLS_CLIENT_", "PDCOORD_CERT_PATH")
    assert found[0] | found[1] == {name for name in wanted if not name.startswith(refused)}


def test_the_agents_settings_are_all_known(chart_folder: Path) -> None:
    (taken,) = names(chart_folder, "agentSettingsSet", r'\n\s+"([a-z_]+)"')
    (free,) = names(chart_folder, "agentSettingsFree", r'"([a-z_]+)"')
    wanted = {field.name for field in fields(AgentSettings)} - {"key"} | {"key_file"}
    assert taken | free == wanted
    assert not taken & free
    schema = json.loads((chart_folder / "values.schema.json").read_text())
    bounds = schema["properties"]["transfer"]["properties"]["settings"]["properties"]
    assert set(bounds) == wanted - {"key_file"}
