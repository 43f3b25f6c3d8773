"""The chart's parts with TLS between them: its Envoy, picker and sidecars as rendered, at local ports."""

import datetime as dt
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from helm_python import Chart

from pdcoord.sim.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
ENVOY = Path(sys.executable).with_name("envoy")
MODEL = "demo/llama-8b"
NAME = "parts.llm.example"
WAIT_S = 180.0
"""Longest wait for a condition; the box may be busy."""
MAIN = "import sys; from {} import main; sys.exit(main())"
MODULES = {"pdcoord": "pdcoord.cli", "pdcoord-sidecar": "sidecar.main"}
POOL = {
    "vendor": "gaudi",
    "linkGbitPerSecond": 100,
    "layout": {"preset": "intel-gaudi"},
    "image": {"repository": "engine", "tag": "1"},
}
ROLES = ("prefill", "decode")
VALUES = {
    "pd": {"enabled": True},
    "auth": {"internalTls": {"secretName": "parts", "serverName": NAME}, "planKeysSecret": "plan-keys"},
    "gateway": {"mode": "envoy"},
    "models": [
        {
            "name": MODEL,
            "kvBytesPerToken": 131_072,
            "policy": {"disaggregation": {"mode": "always"}},
            "pools": [{**POOL, "name": role, "role": role} for role in ROLES],
        }
    ],
}
# Of side channels, which emulated engines have no key for.
LEFT_OUT = ("--kv-agent", "--kv-key-file")

pytestmark = pytest.mark.skipif(not ENVOY.exists(), reason="needs envoy: pip install 'pdcoord[dev]'")


class Mounted:
    """A Secret as a kubelet mounts it: names lead through one link, which a change replaces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        folder.mkdir()
        self.renew()
        for name in ("tls.crt", "tls.key", "ca.crt"):
            (folder / name).symlink_to(Path("..data", name))

    def renew(self) -> None:
        """Another pair, of another authority."""
        self._count += 1
        content = self.folder / f"..{self._count}"
        content.mkdir()
        for name, data in made().items():
            (content / name).write_bytes(data)
            (content / name).chmod(0o440)
        link = self.folder / "..data_tmp"
        link.symlink_to(content.name)
        link.rename(self.folder / "..data")


def made() -> dict[str, bytes]:
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = certificate("ca", authority_key.public_key(), "ca", authority_key)
    own = certificate("part", key.public_key(), "ca", authority_key)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return {"tls.crt": own.public_bytes(pem), "tls.key": private, "ca.crt": authority.public_bytes(pem)}


def certificate(
    name: str, key: ec.EllipticCurvePublicKey, issuer: str, signs: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    # The control stream is dialled by a name of its own, which is this one here.
    names = x509.SubjectAlternativeName([x509.DNSName(NAME), x509.DNSName("localhost")])
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .sign(signs, hashes.SHA256())
    )


@dataclass
class Release:
    """What the chart renders, with its pods' processes on loopback."""

    folder: Path
    secret: Mounted
    ports: dict[str, int]
    objects: list[dict[str, Any]]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def one(self, kind: str, name: str) -> Any:
        return next(
            each for each in self.objects if each["kind"] == kind and each["metadata"]["name"] == name
        )

    def pod(self, name: str) -> Any:
        return self.one("Deployment", name)["spec"]["template"]["spec"]

    def here(self, text: str) -> str:
        """With this place's folders in place of those in pods."""
        for there, place in (
            ("/etc/pdcoord/internal-tls", self.secret.folder),
            ("/etc/pdcoord/plan-keys", self.folder),
            ("/etc/pdcoord/keys", self.folder),
            ("/etc/envoy", self.folder),
        ):
            text = text.replace(there, str(place))
        return text

    def start(self, name: str, command: list[str], env: Mapping[str, str] | None = None) -> None:
        program, *words = command
        if program in MODULES:
            command = [sys.executable, "-c", MAIN.format(MODULES[program]), *words]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(env or {})}
            )

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not is_so():
            for name, process in self.running.items():
                assert process.poll() is None, f"{name} ended:\n{self.log(name)[-4_000:]}"
            logs = "\n".join(f"{name}:\n{self.log(name)[-2_000:]}" for name in self.running)
            assert time.monotonic() < deadline_s, logs
            time.sleep(0.1)

    def complete(self) -> tuple[int, dict[str, str], bytes]:
        """A call through Envoy; status 0 where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["envoy"], timeout=WAIT_S)
        body = json.dumps({"model": MODEL, "prompt": "word " * 2_000, "max_tokens": 4})
        try:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, headers, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, {}, b""
        finally:
            connection.close()

    def serves(self) -> bool:
        status, headers, _ = self.complete()
        return status == 200 and headers["x-pdcoord-decision"].startswith("split; ")

    def end(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10.0)
            process.kill()
            process.wait()


def start_engines(release: Release) -> None:
    engines = [
        {
            "name": role,
            "profile": "intel-gaudi3-8b",
            "role": role,
            "speed": {"prefill_base_ms": 1, "prefill_ms_per_token": 0.002, "step_base_ms": 2},
            "port": release.ports[f"engine-{role}"],
            "context_tokens_max": 131_072,
            **({"side_channel_port": release.ports["side"]} if role == "prefill" else {}),
        }
        for role in ROLES
    ]
    fleet = {"kind": "EmulatedFleet", "seed": 7, "model": MODEL, "engines": engines}
    path = release.folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({"apiVersion": "pdcoord.io/v1alpha1", **fleet}))
    release.start("engines", ["pdcoord", "emulate", str(path)])


def start_sidecar(release: Release, role: str) -> None:
    """With the flags of its pod; of one given twice the last counts."""
    containers = release.pod(f"demo-pdcoord-{role}")["initContainers"]
    (container,) = [each for each in containers if each["name"] == "pdcoord-sidecar"]
    flags = [release.here(flag) for flag in container["args"] if not flag.startswith(LEFT_OUT)]
    ports = release.ports
    flags += ["--host=127.0.0.1", f"--port={ports[role]}", f"--engine=127.0.0.1:{ports[f'engine-{role}']}"]
    flags += ["--metrics-host=127.0.0.1", f"--metrics-port={ports[f'metrics-{role}']}"]
    controls = [flag for flag in flags if flag.startswith("--control=")]
    assert bool(controls) == (role == "decode")
    if controls:
        flags.remove(controls[0])
        flags += [f"--control=localhost:{ports['control']}"]
        flags += [f"--control-address=127.0.0.1:{ports[role]}"]
    release.start(role, ["pdcoord-sidecar", *flags])


def start_picker(release: Release) -> None:
    (container,) = release.pod("demo-pdcoord")["containers"]
    text = release.one("ConfigMap", "demo-pdcoord-policy")["data"]["policy.yaml"]
    policy = yaml.safe_load(text)
    for pool in policy["pools"]:
        del pool["selector"]
        pool["endpoints"] = [{"name": pool["role"], "address": f"127.0.0.1:{release.ports[pool['role']]}"}]
        if pool["role"] == "prefill":
            pool["endpoints"][0]["kv_port"] = release.ports["side"]
    policy["canary"] = {"mode": "off"}
    path = release.folder / "policy.yaml"
    path.write_text(yaml.safe_dump(policy))
    given = {each["name"]: release.here(each["value"]) for each in container["env"] if "value" in each}
    env = {name: value for name, value in given.items() if not name.startswith("PDCOORD_KUBERNETES_")}
    ports = release.ports
    env |= {"PDCOORD_POLICY": str(path), "PDCOORD_CONTROL_HOST": "127.0.0.1", "PDCOORD_HOST": "127.0.0.1"}
    env |= {"PDCOORD_CONTROL_PORT": str(ports["control"]), "PDCOORD_ADMIN_PORT": str(ports["picker-admin"])}
    places = {"--grpc-port": "picker", "--grpc-health-port": "health", "--metrics-port": "pages"}
    flags = [release.here(flag) for flag in container["args"] if flag.partition("=")[0] not in places]
    flags += [f"{flag}={ports[name]}" for flag, name in places.items()]
    release.start("picker", [*container["command"], *flags], env)


def start_envoy(release: Release) -> None:
    data = release.one("ConfigMap", "demo-pdcoord-envoy")["data"]
    config = yaml.safe_load(release.here(data["envoy.yaml"]))
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": release.ports["envoy"]}
    for cluster in config["static_resources"]["clusters"]:
        name = "picker" if cluster["name"] == "picker" else "decode"
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        socket_address = {"address": "127.0.0.1", "port_value": release.ports[name]}
        endpoint["endpoint"]["address"]["socket_address"] = socket_address
        if name == "picker":
            endpoint["endpoint"]["health_check_config"]["port_value"] = release.ports["health"]
    for name in ("certificate.yaml", "authority.yaml"):
        (release.folder / name).write_text(release.here(data[name]))
    path = release.folder / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    (container,) = release.pod("demo-pdcoord-envoy")["containers"]
    flags = [release.here(flag).replace("$(POD_NAME)", "envoy-0") for flag in container["args"]]
    release.start("envoy", [str(ENVOY), *flags, "--use-dynamic-base-id", "--concurrency", "1"])


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Release]:
    texts = Chart.load(ROOT / "deploy" / "charts" / "pdcoord").render(VALUES, name="demo", namespace="llm")
    objects = [
        given
        for path, text in texts.items()
        if path.endswith(".yaml")
        for given in yaml.safe_load_all(text)
        if given
    ]
    names = [f"{kind}{role}" for role in ROLES for kind in ("", "engine-", "metrics-")]
    names += ["side", "control", "picker", "health", "pages", "picker-admin", "envoy"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    for name, text in (("control", "k" * 48), ("plan-keys", "first:" + "5a" * 32)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o440)
    release = Release(tmp_path, Mounted(tmp_path / "secret"), ports, objects)
    try:
        start_engines(release)
        for role in ROLES:
            start_sidecar(release, role)
        start_picker(release)
        start_envoy(release)
        yield release
    finally:
        release.end()


def shown(release: Release, port: str, trusted: bytes, *, is_client: bool) -> bool:
    """Whether a request of this port is answered to whoever trusts this authority."""
    context = ssl.create_default_context(cadata=trusted.decode())
    if is_client:
        context.load_cert_chain(release.secret.folder / "tls.crt", release.secret.folder / "tls.key")
    try:
        with (
            socket.create_connection(("127.0.0.1", release.ports[port]), timeout=10.0) as plain,
            context.wrap_socket(plain, server_hostname=NAME) as secured,
        ):
            secured.sendall(b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            return secured.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def test_parts_know_each_other_by_the_charts_certificate_and_by_the_next_one(release: Release) -> None:
    release.until(release.serves)
    # The leg came to the sidecar before the engine that prefills.
    assert '"prefill-leg"' in release.log("prefill")
    before = (release.secret.folder / "ca.crt").read_bytes()
    for port in ROLES:
        assert shown(release, port, before, is_client=True)
        assert not shown(release, port, before, is_client=False)
        # As a kubelet asks.
        assert shown(release, f"metrics-{port}", before, is_client=False)
    assert shown(release, "pages", before, is_client=False)
    release.secret.renew()
    after = (release.secret.folder / "ca.crt").read_bytes()
    assert after != before
    for port in ROLES:
        release.until(lambda port=port: shown(release, port, after, is_client=True))
        assert not shown(release, port, before, is_client=True)
    # Connections stay as they are; those that Envoy makes anew are of the new pair.
    release.kill("decode")
    release.kill("picker")
    release.until(lambda: not release.serves())
    start_sidecar(release, "decode")
    start_picker(release)
    release.until(release.serves)
