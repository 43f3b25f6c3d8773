"""The Dockerfile: linted, and held to what a cluster with strict admission asks of an image."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TARGETS = ["gateway", "extproc", "sidecar", "emulator", "transfer"]
LABELS = {"title", "description", "version", "revision", "licenses", "vendor"}


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed; make venv"
    return found


def test_hadolint_has_nothing_to_say(root: Path) -> None:
    done = subprocess.run(
        [tool("hadolint"), "--failure-threshold", "style", "deploy/images/Dockerfile"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_image_is_there_and_is_built_last(dockerfile: Any) -> None:
    bases = {stage.base for stage in dockerfile.stages.values()}
    assert [name for name in dockerfile.stages if name in TARGETS] == TARGETS
    assert not bases & set(TARGETS), "an image is built upon another"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_number_and_as_nobody_of_the_host(dockerfile: Any, target: str) -> None:
    steps = [step for stage in dockerfile.chain(dockerfile.stages[target]) for step in stage.steps]
    users = [step.rest for step in steps if step.word == "USER"]
    assert users, "no USER: root"
    assert re.fullmatch(r"[1-9]\d{4}:[1-9]\d{4}", users[-1]), "kubelet knows runAsNonRoot by number only"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_tells_what_it_is(dockerfile: Any, target: str) -> None:
    steps = [step for stage in dockerfile.chain(dockerfile.stages[target]) for step in stage.all("LABEL")]
    labels = {name for step in steps for name in re.findall(r"org\.opencontainers\.image\.(\w+)=", step.rest)}
    assert labels == LABELS


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_made_without_running_anything_in_it(dockerfile: Any, target: str) -> None:
    assert [step.rest for step in dockerfile.stages[target].all("RUN")] == []
    if target == "transfer":
        assert dockerfile.stages[target].last("CMD").items() == ["cp", "-r", "/opt/pdcoord/.", "/pdcoord/"]
    else:
        assert dockerfile.stages[target].last("ENTRYPOINT").items()[0] in {"pdcoord", "pdcoord-sidecar"}


def test_base_images_have_a_version_and_no_host(dockerfile: Any) -> None:
    for stage in dockerfile.stages.values():
        name, _, tag = dockerfile.base_image(stage).partition(":")
        assert re.fullmatch(r"[a-z]+", name), f"{stage.name}: {name} names a host or a folder"
        assert re.match(r"\d+\.\d+", tag), f"{stage.name}: {tag} is not a version"


def test_what_is_copied_from_the_repository_exists_and_is_in_the_context(
    dockerfile: Any, root: Path, in_context: Callable[[str], bool]
) -> None:
    for step in (step for stage in dockerfile.stages.values() for step in stage.all("COPY")):
        stage, names, _ = step.copied()
        if stage is not None:
            assert stage in dockerfile.stages
            continue
        for name in names:
            assert (root / name).exists(), f"COPY {name}"
            assert in_context(name), f".dockerignore keeps {name} out"


@pytest.mark.parametrize(
    "name", [".git/config", ".venv/bin/python", "tests/images/conftest.py", "a.key", ".run/x"]
)
def test_nothing_else_is_sent_to_the_builder(in_context: Callable[[str], bool], name: str) -> None:
    assert not in_context(name)
    assert not in_context("pdcoord/core/__pycache__/fleet.cpython-311.pyc")


def test_packages_are_pinned_and_extras_are_those_of_the_project(dockerfile: Any, root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    runs = [step.rest for stage in dockerfile.stages.values() for step in stage.all("RUN")]
    installs = [
        command
        for run in runs
        for command in re.split(r"&&|;", run)
        if "pip" in command and "install" in command
    ]
    named = [command for command in installs if "uninstall" not in command]
    assert len(named) == 8
    for command in named:
        assert "--constraint constraints.txt" in command or "--no-deps" in command, command
        for extras in re.findall(r"pdcoord\[([\w,]+)\]", command):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), command


def test_the_builders_own_packages_are_pinned(root: Path) -> None:
    lines = (root / "deploy/images/build.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in wanted)
    requires = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    names = {re.split(r"\W", each)[0] for each in requires}
    assert names <= {line.partition("==")[0] for line in wanted}


def test_the_version_is_the_projects(dockerfile: Any, root: Path) -> None:
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    given = [step.rest for stage in dockerfile.stages.values() for step in stage.all("ARG")]
    assert [each for each in given if each.startswith("VERSION=")] == [f"VERSION={version}"] * 2
