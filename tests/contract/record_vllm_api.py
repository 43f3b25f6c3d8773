"""Writes down the parts of vLLM that the connector builds on, as JSON; run it with the engines' interpreter.

    .venv-vllm/bin/python tests/contract/record_vllm_api.py > tests/contract/vllm-0.32.0/connector-api.json

Nothing but signatures, names of fields and names of attributes. vllm is imported when it is called.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import sys
import textwrap
from typing import Any

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"
CLASSES = (
    (BASE, "KVConnectorBase_V1"),
    (BASE, "SupportsHMA"),
    (METRICS, "KVConnectorStats"),
    (METRICS, "KVConnectorPromMetrics"),
)
FIELDS = (
    (BASE, "KVConnectorTransferResults"),
    ("vllm.v1.core.sched.output", "SchedulerOutput"),
    ("vllm.v1.core.sched.output", "NewRequestData"),
    ("vllm.v1.core.sched.output", "CachedRequestData"),
    ("vllm.v1.outputs", "KVConnectorOutput"),
    ("vllm.config.kv_transfer", "KVTransferConfig"),
    ("vllm.config.parallel", "ParallelConfig"),
    ("vllm.v1.kv_cache_interface", "FullAttentionSpec"),
    ("vllm.v1.kv_cache_interface", "MLAAttentionSpec"),
    ("vllm.v1.kv_cache_interface", "SlidingWindowSpec"),
    ("vllm.v1.kv_cache_interface", "ChunkedLocalAttentionSpec"),
    ("vllm.v1.kv_cache_interface", "UniformTypeKVCacheSpecs"),
    ("vllm.v1.kv_cache_interface", "KVCacheGroupSpec"),
    ("vllm.v1.kv_cache_interface", "KVCacheConfig"),
    ("vllm.multimodal.inputs", "MultiModalFeatureSpec"),
)
ATTRIBUTES = (("vllm.v1.request", "Request"),)
MEMBERS = (
    (BASE, "KVConnectorRole"),
    ("vllm.v1.request", "RequestStatus"),
    ("vllm.v1.metrics.cache_hit_source", "CacheHitSource"),
    ("vllm.v1.kv_cache_interface", "KVQuantMode"),
    ("vllm.v1.kv_cache_layout", "KVCacheLayout"),
)
FUNCTIONS = (
    ("vllm.v1.core.sched.output", "KVConnectorBlockState.get_block_ids"),
    ("vllm.v1.core.kv_cache_manager", "KVCacheBlocks.get_block_ids"),
    ("vllm.distributed.parallel_state", "get_tp_group"),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.do_kv_cache_update"),
    ("vllm.config.cache", "CacheConfig.get_resolved_kv_cache_layout"),
    ("vllm.config.model", "ModelConfig.get_total_num_kv_heads"),
)


def parameters(function: Any) -> list[str]:
    """Each as Python writes it, without annotation and with `=...` for a default."""
    found = []
    for each in inspect.signature(function).parameters.values():
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        default = "" if each.default is each.empty else "=..."
        found.append(f"{stars}{each.name}{default}")
    return found


def methods(cls: Any) -> dict[str, Any]:
    """Every method of a class that is not private, with its kind and parameters."""
    found: dict[str, Any] = {}
    for name, value in inspect.getmembers_static(cls):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, property):
            found[name] = {"kind": "property"}
            continue
        kind = "classmethod" if isinstance(value, classmethod) else "method"
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function):
            found[name] = {"kind": kind, "parameters": parameters(function)}
            if getattr(function, "__isabstractmethod__", False):
                found[name]["is_abstract"] = True
    return found


def attributes(cls: Any) -> list[str]:
    """What __init__ sets, and the properties."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))
    set_names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    properties = {name for name, value in inspect.getmembers_static(cls) if isinstance(value, property)}
    return sorted(name for name in set_names | properties if not name.startswith("_"))


def found(module: str, name: str) -> Any:
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)
    return value


def described() -> dict[str, Any]:
    """The whole record; raises AttributeError or ImportError for what is gone."""
    return {
        "version": importlib.import_module("vllm.version").__version__,
        "classes": {f"{m}:{n}": methods(found(m, n)) for m, n in CLASSES},
        "fields": {f"{m}:{n}": _fields(found(m, n)) for m, n in FIELDS},
        "attributes": {f"{m}:{n}": attributes(found(m, n)) for m, n in ATTRIBUTES},
        "members": {f"{m}:{n}": [member.name for member in found(m, n)] for m, n in MEMBERS},
        "functions": {f"{m}:{n}": parameters(found(m, n)) for m, n in FUNCTIONS},
    }


def _fields(cls: Any) -> list[str]:
    """Names of a dataclass's fields and of its properties, cached or not."""
    derived = {
        name
        for name, value in inspect.getmembers_static(cls)
        if isinstance(value, property) or type(value).__name__ == "cached_property"
    }
    names = {field.name for field in dataclasses.fields(cls)}
    return sorted(name for name in names | derived if not name.startswith("_"))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(described(), indent=1, sort_keys=True) + "\n")
