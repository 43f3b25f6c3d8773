"""What each image installs is enough to run it, with nothing else there."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.images, pytest.mark.timeout(600)]
# Modules by the image that runs them; what follows the bar belongs to other extras.
CORE = "pdcoord.cli pdcoord.commands pdcoord.core pdcoord.policy pdcoord.protocol pdcoord.wire"
NEEDS = {
    "gateway": (f"{CORE} pdcoord.feeds pdcoord.gateway pdcoord.runtime", "pdcoord.runtime.extproc"),
    "extproc": (f"{CORE} pdcoord.feeds pdcoord.extproc pdcoord.runtime", ""),
    "sidecar": ("pdcoord.protocol pdcoord.wire sidecar", ""),
    "emulator": (
        f"{CORE} pdcoord.sim transfer.backends",
        "pdcoord.wire.otlp pdcoord.sim.study pdcoord.sim.advise transfer.backends.nixl transfer.backends.ucx",
    ),
}
IMPORT = """\
import importlib, pkgutil, sys
packages, left_out = (text.split() for text in sys.argv[1:3])
for name in packages:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        if found.name.endswith("__main__") or found.name.startswith(tuple(left_out or ["-"])):
            continue
        importlib.import_module(found.name)
        print(found.name)
"""
HELP = {
    "gateway": [
        ["serve", "--help"],
        ["explain", "--help"],
        ["paths", "--help"],
        ["policy", "check", "--help"],
    ],
    "extproc": [["extproc", "--help"], ["explain", "--help"]],
    "sidecar": [["--help"]],
    "emulator": [["emulate", "--help"], ["simulate", "--help"]],
}


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In an environment that holds nothing but what an image sets."""
    return subprocess.run(
        command,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("target", list(NEEDS))
def test_an_image_has_all_that_it_runs(build: Any, tmp_path: Path, target: str) -> None:
    programs = build.run(f"{target}-packages") / "opt" / "venv" / "bin"
    entry = build.file.stages[target].last("ENTRYPOINT").items()
    for arguments in HELP[target]:
        done = run([str(programs / entry[0]), *entry[1:], *arguments], tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout.replace("usage", "Usage")
    done = run([str(programs / "python"), "-c", IMPORT, *NEEDS[target]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not (programs / "pip").exists(), "pip is not for the last layer"
    # What the default command starts is a command.
    command = [step.items()[0] for step in build.file.stages[target].all("CMD")]
    assert all(run([str(programs / entry[0]), each, "--help"], tmp_path).returncode == 0 for each in command)


@pytest.mark.parametrize("target", list(NEEDS))
def test_what_was_installed_agrees_with_itself(build: Any, tmp_path: Path, target: str) -> None:
    packages = build.run(f"{target}-packages") / "opt" / "venv" / "bin" / "python"
    pip = build.run("build") / "opt" / "tools" / "bin" / "pip"
    done = run([str(pip), "--python", str(packages), "check"], tmp_path)
    assert done.returncode == 0, done.stdout


def test_the_sidecar_has_no_web_framework(build: Any) -> None:
    """It stands on every decode pod: small, and nothing that it does not run."""
    site = next((build.run("sidecar-packages") / "opt" / "venv").glob("lib/python*/site-packages"))
    there = {path.name for path in site.iterdir()}
    assert not there & {"fastapi", "pydantic", "kubernetes", "yaml", "numpy", "typer"}


def test_the_emulator_starts_and_ends(build: Any, tmp_path: Path, root: Path) -> None:
    programs = build.run("emulator-packages") / "opt" / "venv" / "bin"
    fleet = root / "deploy" / "emulator" / "three-vendors.yaml"
    place = ["--engine", "amd-decode-1", "--host", "127.0.0.1", "--port", "0", "--advertise-host", "10.0.0.7"]
    with subprocess.Popen(
        [str(programs / "pdcoord"), "emulate", str(fleet), *place],
        cwd=tmp_path,
        env={"HOME": "/tmp", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 0, rest
    assert "amd-decode-1 ready http://10.0.0.7:" in ready
    assert "side_channel=10.0.0.7:" in ready


def test_the_emulator_stands_in_for_vllm(build: Any, tmp_path: Path, root: Path) -> None:
    programs = build.run("emulator-packages") / "opt" / "venv" / "bin"
    done = run(
        ["sh", str(root / "deploy" / "images" / "vllm"), "serve", "m"], tmp_path, PATH=f"{programs}:/bin"
    )
    assert done.returncode == 2
    assert 'PDCOORD_EMULATED_PROFILE is ""' in done.stderr


@pytest.fixture(scope="module")
def engine(build: Any, tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, Path]:
    """An engine's environment with what vLLM requires of what we use, and the init container's files."""
    folder = tmp_path_factory.mktemp("engine")
    files = build.run("transfer-files") / "opt" / "pdcoord"
    subprocess.run(["cp", "-r", f"{files}/.", str(folder / "pdcoord")], check=True, timeout=60)
    tools = build.root("build") / "opt" / "tools" / "bin"
    subprocess.run(
        [str(tools / "python"), "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=60
    )
    install(build, folder / "venv", root, "msgspec", "numpy")
    return folder / "venv", folder / "pdcoord"


def install(build: Any, venv: Path, root: Path, *names: str) -> None:
    pip = build.root("build") / "opt" / "tools" / "bin" / "pip"
    constraint = ["--constraint", str(root / "constraints.txt")]
    command = [str(pip), "--python", str(venv / "bin" / "python"), "install", "--quiet", *constraint, *names]
    pip_settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    done = run(command, venv, **pip_settings)
    assert done.returncode == 0, done.stderr


WHERE = """\
import json, sys
import msgspec, numpy, xxhash, transfer.digest
assert transfer.digest.part_digest(b"a") == xxhash.xxh3_128_digest(b"a")
names = ("msgspec", "numpy", "xxhash", "transfer.digest")
print(json.dumps({name: sys.modules[name].__file__ for name in names}))
"""


def test_an_engine_gets_what_it_lacks_and_keeps_what_it_has(build: Any, engine: Any, root: Path) -> None:
    venv, files = engine
    python = str(venv / "bin" / "python")
    done = run([python, "-c", WHERE], venv, PYTHONPATH=str(files))
    assert done.returncode == 0, done.stderr
    came_from = json.loads(done.stdout)
    ours = {name for name, path in came_from.items() if path.startswith(str(files))}
    assert ours == {"xxhash", "transfer.digest"}

    install(build, venv, root, "xxhash")
    done = run([python, "-c", WHERE], venv, PYTHONPATH=str(files))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["xxhash"].startswith(str(venv))


def test_the_connector_wants_nothing_but_the_engine(engine: Any) -> None:
    venv, files = engine
    load = "import importlib; importlib.import_module('transfer.engines.vllm.connector')"
    done = run([str(venv / "bin" / "python"), "-c", load], venv, PYTHONPATH=str(files))
    assert done.stderr.splitlines()[-1] in {
        "ModuleNotFoundError: No module named 'vllm'",
        "ModuleNotFoundError: No module named 'torch'",
    }
    done = run(
        [str(venv / "bin" / "python"), "-m", "transfer.preflight", "--json"], venv, PYTHONPATH=str(files)
    )
    assert {"level", "subject", "finding", "remedy"} <= set(json.loads(done.stdout)[0]), done.stderr


def test_every_python_that_engines_run_has_its_copy(build: Any) -> None:
    files = build.run("transfer-files") / "opt" / "pdcoord"
    copies = {
        path.name.split(".")[1].split("-")[1] for path in (files / "fallback" / "xxhash").glob("_xxhash.*.so")
    }
    assert copies == {"311", "312", "313", "314"}
    assert {path.name for path in files.iterdir()} == {"transfer", "xxhash.py", "fallback"}


def test_where_nobody_has_xxhash_the_error_says_what_to_do(engine: Any, tmp_path: Path) -> None:
    _, files = engine
    (tmp_path / "xxhash.py").write_text((files / "xxhash.py").read_text())
    bare = ["/usr/bin/python3", "-S", "-I"]
    load = f"import sys; sys.path = [{str(tmp_path)!r}, *sys.path]; import xxhash"
    done = run([*bare, "-c", load], tmp_path)
    assert "ModuleNotFoundError: the engine has no xxhash, and" in done.stderr
    assert "install xxhash in the engine's image" in done.stderr
