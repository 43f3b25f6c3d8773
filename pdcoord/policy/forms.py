"""The two forms of a policy document: with its keys at the top, or beneath `spec` as Kubernetes has it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pdcoord.policy.errors import Problem
from pdcoord.policy.yamltext import Document, show

OUTSIDE = frozenset({"apiVersion", "kind", "metadata"})
"""What stands at the top in both forms."""
SPEC = "spec"
STATUS = "status"
OBJECT_META = frozenset(
    {
        "annotations",
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generateName",
        "generation",
        "labels",
        "managedFields",
        "namespace",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    }
)
"""What else an object's metadata may hold (ObjectMeta, Kubernetes 1.37); nothing of it matters here."""


def flattened(document: Document) -> tuple[Document, tuple[Problem, ...]]:
    """A document with its keys at the top, whichever form it was written in, and what is wrong with the form.

    Problems with the values of the document that comes back still name the path and line in the text.
    """
    data = document.data
    if not isinstance(data, dict) or SPEC not in data:
        return document, ()
    spec = data[SPEC]
    if not isinstance(spec, dict):
        problem = document.problem((SPEC,), f"is {show(spec)}, expected a mapping with model and pools")
        return document, (problem,)
    problems = [
        document.problem((key,), f"is set beside {SPEC}; move it into {SPEC}, or remove it")
        for key in data
        if key not in OUTSIDE and key not in {SPEC, STATUS}
    ]
    problems += [
        document.problem((SPEC, key), f"is set in {SPEC}; move it to the top level")
        for key in spec
        if key in OUTSIDE
    ]
    outer = {key: value for key, value in data.items() if key in OUTSIDE}
    metadata = outer.get("metadata")
    if isinstance(metadata, dict):
        outer["metadata"] = {key: value for key, value in metadata.items() if key not in OBJECT_META}
    flat = {**{key: value for key, value in spec.items() if key not in OUTSIDE}, **outer}
    return replace(document, data=flat, beneath=SPEC, outside=OUTSIDE), tuple(problems)


def document_of(given: Mapping[str, object]) -> Document:
    """The document that an object of an API server is; problems name the object where a file has lines.

    What a server of a later version puts into metadata is no problem of whoever wrote the policy.
    """
    metadata = given.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    data: dict[str, Any] = {key: value for key, value in given.items() if key in {"apiVersion", "kind"}}
    data |= {"metadata": {"name": name}, SPEC: given.get(SPEC)}
    return Document(f"PoolPolicy {name}", data, {})
