"""What the rendered objects say to each other, to our own processes, and to whom they lend what."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdcoord.protocol.headers import parse_host_port
from pdcoord.runtime.extproc import ExtprocSettings
from pdcoord.runtime.extproc_flags import read_flags
from pdcoord.runtime.settings import CoordinatorSettings, GatewaySettings, load
from sidecar.settings import Settings as SidecarSettings
from sidecar.settings import parse
from transfer.settings import settings_from_mapping

LEASE_S = 30
ENGINE_STOP_S = 10
KEY_MODE = 0o440


def containers(template: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def ours(release: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Containers that the chart makes, with their pod template and its owner; foreign ones left out."""
    for owner, template in release.templates():
        is_patched = "Patched" in owner["metadata"].get("annotations", {})
        for container in containers(template):
            if not is_patched or container["name"] == "pdcoord-sidecar":
                yield owner, template, container


def environment(container: Mapping[str, Any]) -> dict[str, str]:
    """As the pod will have it, with plain stand-ins for what Kubernetes fills in."""
    known = {"metadata.name": "demo-0", "metadata.namespace": "llm", "status.podIP": "10.0.0.7"}
    found: dict[str, str] = {}
    for entry in container.get("env", []):
        if "value" in entry:
            found[entry["name"]] = expanded(entry["value"], found)
        elif "fieldRef" in entry["valueFrom"]:
            found[entry["name"]] = known[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            found[entry["name"]] = "from-a-secret"
    return found


def expanded(text: str, env: Mapping[str, str]) -> str:
    """Kubernetes' $(NAME); what is not defined earlier stays as it is."""
    return re.sub(r"\$\(([A-Z_]+)\)", lambda match: env.get(match[1], match[0]), text)


def coordinator(release: Any) -> Any:
    return release.one("Deployment", "demo-pdcoord")["spec"]["template"]["spec"]["containers"][0]


def sidecars(release: Any) -> list[SidecarSettings]:
    return [
        parse([expanded(text, environment(container)) for text in container["args"]], environment(container))
        for _, _, container in ours(release)
        if container["name"] == "pdcoord-sidecar"
    ]


def test_coordinators_take_their_settings(release: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    container = coordinator(release)
    env = environment(container)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    is_gateway = release.values["gateway"]["mode"] == "embedded"
    kind: type[CoordinatorSettings] = GatewaySettings if is_gateway else ExtprocSettings
    assert container["command"] == ["pdcoord", "serve" if is_gateway else "extproc"]
    if is_gateway:
        assert "args" not in container
        settings = load(kind, {})
    else:
        flags = read_flags(container["args"], env)
        assert not flags.ignored, "the chart passes no flag in vain"
        settings = load(kind, flags.settings)
    unknown = [name for name in env if name.removeprefix("PDCOORD_").lower() not in kind.model_fields]
    assert unknown == [], "every variable is a setting"
    assert settings.kubernetes_pods
    assert settings.kubernetes_namespace == "llm"
    assert settings.kubernetes_policies == (release.values["policy"]["source"] == "crd")
    grace_s = release.one("Deployment", "demo-pdcoord")["spec"]["template"]["spec"][
        "terminationGracePeriodSeconds"
    ]
    assert grace_s >= settings.drain_notice_s + settings.drain_s


def test_sidecars_take_their_flags_and_dial_every_coordinator(release: Any) -> None:
    is_pd = release.values["pd"]["enabled"]
    is_tls = bool(release.values["auth"]["internalTls"]["secretName"])
    found = sidecars(release)
    assert bool(found) == (is_pd or is_tls)
    # Those that only end TLS hand nothing over, and have nobody to tell.
    reporting = [settings for settings in found if settings.control]
    assert bool(reporting) == is_pd
    for settings in reporting:
        assert [str(target) for target in settings.control] == ["demo-pdcoord-control.llm.svc:9010"]
        assert settings.allow_from_control
        assert settings.transfer_deadline_ms < LEASE_S * 1000
    for settings in found:
        assert settings.metrics_host == "0.0.0.0"
        assert is_tls or settings.control


def files_of(template: Mapping[str, Any], container: Mapping[str, Any]) -> dict[str, str]:
    """Files in a container by path, each with its Secret; those alone that are named."""
    volumes = {given["name"]: given for given in template["spec"]["volumes"]}
    return {
        f"{mount['mountPath']}/{item['path']}": volumes[mount["name"]]["secret"]["secretName"]
        for mount in container["volumeMounts"]
        for item in volumes[mount["name"]].get("secret", {}).get("items", [])
    }


@pytest.mark.parametrize("name", ["envoy", "adopted"])
def test_certificates_of_the_control_stream_are_where_both_sides_look(
    release_named: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides show one and ask for one, as they read their own flags and variables."""
    release = release_named(name)
    sidecars_seen = 0
    for _, template, container in ours(release):
        files = files_of(template, container)
        if container["name"] == "pdcoord-sidecar":
            sidecar = parse(container["args"], environment(container))
            looked_at = (sidecar.control_cert_file, sidecar.control_cert_key_file, sidecar.control_ca_file)
            sidecars_seen += 1
        elif container["name"] == "coordinator":
            for variable, value in environment(container).items():
                monkeypatch.setenv(variable, value)
            settings = load(CoordinatorSettings, {})
            looked_at = (
                settings.control_cert_file,
                settings.control_cert_key_file,
                settings.control_ca_file,
            )
        else:
            continue
        assert [path and path.name for path in looked_at] == ["tls.crt", "tls.key", "ca.crt"]
        assert {files[str(path)] for path in looked_at} == {"control-tls"}
    assert sidecars_seen


@pytest.mark.parametrize("name", ["envoy", "mixed"])
def test_keys_are_where_the_coordinator_looks(
    release_named: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole volume each, so that a change of the Secret arrives, of a mode that the process takes."""
    release = release_named(name)
    for _, template, container in ours(release):
        if container["name"] != "coordinator":
            continue
        for variable, value in environment(container).items():
            monkeypatch.setenv(variable, value)
        settings = load(CoordinatorSettings, {})
        files = files_of(template, container)
        looked_at = (settings.keys_file, settings.admin_key_file, settings.engine_key_file)
        assert [files[str(path)] for path in looked_at] == ["api-keys", "admin", "engine"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for path in looked_at:
            mount = mounts[str(path.parent)] if path is not None else {}
            assert "subPath" not in mount
            assert volumes[mount["name"]]["secret"]["defaultMode"] == 0o440


def test_plan_keys_are_where_each_side_looks(release_named: Any) -> None:
    sides = set()
    for _, template, container in ours(release_named("mixed")):
        if container["name"] == "coordinator":
            path = environment(container)["PDCOORD_PLAN_KEYS_FILE"]
        elif container["name"] == "pdcoord-sidecar":
            path = str(parse(container["args"], {}).plan_keys_file)
        else:
            continue
        sides.add(container["name"])
        assert files_of(template, container)[path] == "plan-keys"
        assert all("subPath" not in mount for mount in container["volumeMounts"])
    assert sides == {"coordinator", "pdcoord-sidecar"}


def test_a_front_door_with_a_certificate_is_asked_by_https_everywhere(release_named: Any) -> None:
    release = release_named("mixed")
    for _, template, container in ours(release):
        if container["name"] != "coordinator":
            continue
        files, variables = files_of(template, container), environment(container)
        paths = [variables[f"PDCOORD_TLS_{part}_FILE"] for part in ("CERT", "KEY")]
        assert [files[path] for path in paths] == ["front-tls", "front-tls"]
        probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
        assert {probe["scheme"] for probe in probes} == {"HTTPS"}
    ports = [port for service in release.of("Service") for port in service["spec"]["ports"]]
    assert {port["appProtocol"] for port in ports if port.get("targetPort") == "http"} == {"https"}
    plain = coordinator(release_named("two-vendors"))
    assert plain["readinessProbe"]["httpGet"]["scheme"] == "HTTP"


def test_without_keys_none_is_looked_for(release_named: Any) -> None:
    names = environment(coordinator(release_named("two-vendors")))
    assert not {"PDCOORD_KEYS_FILE", "PDCOORD_ADMIN_KEY_FILE", "PDCOORD_ENGINE_KEY_FILE"} & set(names)


def test_without_certificates_the_key_alone_is_given(release_named: Any) -> None:
    release = release_named("two-vendors")
    assert not [name for name in environment(coordinator(release)) if "CERT" in name or "CA_FILE" in name]
    assert not [settings for settings in sidecars(release) if settings.control_ca_file]


def test_an_engine_is_where_its_sidecar_looks_for_it(release: Any) -> None:
    for owner, template in release.templates():
        by_name = {container["name"]: container for container in containers(template)}
        if "pdcoord-sidecar" not in by_name:
            continue
        sidecar = by_name["pdcoord-sidecar"]
        assert sidecar["restartPolicy"] == "Always"
        settings = parse(sidecar["args"], environment(sidecar))
        _, port = parse_host_port(str(settings.engine))
        engine = template["spec"]["containers"][0]
        assert port in {given["containerPort"] for given in engine["ports"]}, owner["metadata"]["name"]
        assert template["metadata"]["annotations"]["pdcoord.io/port"] == str(settings.port)
        assert template["metadata"]["annotations"]["pdcoord.io/metrics-port"] == str(settings.metrics_port)
        assert settings.port in {given["containerPort"] for given in sidecar["ports"]}


def flag_of(container: Mapping[str, Any], name: str) -> str | None:
    found = [
        text.removeprefix(f"{name}=") for text in container.get("args", []) if text.startswith(f"{name}=")
    ]
    assert len(found) <= 1
    return found[0] if found else None


def policy_pools(release: Any) -> dict[str, Any]:
    """The policy's pools by name, as a person would write them."""
    documents = [given["spec"] for given in release.of("PoolPolicy")]
    for given in release.of("ConfigMap"):
        if given["metadata"]["name"].endswith("-policy"):
            documents += list(yaml.safe_load_all(given["data"]["policy.yaml"]))
    return {pool["name"]: pool for document in documents for pool in document["pools"]}


def test_engines_run_with_what_the_policy_says_of_them(release: Any, tmp_path: Path) -> None:
    pools = policy_pools(release)
    key = tmp_path / "kv"
    key.write_text("k" * 48)
    key.chmod(KEY_MODE)
    for owner, template in release.templates():
        name = template["metadata"]["labels"].get("pdcoord.io/pool")
        engine = template["spec"]["containers"][0]
        if name is None or engine["name"] != "engine":
            continue
        pool = pools[name]
        layout = pool.get("layout")
        if layout is not None and "block_tokens" in layout:
            size = flag_of(engine, "--block-size") or flag_of(engine, "--page-size")
            assert size == str(layout["block_tokens"]), owner["metadata"]["name"]
        ranks = flag_of(engine, "--tensor-parallel-size") or flag_of(engine, "--tp-size")
        assert ranks == str((layout or {}).get("tensor_parallel", 1)) or layout is None
        transfer = json.loads(flag_of(engine, "--kv-transfer-config") or "null")
        mode = flag_of(engine, "--disaggregation-mode")
        if pool["connector"] == "pdcoord":
            assert transfer["kv_connector_module_path"] == "transfer.engines.vllm.connector"
            assert transfer["kv_load_failure_policy"] == "recompute"
            assert transfer["kv_role"] == ("kv_producer" if pool["role"] == "prefill" else "kv_both")
            assert environment(engine)["PDCOORD_KV_KEY_FILE"] == "/etc/pdcoord/keys/kv"
            env = {**environment(engine), "PDCOORD_KV_KEY_FILE": str(key)}
            agent = settings_from_mapping(transfer["kv_connector_extra_config"], env)
            assert agent.lease_s == LEASE_S
            assert agent.advertise_host == "10.0.0.7"
        elif pool["connector"] == "nixl":
            assert transfer["kv_connector"] == "NixlConnector"
            assert transfer["kv_connector_extra_config"]["kv_lease_duration"] == LEASE_S
            assert environment(engine)["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.7"
        else:
            assert transfer is None
        assert mode == (pool["role"] if pool["connector"] == "sglang" else None)
        limit = flag_of(engine, "--max-model-len") or flag_of(engine, "--context-length")
        assert limit == (
            str(pool["limits"]["context_tokens_max"])
            if "context_tokens_max" in pool.get("limits", {})
            else None
        )


def drain_of(template: Mapping[str, Any]) -> float:
    """How long the sidecar of such a pod drains; 0 without one."""
    arguments = [
        each["args"]
        for each in template["spec"].get("initContainers", [])
        if each["name"] == "pdcoord-sidecar"
    ]
    return parse(arguments[0], {}).drain_s if arguments else 0.0


@pytest.mark.parametrize(
    ("grace_s", "sleep_s", "drain_s"),
    [(None, 30, 30), (600, 555, 30), (60, 30, 15), (40, 21, 4), (30, 11, 4)],
)
def test_a_sidecar_ends_its_drain_before_its_pod_is_killed(
    render: Any, changed: Any, grace_s: int | None, sleep_s: int, drain_s: float
) -> None:
    given = {} if grace_s is None else {"models.0.pools.1.terminationGracePeriodSeconds": grace_s}
    found = [template["spec"] for _, template in render(changed(given)).templates() if drain_of(template)]
    assert found
    for spec in found:
        sleep = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert (sleep, drain_of({"spec": spec})) == (sleep_s, drain_s)
        # The engine is told behind the sleep, the sidecar once the engine has ended.
        assert spec["terminationGracePeriodSeconds"] - sleep - drain_s >= ENGINE_STOP_S


def test_an_engine_stays_for_as_long_as_its_kv_may_be_waited_for(release: Any) -> None:
    for _, template in release.templates():
        engine = template["spec"]["containers"][0]
        if engine["name"] != "engine" or "lifecycle" not in engine:
            continue
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        sleep_s = engine["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert sleep_s >= LEASE_S
        assert grace_s - sleep_s - drain_of(template) >= ENGINE_STOP_S
        assert engine["startupProbe"]["periodSeconds"] * engine["startupProbe"]["failureThreshold"] >= 1800


def test_selectors_find_their_pods_and_nobody_elses(release: Any) -> None:
    for owner, template in release.templates():
        selector = owner["spec"].get("selector")
        if selector:
            assert selector["matchLabels"].items() <= template["metadata"]["labels"].items()
    labels = [template["metadata"]["labels"] for _, template in release.templates()]
    for budget in release.of("PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"]
        assert sum(wanted.items() <= given.items() for given in labels) == 1
    for policy in release.of("NetworkPolicy"):
        wanted = policy["spec"]["podSelector"]["matchLabels"]
        assert any(wanted.items() <= given.items() for given in labels)
    # A pool's pods are found by the policy's selector, and by no other pool's.
    for name, pool in policy_pools(release).items():
        wanted = pool["selector"]["match_labels"]
        found = [given for given in labels if wanted.items() <= given.items()]
        assert {given.get("pdcoord.io/pool") for given in found} <= {name}


def test_services_lead_to_ports_that_are_open(release: Any) -> None:
    templates = [template for _, template in release.templates()]
    for service in release.of("Service"):
        wanted = service["spec"]["selector"]
        found = [given for given in templates if wanted.items() <= given["metadata"]["labels"].items()]
        assert found, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            for template in found:
                open_ports = [
                    given for container in containers(template) for given in container.get("ports", [])
                ]
                target = port["targetPort"]
                assert target in {given.get("name") for given in open_ports} | {
                    given["containerPort"] for given in open_ports
                }, f"{service['metadata']['name']}: {target}"


def references(node: Any) -> Iterator[tuple[str, str]]:
    """(kind, name) of every ConfigMap, Secret, claim and account that a pod names."""
    names = {"configMap": ("ConfigMap", "name"), "secret": ("Secret", "secretName")}
    names["secretKeyRef"] = ("Secret", "name")
    if isinstance(node, dict):
        for key, value in node.items():
            if key in names and isinstance(value, dict):
                yield names[key][0], value[names[key][1]]
            if key == "serviceAccountName":
                yield "ServiceAccount", value
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_everything_that_is_named_is_there_or_was_named_by_the_values(release: Any) -> None:
    there = {(given["kind"], given["metadata"]["name"]) for given in release.objects}
    there |= {("Secret", release.values["auth"]["existingSecret"])}
    there |= {
        ("Secret", release.values["auth"][name]["secretName"]) for name in ("controlTls", "internalTls")
    }
    keys = ("keysSecret", "adminKeySecret", "engineKeySecret", "planKeysSecret")
    there |= {("Secret", release.values["gateway"]["tls"]["secretName"])}
    there |= {("Secret", release.values["auth"][name]) for name in keys}
    there |= {("ServiceAccount", release.values["serviceAccount"]["name"])}
    for model in release.values["models"]:
        there |= {("Secret", model.get("huggingFaceToken", {}).get("secret"))}
    for _, template in release.templates():
        assert set(references(template)) <= there
    services = {given["metadata"]["name"] for given in release.of("Service")}
    for settings in sidecars(release):
        for target in settings.control:
            assert str(target).split(".")[0] in services
    for pool in release.of("InferencePool"):
        assert pool["spec"]["endpointPickerRef"]["name"] in services
    for envoy in release.of("ConfigMap"):
        if "envoy.yaml" in envoy["data"]:
            hosts = set(re.findall(r"address: ([a-z0-9-]+)\.llm\.svc", envoy["data"]["envoy.yaml"]))
            assert hosts <= services
            assert "demo-pdcoord-epp" in hosts
            assert len(hosts) >= 2
    scaled = [
        given["spec"]["scaleTargetRef"]
        for given in (*release.of("HorizontalPodAutoscaler"), *release.of("ScaledObject"))
    ]
    for target in scaled:
        assert "replicas" not in release.one(target["kind"], target["name"])["spec"]


def test_keys_are_open_to_the_group_at_most(release: Any) -> None:
    """A key that everybody may read is refused by those who read it."""
    for _, template in release.templates():
        for volume in template["spec"].get("volumes", []):
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == KEY_MODE


def test_volumes_that_are_mounted_are_there(release: Any) -> None:
    for owner, template, container in ours(release):
        volumes = {given["name"] for given in template["spec"].get("volumes", [])}
        mounted = [given["name"] for given in container.get("volumeMounts", [])]
        assert set(mounted) <= volumes, owner["metadata"]["name"]
        paths = [given["mountPath"] for given in container.get("volumeMounts", [])]
        assert len(paths) == len(set(paths))


def test_nobody_is_lent_more_than_it_needs(release: Any) -> None:
    for owner, template, container in ours(release):
        security = container["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert security["capabilities"]["drop"] == ["ALL"]
        has_rdma = any("rdma" in name for name in container.get("resources", {}).get("limits", {}))
        assert security["capabilities"].get("add", []) == (["IPC_LOCK"] if has_rdma else [])
        assert container["resources"]["requests"]
        is_patched = "Patched" in owner["metadata"].get("annotations", {})
        if not is_patched:
            assert template["spec"]["securityContext"]["runAsUser"] > 0
            has_token = template["spec"]["automountServiceAccountToken"]
            assert has_token == (owner["metadata"]["name"] == "demo-pdcoord")
        assert "hostNetwork" not in template["spec"]
        assert not any("hostPath" in volume for volume in template["spec"].get("volumes", []))


def test_the_coordinator_may_do_what_it_does_and_no_more(release: Any) -> None:
    is_custom = release.values["policy"]["source"] == "crd"
    for role in release.of("Role"):
        allowed = {
            (group, resource, verb)
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        wanted = {("", "pods", "list"), ("", "pods", "watch")}
        if is_custom:
            wanted |= {("pdcoord.io", "poolpolicies", verb) for verb in ("list", "watch")}
            wanted |= {("pdcoord.io", "poolpolicies/status", "patch")}
        assert allowed == wanted
    assert not release.of("ClusterRole")


def test_engines_are_reached_by_those_who_need_them(release: Any) -> None:
    for policy in release.of("NetworkPolicy"):
        if policy["metadata"]["name"] != "demo-pdcoord-engines":
            continue
        for rule in policy["spec"]["ingress"]:
            ranges = [(port["port"], port.get("endPort", port["port"])) for port in rule.get("ports", [])]
            assert not any(low <= 8200 <= high for low, high in ranges), "the engine behind a sidecar"
        assert (
            all("from" in rule for rule in policy["spec"]["ingress"])
            or release.values["monitoring"]["mode"] != "none"
        )


def test_keys_are_made_once_for_all(release_named: Any) -> None:
    secret = release_named("two-vendors").of("Secret")[0]
    assert set(secret["data"]) == {"control", "kv"}
    assert secret["data"]["control"] != secret["data"]["kv"]
    assert min(len(value) for value in secret["data"].values()) >= 64
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not release_named("adopted").of("Secret")


def test_ranks_of_one_server_are_one_endpoint(release_named: Any) -> None:
    release = release_named("multi-node")
    for group in release.of("LeaderWorkerSet"):
        spec = group["spec"]["leaderWorkerTemplate"]
        assert spec["size"] == 2
        leader, worker = spec["leaderTemplate"], spec["workerTemplate"]
        assert "llm-d.ai/inference-serving" in leader["metadata"]["labels"]
        assert "llm-d.ai/inference-serving" not in worker["metadata"]["labels"]
        assert "--headless" in worker["spec"]["containers"][0]["args"]
        assert "--headless" not in leader["spec"]["containers"][0]["args"]
        names = [container["name"] for container in containers(worker)]
        assert "pdcoord-sidecar" not in names
        assert "--tensor-parallel-size=16" in worker["spec"]["containers"][0]["args"]


def test_adoption_touches_nothing_by_itself(release_named: Any) -> None:
    release = release_named("adopted")
    assert [given["metadata"]["name"] for given in release.of("Deployment")] == ["demo-pdcoord"]
    assert "kubectl -n llm patch deployment vllm-decode" in release.notes
    env = environment(coordinator(release))
    assert env["PDCOORD_KUBERNETES_SELECTOR"] == "app in (vllm-decode,vllm-prefill)"
    owner, template = next(
        (owner, template)
        for owner, template in release.templates()
        if owner["metadata"]["name"] == "vllm-decode"
    )
    assert owner["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["containers"][0]["image"] == "vllm/vllm-openai:v0.32.0"
    assert template["metadata"]["annotations"]["pdcoord.io/port"] == "8001"


def test_whole_requests_need_no_patch_of_adopted_servers(render: Any) -> None:
    existing = {"matchLabels": {"app": "vllm"}, "deployment": "vllm"}
    pool = {"name": "old", "role": "both", "vendor": "nvidia", "existing": existing}
    models = [{"name": "m", "kvBytesPerToken": 1024, "pools": [pool]}]
    values = {"adopt": {"enabled": True}, "models": models}
    plain = render(values)
    assert [given["metadata"]["name"] for given in plain.of("ConfigMap")] == ["demo-pdcoord-policy"]
    assert "kubectl -n llm patch" not in plain.notes
    # A Gateway selects by a label that only the patch brings.
    attached = render({**values, "gateway": {"mode": "attach", "attach": {"gateway": {"name": "g"}}}})
    ((_, template),) = [each for each in attached.templates() if each[0]["metadata"]["name"] == "vllm"]
    assert template["metadata"]["labels"]["pdcoord.io/entry"] == "true"
    assert template["spec"]["containers"]


def test_images_come_from_the_registry_that_is_named(release_named: Any) -> None:
    release = release_named("nvidia-nixl")
    for _, template in release.templates():
        for container in containers(template):
            folder = "engines/vllm" if container["name"] == "engine" else "mirror/pdcoord"
            assert container["image"].startswith(f"registry.example/{folder}/")
        assert template["spec"]["imagePullSecrets"] == [{"name": "pull"}]


def test_only_our_own_images_come_from_our_registry(render: Any, changed: Any) -> None:
    engine = {"models.0.pools.0.image": {"repository": "team/vllm-gaudi", "tag": "1"}}
    release = render(changed({"gateway.mode": "envoy", "global.imageRegistry": "team", **engine}))
    images = {container["image"] for _, template in release.templates() for container in containers(template)}
    ours = {image for image in images if image.startswith("team/pdcoord/")}
    assert {image.split("/")[-1].split(":")[0] for image in ours} == {"extproc", "sidecar", "transfer"}
    assert images - ours == {
        "team/vllm-gaudi:1",
        "vllm/vllm-openai-rocm:v0.32.0",
        "envoyproxy/envoy:distroless-v1.40.0",
    }
