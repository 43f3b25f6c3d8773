"""The chart, loaded once, and what it makes of each value set."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "charts" / "pdcoord"
VALUES = Path(__file__).parent / "values"
NAMESPACE = "llm"
NAME = "demo"
PATCH = "Patched"

Object = dict[str, Any]

POOLS = [
    {"name": "prefill", "role": "prefill", "vendor": "nvidia", "linkGbitPerSecond": 100},
    {"name": "decode", "role": "decode", "vendor": "amd", "linkGbitPerSecond": 100},
]
BASE: dict[str, Any] = {
    "pd": {"enabled": True},
    "models": [{"name": "ibm/granite", "aliases": ["g"], "kvBytesPerToken": 1024, "pools": POOLS}],
}


@dataclass(frozen=True, slots=True)
class Release:
    """What one value set renders to.

    Attributes:
        values: the chart's defaults with the set over them.
        objects: every object, in no order that matters.
        notes: NOTES.txt.
    """

    values: Mapping[str, Any]
    objects: tuple[Object, ...]
    notes: str

    def of(self, kind: str) -> list[Object]:
        """Objects of a kind."""
        return [given for given in self.objects if given["kind"] == kind]

    def one(self, kind: str, name: str) -> Object:
        """The object of this kind and name."""
        return next(given for given in self.of(kind) if given["metadata"]["name"] == name)

    def templates(self) -> Iterator[tuple[Object, Object]]:
        """Every pod template with its owner; patches among them, over a plain Deployment."""
        for given in self.objects:
            if given["kind"] == "Deployment":
                yield given, given["spec"]["template"]
            elif given["kind"] == "LeaderWorkerSet":
                spec = given["spec"]["leaderWorkerTemplate"]
                yield given, spec["leaderTemplate"]
                yield given, spec["workerTemplate"]
        for patches in self.of("ConfigMap"):
            for name, text in patches["data"].items():
                if patches["metadata"]["name"].endswith("-patches"):
                    owner = patched(name.removesuffix(".yaml"), self.values, yaml.safe_load(text))
                    yield owner, owner["spec"]["template"]


def patched(name: str, values: Mapping[str, Any], patch: Object) -> Object:
    """A Deployment of somebody else's after our patch, merged as kubectl does: lists by name."""
    pool = next(
        pool
        for model in values["models"]
        for pool in model["pools"]
        if pool.get("existing", {}).get("deployment") == name
    )
    labels = dict(pool["existing"]["matchLabels"])
    port = pool["existing"].get("port", 8000)
    container = {"name": "vllm", "image": "vllm/vllm-openai:v0.32.0", "ports": [{"containerPort": port}]}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    metadata = {"name": name, "namespace": NAMESPACE, "annotations": {PATCH: "true"}}
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata}
    owner["spec"] = {"selector": {"matchLabels": labels}, "template": template}
    merged: Object = merge(owner, patch)
    return merged


def merge(base: Any, patch: Any) -> Any:
    """A strategic merge of what our patches hold."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {
            key: merge(base[key], patch[key])
            if key in base and key in patch
            else patch.get(key, base.get(key))
            for key in {**base, **patch}
        }
    if isinstance(base, list) and isinstance(patch, list):
        names = {entry["name"] for entry in patch}
        return [entry for entry in base if entry["name"] not in names] + patch
    return copy.deepcopy(patch)


@cache
def chart() -> Chart:
    return Chart.load(CHART)


@cache
def release_of(name: str) -> Release:
    values = yaml.safe_load((VALUES / f"{name}.yaml").read_text())
    return rendered(values)


def rendered(values: Mapping[str, Any]) -> Release:
    chart().validate_schema(dict(values))
    texts = chart().render(dict(values), name=NAME, namespace=NAMESPACE)
    objects: list[Object] = []
    for path, text in texts.items():
        if path.endswith(".yaml"):
            objects += [given for given in yaml.safe_load_all(text) if given]
    notes = next(text for path, text in texts.items() if path.endswith("NOTES.txt"))
    return Release(chart().merge_values(dict(values)), tuple(objects), notes)


def value_sets() -> list[str]:
    return sorted(path.stem for path in VALUES.glob("*.yaml"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `release` runs once for each value set."""
    if "release" in metafunc.fixturenames:
        metafunc.parametrize("release", value_sets(), indirect=True)


@pytest.fixture
def release(request: pytest.FixtureRequest) -> Release:
    return release_of(request.param)


@pytest.fixture(scope="session")
def release_named() -> Callable[[str], Release]:
    return release_of


@pytest.fixture(scope="session")
def render() -> Callable[[Mapping[str, Any]], Release]:
    """Render values that are in no file, with the schema's judgement first, as helm does."""
    return rendered


@pytest.fixture(scope="session")
def chart_folder() -> Path:
    return CHART


def altered(changes: Mapping[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(BASE)
    for path, value in changes.items():
        node: Any = values
        *way, last = path.split(".")
        for step in way:
            node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
        if value is None:
            del node[last]
        else:
            node[last] = copy.deepcopy(value)
    return values


@pytest.fixture(scope="session")
def changed() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Values of two vendors, split, with what a case changes by path; None takes a key out."""
    return altered
