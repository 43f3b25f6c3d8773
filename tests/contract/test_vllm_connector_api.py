"""The connector's class against the base classes of vLLM 0.32, as record_vllm_api.py wrote them down.

Where vLLM is installed, as in the engines' environment, the record itself is compared with it.
"""

import ast
import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent.parent / "transfer" / "engines" / "vllm"
RECORD = HERE / "vllm-0.32.0" / "connector-api.json"
BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"

api: dict[str, Any] = json.loads(RECORD.read_text())
trees = {path.name: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}

# What the names stand for, in the modules that take vLLM's objects.
KINDS = {
    "request": ["attributes/vllm.v1.request:Request"],
    "scheduler_output": ["fields/vllm.v1.core.sched.output:SchedulerOutput"],
    "connector_output": ["fields/vllm.v1.outputs:KVConnectorOutput"],
    "cached": ["fields/vllm.v1.core.sched.output:CachedRequestData"],
    "each": ["fields/vllm.v1.core.sched.output:NewRequestData"],
    "feature": ["fields/vllm.multimodal.inputs:MultiModalFeatureSpec"],
    "config": ["fields/vllm.config.kv_transfer:KVTransferConfig"],
    "parallel": ["fields/vllm.config.parallel:ParallelConfig"],
    "kv_cache_config": ["fields/vllm.v1.kv_cache_interface:KVCacheConfig"],
    "group": ["fields/vllm.v1.kv_cache_interface:KVCacheGroupSpec"],
    "spec": [
        f"fields/vllm.v1.kv_cache_interface:{name}"
        for name in (
            "FullAttentionSpec",
            "MLAAttentionSpec",
            "SlidingWindowSpec",
            "ChunkedLocalAttentionSpec",
        )
    ],
}
FROM_VLLM = ("connector.py", "support.py")


def methods(module: str, name: str) -> dict[str, list[str]]:
    """Of one of our classes: names of each method's parameters, with `=...` for a default."""
    (found,) = (
        node for node in ast.walk(trees[module]) if isinstance(node, ast.ClassDef) and node.name == name
    )
    result = {}
    for function in (node for node in found.body if isinstance(node, ast.FunctionDef)):
        arguments = function.args
        names = [argument.arg for argument in arguments.args]
        defaults = len(arguments.defaults)
        names = names[: len(names) - defaults] + [f"{n}=..." for n in names[len(names) - defaults :]]
        names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
        names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
        result[function.name] = names
    return result


def recorded(*keys: str) -> dict[str, Any]:
    return {name: what for key in keys for name, what in api["classes"][key].items()}


OVERRIDES = [
    ("connector.py", "PdcoordConnector", (f"{BASE}:KVConnectorBase_V1", f"{BASE}:SupportsHMA")),
    ("stats.py", "PdcoordStats", (f"{METRICS}:KVConnectorStats",)),
    ("stats.py", "PdcoordMetrics", (f"{METRICS}:KVConnectorPromMetrics",)),
]
each_class = pytest.mark.parametrize(("module", "name", "bases"), OVERRIDES)


@each_class
def test_every_method_has_the_parameters_of_the_one_it_overrides(
    module: str, name: str, bases: tuple[str, ...]
) -> None:
    theirs = recorded(*bases)
    ours = {n: p for n, p in methods(module, name).items() if n in theirs}
    expected = {}
    for method in ours:
        wanted = theirs[method].get("parameters", ["self"])
        expected[method] = ["cls", *wanted[1:]] if theirs[method]["kind"] == "classmethod" else wanted
    assert ours == expected


def test_every_abstract_method_is_there() -> None:
    ours = methods("connector.py", "PdcoordConnector")
    theirs = recorded(f"{BASE}:KVConnectorBase_V1", f"{BASE}:SupportsHMA")
    assert [name for name, what in theirs.items() if what.get("is_abstract") and name not in ours] == []


def test_the_connector_has_no_public_method_that_vllm_does_not_know() -> None:
    theirs = recorded(f"{BASE}:KVConnectorBase_V1", f"{BASE}:SupportsHMA")
    ours = methods("connector.py", "PdcoordConnector")
    assert [name for name in ours if not name.startswith("_") and name not in theirs] == []


def test_nothing_is_imported_from_vllm_but_what_is_recorded() -> None:
    known = {key for section in api.values() if isinstance(section, dict) for key in section}
    known |= {f"{BASE}:{name}" for name in ("KVConnectorMetadata", "KVConnectorHandshakeMetadata")}
    imported = {
        f"{node.module}:{alias.name}"
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for alias in node.names
    }
    assert imported - known == set()


@pytest.mark.parametrize("module", FROM_VLLM)
def test_the_attributes_that_are_read_are_recorded(module: str) -> None:
    missing = []
    for node in ast.walk(trees[module]):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        kinds = KINDS.get(node.value.id)
        if kinds is None:
            continue
        sections = [kind.partition("/") for kind in kinds]
        if not any(node.attr in api[section][key] for section, _, key in sections):
            missing.append(f"{module}:{node.lineno} {node.value.id}.{node.attr}")
    assert missing == []


def test_the_statuses_and_roles_that_are_named_exist() -> None:
    named = {
        (node.value.id, node.attr)
        for node in ast.walk(trees["connector.py"])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    for key, members in api["members"].items():
        name = key.partition(":")[2]
        assert {attr for owner, attr in named if owner == name} <= set(members)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
@pytest.mark.filterwarnings("ignore")  # vLLM and torch warn of each other.
def test_the_record_is_of_the_vllm_that_is_installed() -> None:
    live = runpy.run_path(str(HERE / "record_vllm_api.py"))["described"]()
    assert live == api, "vLLM has changed: adapt the connector, then write the record anew"
