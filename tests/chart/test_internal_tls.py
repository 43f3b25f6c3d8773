"""TLS between parts: who listens with it, who dials with it, and what is refused because it could not."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import HelmError

from pdcoord.runtime.extproc import ExtprocSettings
from pdcoord.runtime.extproc_flags import read_flags
from pdcoord.runtime.settings import CoordinatorSettings, GatewaySettings, load
from sidecar.settings import Settings as SidecarSettings
from sidecar.settings import parse

SECRET = "parts-tls"
FOLDER = "/etc/pdcoord/internal-tls"
CERTIFICATE, KEY, AUTHORITY = (Path(FOLDER, name) for name in ("tls.crt", "tls.key", "ca.crt"))
SETS = ("internal-tls", "internal-tls-envoy", "internal-tls-colocated")
NAMES = dict.fromkeys(SETS, "demo-pdcoord-control.llm.svc") | {"internal-tls-envoy": "parts.llm.example"}
ON = {"auth.internalTls.secretName": SECRET}
ATTACH = {"gateway.mode": "attach", "gateway.attach.gateway.name": "main"}
POOL = {"vendor": "nvidia", "linkGbitPerSecond": 100}
EXISTING = {"matchLabels": {"app": "a"}, "deployment": "a"}
# (what differs, by path; what the message says)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {**ON, **ATTACH},
        (
            'auth.internalTls.secretName is "parts-tls" but gateway.mode is attach, where the Gateway\'s own '
            "proxies dial the servers, in clear and without a certificate of ours: set gateway.mode to envoy"
        ),
    ),
    (
        {"auth.internalTls.serverName": "a.b"},
        'auth.internalTls.serverName is "a.b" but auth.internalTls.secretName is empty',
    ),
    (
        ON
        | {
            "models.0.pools": [
                {**POOL, "name": "p", "role": "prefill", "engine": "sglang"},
                {**POOL, "name": "d", "role": "decode", "engine": "sglang"},
            ]
        },
        'auth.internalTls.secretName is "parts-tls" but models[0].pools[0].engine is sglang with role',
    ),
    (
        ON
        | {"adopt.enabled": True, "models.0.pools.1.existing": {**EXISTING, "matchLabels": {"app": "b"}}}
        | {"models.0.pools.0.existing": {"matchLabels": {"app": "a"}}},
        "models[0].pools[0].existing.deployment is not set: the patch that puts the sidecar in needs",
    ),
    ({"auth.internalTls.serverName": "-a"}, "serverName"),
]
TAKEN: list[dict[str, Any]] = [
    {**ON, "gateway.mode": "envoy"},
    {**ON, "auth.internalTls.serverName": "a.b"},
    {**ON, "models.0.pools": [{**POOL, "name": "b", "role": "both"}, {**POOL, "name": "c", "role": "both"}]}
    | {"models.0.pools.1.engine": "sglang", "models.0.pools.1.connector": "none"},
    ATTACH,
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda given: str(given)[:60])
def test_it_is_refused_by_name(render: Any, changed: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError) as caught:
        render(changed(changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("changes", TAKEN, ids=lambda given: str(given)[:60])
def test_its_neighbour_is_taken(render: Any, changed: Any, changes: dict[str, Any]) -> None:
    assert render(changed(changes)).of("Deployment")


def pods(release: Any) -> Iterator[tuple[str, Mapping[str, Any], dict[str, Any]]]:
    """(name of the owner, pod template, its containers by name)."""
    for owner, template in release.templates():
        spec = template["spec"]
        every = (*spec.get("initContainers", []), *spec["containers"])
        yield owner["metadata"]["name"], template, {given["name"]: given for given in every}


def servers(release: Any) -> list[dict[str, Any]]:
    """Containers by name of each pod that discovery finds."""
    found = [
        containers
        for _, template, containers in pods(release)
        if "llm-d.ai/inference-serving" in template["metadata"]["labels"]
    ]
    assert found
    return found


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def coordinator_settings(release: Any, monkeypatch: pytest.MonkeyPatch) -> CoordinatorSettings:
    """As the process reads them."""
    template = release.one("Deployment", "demo-pdcoord")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    for name, value in variables(container).items():
        monkeypatch.setenv(name, value)
    if container["command"][-1] == "serve":
        return load(GatewaySettings, {})
    return load(ExtprocSettings, read_flags(container["args"], {}).settings)


def is_mounted(template: Mapping[str, Any], container: Mapping[str, Any]) -> bool:
    """Whole, so that a change arrives, with its three files."""
    volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
    for mount in container.get("volumeMounts", []):
        if mount["mountPath"] == FOLDER:
            secret = volumes[mount["name"]]["secret"]
            assert "subPath" not in mount
            assert mount["readOnly"]
            assert {item["path"] for item in secret["items"]} == {"tls.crt", "tls.key", "ca.crt"}
            return bool(secret["secretName"] == SECRET)
    return False


@pytest.mark.parametrize("name", SETS)
def test_every_server_is_behind_a_sidecar_that_asks_for_certificates(release_named: Any, name: str) -> None:
    for containers in servers(release_named(name)):
        settings: SidecarSettings = parse(containers["pdcoord-sidecar"]["args"], {})
        assert (settings.tls_cert_file, settings.tls_key_file) == (CERTIFICATE, KEY)
        assert settings.tls_client_ca_file == AUTHORITY
        assert settings.upstream_ca_file == AUTHORITY
        assert (settings.upstream_cert_file, settings.upstream_cert_key_file) == (CERTIFICATE, KEY)
        assert settings.upstream_tls_name == NAMES[name]


@pytest.mark.parametrize("name", SETS)
def test_the_certificate_is_with_those_who_show_it_and_no_engine(release_named: Any, name: str) -> None:
    holders = {"coordinator", "pdcoord-sidecar", "envoy"}
    for _, template, containers in pods(release_named(name)):
        for called, container in containers.items():
            assert is_mounted(template, container) == (called in holders), called


@pytest.mark.parametrize("name", SETS)
def test_coordinators_dial_with_it_and_verify_the_name(
    release_named: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = coordinator_settings(release_named(name), monkeypatch)
    assert settings.upstream_ca_file == AUTHORITY
    assert (settings.upstream_cert_file, settings.upstream_cert_key_file) == (CERTIFICATE, KEY)
    assert settings.upstream_tls_name == NAMES[name]
    if isinstance(settings, ExtprocSettings):
        assert settings.secure_serving
        assert settings.cert_path == Path(FOLDER)
        assert settings.grpc_client_ca_file == AUTHORITY
        assert (settings.tls_cert_file, settings.tls_key_file) == (CERTIFICATE, KEY)
    else:
        # What clients see is gateway.tls's.
        assert settings.tls_cert_file == Path("/etc/pdcoord/front-tls/tls.crt")
    # A kubelet has no certificate to show.
    assert settings.tls_client_ca_file is None


def test_an_admin_listener_gets_it_where_it_is_beyond_loopback(
    render: Any, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_host = {"coordinator.env.PDCOORD_ADMIN_HOST": "0.0.0.0", "auth.adminKeySecret": "admin"}
    settings = coordinator_settings(render(changed({**ON, **open_host})), monkeypatch)
    assert (settings.admin_tls_cert_file, settings.admin_tls_key_file) == (CERTIFICATE, KEY)
    args = {"gateway.mode": "envoy", "gateway.extproc.args": ["--admin-host", "::"]}
    for changes, is_open in (({**ON, **args, "auth.adminKeySecret": "admin"}, True), (ON, False)):
        env = variables(
            render(changed(changes)).one("Deployment", "demo-pdcoord")["spec"]["template"]["spec"][
                "containers"
            ][0]
        )
        assert ("PDCOORD_ADMIN_TLS_CERT_FILE" in env) == is_open


@pytest.mark.parametrize(
    ("name", "folder"),
    [("internal-tls", FOLDER), ("internal-tls-envoy", "/etc/pdcoord/control-tls")],
)
def test_the_control_stream_has_it_unless_it_has_its_own(
    release_named: Any, name: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = release_named(name)
    settings = coordinator_settings(release, monkeypatch)
    wanted = tuple(Path(folder, file) for file in ("tls.crt", "tls.key", "ca.crt"))
    seen = [(settings.control_cert_file, settings.control_cert_key_file, settings.control_ca_file)]
    for containers in servers(release):
        sidecar = parse(containers["pdcoord-sidecar"]["args"], {})
        if sidecar.control:
            seen += [(sidecar.control_cert_file, sidecar.control_cert_key_file, sidecar.control_ca_file)]
            # The name that it dials is on the certificate: the default is that of the Service.
            assert sidecar.control[0].rpartition(":")[0] == NAMES["internal-tls"]
    assert set(seen) == {wanted}
    assert len(seen) > 1


def test_who_only_prefills_gets_no_key_of_the_control_stream(release_named: Any) -> None:
    for owner, _, containers in pods(release_named("internal-tls")):
        if owner in {"demo-pdcoord-p", "demo-pdcoord-n"} and "pdcoord-sidecar" in containers:
            sidecar = containers["pdcoord-sidecar"]
            settings = parse(sidecar["args"], {})
            assert settings.control == ()
            assert settings.kv_agent is None
            assert settings.plan_keys_file is not None
            assert "/etc/pdcoord/keys" not in {mount["mountPath"] for mount in sidecar["volumeMounts"]}


@pytest.mark.parametrize("name", SETS)
def test_probes_speak_tls_to_ports_that_ask_for_no_certificate(release_named: Any, name: str) -> None:
    for _, _, containers in pods(release_named(name)):
        for called in {"coordinator", "pdcoord-sidecar"} & set(containers):
            container = containers[called]
            for kind in ("startup", "liveness", "readiness"):
                probe = container[f"{kind}Probe"]["httpGet"]
                assert probe["scheme"] == "HTTPS"
                if called == "pdcoord-sidecar":
                    assert probe["port"] == "sidecar-metrics"


@pytest.mark.parametrize("name", SETS)
def test_what_scrapes_knows_whom_to_trust_and_shows_a_certificate_where_asked(
    release_named: Any, name: str
) -> None:
    release = release_named(name)
    monitors = [*release.of("PodMonitor"), *release.of("ServiceMonitor")]
    asked = set()
    for monitor in monitors:
        for endpoint in monitor["spec"].get("podMetricsEndpoints", monitor["spec"].get("endpoints")):
            assert endpoint["scheme"] == "https"
            tls = endpoint["tlsConfig"]
            if monitor["metadata"]["name"] == "demo-pdcoord-coordinator" and name == "internal-tls":
                continue
            assert tls["serverName"] == NAMES[name]
            assert tls["ca"] == {"secret": {"name": SECRET, "key": "ca.crt"}}
            is_client = endpoint["port"] == "http"
            assert tls.get("cert") == ({"secret": {"name": SECRET, "key": "tls.crt"}} if is_client else None)
            assert tls.get("keySecret") == ({"name": SECRET, "key": "tls.key"} if is_client else None)
            asked.add(endpoint["port"])
    assert {"http", "sidecar-metrics"} <= asked


def test_sidecars_of_pods_that_prefill_are_scraped_too(release_named: Any) -> None:
    release = release_named("internal-tls-colocated")
    selector = release.one("Service", "demo-pdcoord-sidecars")["spec"]["selector"]
    for _, template, containers in pods(release):
        labels = template["metadata"]["labels"]
        assert (selector.items() <= labels.items()) == ("pdcoord-sidecar" in containers)


@pytest.mark.parametrize("name", SETS)
def test_services_say_how_their_ports_are_spoken_to(release_named: Any, name: str) -> None:
    ports = [port for service in release_named(name).of("Service") for port in service["spec"]["ports"]]
    schemes = {port["appProtocol"] for port in ports if port["targetPort"] in {8000, 8001, 9400, "metrics"}}
    assert schemes <= {"https"}


def test_the_engines_port_is_nobodys_where_whole_requests_are_served(release_named: Any) -> None:
    policy = release_named("internal-tls-colocated").one("NetworkPolicy", "demo-pdcoord-engines")
    for rule in policy["spec"]["ingress"]:
        assert rule["ports"]
        assert not any(port["port"] <= 8200 <= port.get("endPort", port["port"]) for port in rule["ports"])


@pytest.mark.parametrize("name", SETS[1:])
def test_envoy_shows_it_and_verifies_the_name(release_named: Any, name: str) -> None:
    data = release_named(name).one("ConfigMap", "demo-pdcoord-envoy")["data"]
    clusters = yaml.safe_load(data["envoy.yaml"])["static_resources"]["clusters"]
    protocols = {}
    for cluster in clusters:
        context = cluster["transport_socket"]["typed_config"]
        assert context["sni"] == NAMES[name]
        common = context["common_tls_context"]
        verified = common["combined_validation_context"]
        (subject,) = verified["default_validation_context"]["match_typed_subject_alt_names"]
        assert subject == {"san_type": "DNS", "matcher": {"exact": NAMES[name]}}
        (shown,) = common["tls_certificate_sds_secret_configs"]
        sources = {
            secret["name"]: Path(secret["sds_config"]["path_config_source"]["path"])
            for secret in (shown, verified["validation_context_sds_secret_config"])
        }
        assert set(sources) == {"certificate", "authority"}
        for secret, path in sources.items():
            assert path.parent == Path("/etc/envoy")
            (resource,) = yaml.safe_load(data[path.name])["resources"]
            assert resource["name"] == secret
        protocols[cluster["name"]] = common["alpn_protocols"]
    assert protocols == {"picker": ["h2"], "model_servers": ["http/1.1"]}


def test_off_nothing_of_it_is_there(release_named: Any) -> None:
    for name in ("two-vendors", "envoy", "adopted-envoy"):
        release = release_named(name)
        assert "internal-tls" not in yaml.safe_dump(list(release.objects))
        for envoy in release.of("ConfigMap"):
            assert not {"certificate.yaml", "authority.yaml"} & set(envoy["data"])
