"""The install guides: each command in them is one that there is, each value one that the chart has."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helm_python import Chart

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "charts" / "pdcoord"
GUIDES = ["install.md", "adopt.md"]
# Of helm, those that the guides need.
HELM_OPTIONS = {"--namespace", "--set", "-f"}


def text(guide: str) -> str:
    return (ROOT / "docs" / guide).read_text()


def commands(guide: str, program: str) -> Iterator[list[str]]:
    """Each call of a program in the guide, by words; lines of a block that end in a backslash go on."""
    # Between the fences: prose, block, prose, block; a block's first line is its language.
    parts = re.split(r"^ *```", text(guide), flags=re.MULTILINE)
    lines = [line for block in parts[1::2] for line in block.replace("\\\n", " ").splitlines()[1:]]
    calls = [call for prose in parts[::2] for call in re.findall(r"`([^`]+)`", prose)]
    for line in [*lines, *(re.sub(r"\s+", " ", call) for call in calls)]:
        for part in (each.strip() for each in re.split(r"&&|;", line)):
            if part.startswith(f"{program} "):
                yield shlex.split(part)


@cache
def options(*command: str) -> frozenset[str]:
    """The options in a command's --help."""
    module = {"pdcoord": "from pdcoord.cli import main", "pdcoord-sidecar": "from sidecar.main import main"}
    code = f"import sys; sys.argv = {list(command)!r}; {module[command[0]]}; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return frozenset(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", done.stdout))


@pytest.mark.parametrize("guide", GUIDES)
def test_our_commands_are_there_with_their_options(guide: str) -> None:
    seen = 0
    for words in [*commands(guide, "pdcoord"), *commands(guide, "pdcoord-sidecar")]:
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        plain = [word for word in words[1:] if not word.startswith("-")]
        command = [words[0]] if words[0] == "pdcoord-sidecar" else words[:1] + plain[:1]
        assert given <= options(*command, "--help"), f"{guide}: {shlex.join(words)}"
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("guide", GUIDES)
def test_values_set_by_helm_are_in_the_schema(guide: str) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    calls = [words for words in commands(guide, "helm") if len(words) > 2]
    assert {words[1] for words in calls} >= {"install", "upgrade", "uninstall"}
    for words in calls:
        assert {word for word in words[1:] if word.startswith("-")} <= HELM_OPTIONS, shlex.join(words)
        if words[1] in {"install", "upgrade"}:
            assert words[2:4] == ["pdcoord", "deploy/charts/pdcoord"], shlex.join(words)
        for path in (value.partition("=")[0] for word, value in pairwise(words) if word == "--set"):
            assert_known(schema, path)


def assert_known(schema: dict[str, Any], path: str) -> None:
    """A value's path leads to something in the schema."""
    here = schema
    for key in path.replace("[]", "").split("."):
        here = resolved(schema, here)
        here = here.get("items", here)
        here = resolved(schema, here)
        inner = here.get("properties", {})
        assert key in inner or isinstance(here.get("additionalProperties"), dict), f"the chart has no {path}"
        here = inner.get(key) or here["additionalProperties"]


def resolved(schema: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in here:
        here = schema["$defs"][here["$ref"].rpartition("/")[2]]
    return here


VALUE_ROOTS = "global|gateway|coordinator|vendors|transfer|sidecar|pd|auth|adopt|monitoring|networkPolicy"


@pytest.mark.parametrize("guide", GUIDES)
def test_values_that_are_named_exist(guide: str) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    named = set(re.findall(rf"`((?:{VALUE_ROOTS})\.[\w.]+)(?:=\w+)?`", text(guide)))
    named |= set(re.findall(r"`(models\[\]\.[\w.]+)`", text(guide)))
    assert named
    for path in (each for each in named if not each.endswith(".yaml")):
        assert_known(schema, path)


def values_of(guide: str) -> list[dict[str, Any]]:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text(guide), re.DOTALL)]
    return [block for block in blocks if "models" in block]


def test_the_pools_of_the_install_guide_render() -> None:
    (values,) = values_of("install.md")
    for is_split in (True, False):
        files = Chart.load(str(CHART)).render(
            values | {"pd": {"enabled": is_split}}, name="pdcoord", namespace="serving"
        )
        kinds = [
            one["kind"]
            for name, file in files.items()
            if name.endswith(".yaml")
            for one in yaml.safe_load_all(file)
            if one
        ]
        assert kinds.count("Deployment") == 4


def test_each_step_of_adoption_renders_and_starts_no_server() -> None:
    first, third = values_of("adopt.md")
    third |= {"adopt": {"enabled": True}, "pd": {"enabled": True} | third["pd"]}
    for values in (first, third):
        files = Chart.load(str(CHART)).render(values, name="pdcoord", namespace="serving")
        objects = [
            one
            for name, file in files.items()
            if name.endswith(".yaml")
            for one in yaml.safe_load_all(file)
            if one
        ]
        names = [one["metadata"]["name"] for one in objects if one["kind"] == "Deployment"]
        assert names == ["pdcoord"]


@pytest.mark.parametrize("guide", GUIDES)
def test_flags_given_to_vllm_are_json(guide: str) -> None:
    for config in re.findall(r"--kv-(?:transfer|events)-config=(\{.*\})", text(guide)):
        assert isinstance(json.loads(config), dict)


@pytest.mark.parametrize("guide", GUIDES)
def test_pages_files_and_metrics_that_are_named_exist(guide: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text(guide)):
        assert (ROOT / "docs" / target).exists(), target
    known = "".join(path.read_text() for path in (ROOT / "docs").glob("metrics-*.md"))
    for metric in set(re.findall(r"`(pdcoord_(?:gateway|sidecar)_\w+)`", text(guide))):
        assert metric in known, metric
    for path in re.findall(r"(?:^|[ `])(deploy/[\w./-]+)", text(guide)):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_settings_that_are_named_exist() -> None:
    known = "".join(
        (ROOT / "docs" / page).read_text() for page in ("gateway.md", "kubernetes.md", "transfer.md")
    )
    known += (ROOT / "pdcoord/sim/emulator_vllm.py").read_text() + (ROOT / "transfer/settings.py").read_text()
    for guide in GUIDES:
        for name in set(re.findall(r"PDCOORD_\w+", text(guide))):
            assert name in known or name.removeprefix("PDCOORD_KV_").lower() in known, name


def test_the_kind_cluster_takes_its_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((ROOT / "deploy/kind/values.yaml").read_text())
    jsonschema.validate(merged(yaml.safe_load((CHART / "values.yaml").read_text()), values), schema)


def merged(below: Any, above: Any) -> Any:
    """Values as helm lays one file over another."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: merged(below.get(key), value) for key, value in above.items()}
    return above
