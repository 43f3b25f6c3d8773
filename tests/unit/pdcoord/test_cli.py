"""The commands hand their options on and pass exit statuses through."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from pdcoord.commands import app

ROOT = Path(__file__).resolve().parents[3]
SECTIONS = re.findall(r"^pdcoord (paths --layouts .*)$", (ROOT / "docs/policy.md").read_text(), re.MULTILINE)


def test_two_layouts_are_judged() -> None:
    found = CliRunner().invoke(app, ["paths", "--layouts", "nvidia-flash-attn", "cpu-vec"])
    assert (found.exit_code, found.output.splitlines()[0]) == (0, "verdict   regroup")


def test_json_is_json() -> None:
    found = CliRunner().invoke(app, ["paths", "--layouts", "cpu-vec", "block_tokens=16,tiling=x", "--json"])
    assert found.exit_code == 1
    assert json.loads(found.output)["verdict"] == "impossible"


@pytest.mark.parametrize("layouts", [["cpu-vec", "nothing"], ["cpu-vec"]])
def test_bad_layouts_are_status_two(layouts: list[str]) -> None:
    assert CliRunner().invoke(app, ["paths", "--layouts", *layouts]).exit_code == 2


def test_a_gateway_that_is_not_there_is_status_two() -> None:
    found = CliRunner().invoke(app, ["paths", "--admin-url", "ftp://nowhere"])
    assert found.exit_code == 2
    assert "ftp://nowhere does not answer as an admin listener" in found.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--help"], ["--device", "mlx5_0", "x"]])
def test_preflight_takes_its_arguments_as_they_are(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[str]] = []

    def main(given: list[str]) -> int:
        taken.append(given)
        return 1

    monkeypatch.setitem(sys.modules, "transfer.preflight", SimpleNamespace(main=main))
    assert CliRunner().invoke(app, ["preflight", *arguments]).exit_code == 1
    assert taken == [arguments]


def test_preflight_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transfer.preflight", None)
    found = CliRunner().invoke(app, ["preflight"])
    assert found.exit_code == 2
    assert "pip install 'pdcoord[transfer]'" in found.stderr


def test_the_examples_of_the_page_work() -> None:
    examples = [line.split("#")[0].split() for line in SECTIONS if " A B" not in line]
    assert len(examples) >= 2
    for arguments in examples:
        assert CliRunner().invoke(app, arguments).exit_code == 0, arguments


def test_the_definition_of_policy_objects_is_printed_as_the_chart_has_it() -> None:
    found = CliRunner().invoke(app, ["policy", "crd"])
    assert found.exit_code == 0
    assert found.output == (ROOT / "deploy/charts/pdcoord/crds/poolpolicies.yaml").read_text(encoding="utf-8")
