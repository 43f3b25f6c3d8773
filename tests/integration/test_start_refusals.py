"""What cannot start says why in one line that names the setting or the extra, and exits with 2."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POLICY = str(ROOT / "deploy" / "policies" / "two-vendor.yaml")
FLEET = str(ROOT / "deploy" / "emulator" / "two-vendors.yaml")
CLI, SIDECAR = "pdcoord.cli", "sidecar.main"
SERVE = ("serve", "--policy", POLICY, "--port", "0", "--admin-port", "0")
PORTS = ("--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0")
EXTPROC = ("extproc", "--policy", POLICY, *PORTS)
BESIDE = ("--port", "0", "--metrics-port", "0")
OTEL = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
# What `pip install pdcoord[sidecar]` does not bring.
NO_GATEWAY = ("typer", "rich", "pydantic", "fastapi", "yaml", "zmq", "tokenizers", "numpy")
CODE = """\
import importlib.machinery as machinery, sys
find, absent = machinery.PathFinder.find_spec, {absent!r}
def find_unless_absent(name, path=None, target=None):
    return None if name.startswith(absent) else find(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_unless_absent)
from {module} import main
sys.exit(main())
"""


AT_IMPORT = """\
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            sys.exit(f"GRPC_VERBOSITY={os.environ.get('GRPC_VERBOSITY')}")
sys.meta_path.insert(0, Finder())
"""


def run(
    module: str, *arguments: str, absent: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run an entry point to its end, as if some packages were not installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PDCOORD_", "OTEL_"))}
    return subprocess.run(
        [sys.executable, "-c", CODE.format(absent=absent or ("no_such",), module=module), *arguments],
        env=kept | {"PDCOORD_ADMIN_PORT": "0"} | (environment or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(
    module: str, *arguments: str, absent: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> str:
    """The one line that it says."""
    done = run(module, *arguments, absent=absent, environment=environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.parametrize("absent", ["opentelemetry", "opentelemetry.sdk"])
@pytest.mark.parametrize(("module", "arguments"), [(CLI, SERVE), (CLI, EXTPROC), (SIDECAR, BESIDE)])
def test_without_opentelemetry_the_tracing_extra_is_named(
    absent: str, module: str, arguments: tuple[str, ...]
) -> None:
    assert "pdcoord[tracing]" in refusal(module, *arguments, absent=(absent,), environment=OTEL)


@pytest.mark.parametrize("arguments", [("--help",), (), ("serve",), ("paths",), ("policy", "check", POLICY)])
def test_without_typer_each_command_names_its_extra(arguments: tuple[str, ...]) -> None:
    assert "needs typer: pip install 'pdcoord[gateway]'" in refusal(CLI, *arguments, absent=NO_GATEWAY)


@pytest.mark.parametrize(("module", "arguments"), [(CLI, SERVE), (CLI, EXTPROC), (SIDECAR, BESIDE)])
def test_grpc_is_told_to_be_quiet_before_it_is_imported(module: str, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{AT_IMPORT}from {module} import main\nmain()", *arguments],
        env={name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == "GRPC_VERBOSITY=NONE\n"


def test_preflight_needs_no_extra() -> None:
    done = run(CLI, "preflight", "--json", absent=(*NO_GATEWAY, "xxhash", "msgspec"))
    assert done.returncode in {0, 1}, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    ("module", "arguments", "environment", "extra"),
    [
        (CLI, SERVE, {"PDCOORD_CONTROL_PORT": "0"}, "gateway"),
        (SIDECAR, (*BESIDE, "--control", "127.0.0.1:1"), {}, "sidecar"),
    ],
)
def test_control_streams_without_grpc_name_the_extra(
    module: str, arguments: tuple[str, ...], environment: dict[str, str], extra: str
) -> None:
    line = refusal(module, *arguments, absent=("grpc",), environment=environment)
    assert f"needs grpc: pip install 'pdcoord[{extra}]'" in line


@pytest.mark.parametrize(
    ("command", "field", "named"),
    [
        (SERVE, "port", "PDCOORD_PORT (--port)"),
        (SERVE, "admin_port", "PDCOORD_ADMIN_PORT (--admin-port)"),
        (SERVE, "control_port", "PDCOORD_CONTROL_PORT"),
        (EXTPROC, "grpc_port", "PDCOORD_GRPC_PORT (--grpc-port)"),
        (EXTPROC, "grpc_health_port", "PDCOORD_GRPC_HEALTH_PORT (--grpc-health-port)"),
        (EXTPROC, "metrics_port", "PDCOORD_METRICS_PORT (--metrics-port)"),
    ],
)
def test_a_port_that_is_taken_is_named_with_its_setting(
    command: tuple[str, ...], field: str, named: str, taken: int
) -> None:
    flag = "--" + field.replace("_", "-")
    arguments = list(command)
    if flag in arguments:
        arguments[arguments.index(flag) + 1] = str(taken)
    environment = {f"PDCOORD_{field.upper()}": str(taken)}
    line = refusal(CLI, *arguments, environment=environment)
    assert line.startswith(f"pdcoord {command[0]}: not started: cannot listen on ")
    assert line.endswith(f":{taken}: Address already in use: {named} is {taken}; give another")


def test_the_sidecars_port_that_is_taken_is_named(taken: int) -> None:
    line = refusal(SIDECAR, "--port", str(taken), "--metrics-port", "0", "--host", "127.0.0.1")
    assert line.endswith(f"--port (PDCOORD_SIDECAR_PORT) is {taken}; give another")
    line = refusal(SIDECAR, "--port", "0", "--metrics-port", str(taken))
    assert line.endswith(f"--metrics-port (PDCOORD_SIDECAR_METRICS_PORT) is {taken}; give another")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_one_port_for_two_listeners_is_named(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = ("serve", "--policy", POLICY, "--host", host, "--port", port, "--admin-port", port)
    line = refusal(CLI, *arguments)
    assert f"PDCOORD_ADMIN_PORT (--admin-port) is {port}, which PDCOORD_PORT (--port) is too" in line


def test_an_address_of_another_host_is_named() -> None:
    line = refusal(CLI, *SERVE, "--host", "192.0.2.1")
    assert line.endswith("PDCOORD_HOST (--host) is '192.0.2.1'; give an address of this host")


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("no pem")
    line = refusal(CLI, *EXTPROC, "--cert-path", "/nope")
    assert "--cert-path (PDCOORD_CERT_PATH) is '/nope': No such file or directory" in line
    control = {"PDCOORD_CONTROL_PORT": "0"}
    line = refusal(CLI, *SERVE, environment=control | {"PDCOORD_CONTROL_KEY_FILE": "/nope"})
    assert "not started: PDCOORD_CONTROL_KEY_FILE is '/nope': " in line
    tls = dict.fromkeys(("PDCOORD_CONTROL_CERT_FILE", "PDCOORD_CONTROL_CERT_KEY_FILE"), str(bad))
    line = refusal(CLI, *SERVE, environment=control | tls)
    assert f"PDCOORD_CONTROL_CERT_FILE is {str(bad)!r}: holds no certificate in PEM" in line
    line = refusal(SIDECAR, *BESIDE, "--control", "127.0.0.1:1", "--control-ca-file", str(bad))
    assert f"--control-ca-file is {str(bad)!r}: holds no certificate in PEM" in line
    environment = {"PDCOORD_KUBERNETES_PODS": "true", "KUBECONFIG": str(bad)}
    line = refusal(CLI, *SERVE, environment=environment)
    assert f"KUBECONFIG names {bad}, which is no kubeconfig: " in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("/no/such/fleet.yaml",), "/no/such/fleet.yaml"),
        ((FLEET, "--engine", "nobody"), 'has no engine "nobody"'),
        ((FLEET, "--port", "18999"), "--port: for one engine"),
        ((POLICY,), "kind"),
    ],
)
def test_emulated_engines_that_cannot_start(arguments: tuple[str, ...], said: str) -> None:
    done = run(CLI, "emulate", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("pdcoord emulate: not started: ")
    assert said in done.stderr


def test_an_emulated_engines_port_that_is_taken(taken: int) -> None:
    line = refusal(CLI, "emulate", FLEET, "--engine", "gaudi-prefill-0", "--port", str(taken))
    assert line.startswith("pdcoord emulate: not started: ")
    assert str(taken) in line


@pytest.mark.parametrize(
    ("module", "arguments", "environment", "started", "doubt"),
    [
        (
            CLI,
            SERVE,
            {"PDCOORD_PROT": "8080", "PDCOORD_SIDECAR_PROT": "1"},
            "process.started",
            "PDCOORD_PROT is set, and is no setting; PDCOORD_PORT is meant?",
        ),
        (
            SIDECAR,
            BESIDE,
            {"PDCOORD_SIDECAR_PROT": "80", "PDCOORD_PROT": "1"},
            "sidecar.started",
            "PDCOORD_SIDECAR_PROT is set, and is no setting; PDCOORD_SIDECAR_PORT is meant?",
        ),
    ],
)
def test_a_misspelt_variable_is_told_of_at_start(
    module: str, arguments: tuple[str, ...], environment: dict[str, str], started: str, doubt: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = threading.Timer(60.0, process.kill)
    deadline.start()
    try:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(json.loads(line))
            if told[-1]["event"] == started:
                break
    finally:
        deadline.cancel()
        process.terminate()
        process.communicate(timeout=30)
    assert [each["doubt"] for each in told if each["event"] == "settings.doubtful"] == [doubt]
    assert told[-1]["event"] == started
