"""Policy files to documents that are sound, or to everything that is wrong with them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pdcoord.core.fleet import ModelName
from pdcoord.policy.checks import Parts, PoolPart, problems_of
from pdcoord.policy.errors import PolicyError, Problem
from pdcoord.policy.fallbackschema import FallbackSpec
from pdcoord.policy.forms import flattened
from pdcoord.policy.pools import compile_pool
from pdcoord.policy.poolschema import PoolSpec
from pdcoord.policy.schema import DisaggregationSpec, ModelSpec, PoolPolicy
from pdcoord.policy.values import Metadata
from pdcoord.policy.yamltext import Document, parse_documents, read_bytes, validate

PartClass = TypeVar("PartClass", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class PolicyDocument:
    """One model's policy, sound by itself and beside the others of its file."""

    spec: PoolPolicy
    document: Document


def load_policies(path: Path) -> tuple[PolicyDocument, ...]:
    """Read a policy file: one or more PoolPolicy documents, one model each.

    Raises:
        PolicyError: with everything that is wrong, not just the first; nothing of the file is used.
    """
    return parse_policies(read_bytes(path), str(path))


def parse_policies(raw: bytes, file: str) -> tuple[PolicyDocument, ...]:
    """`load_policies` for bytes at hand; `file` is how problems name them."""
    loaded: list[PolicyDocument] = []
    problems: list[Problem] = []
    all_parts: list[Parts] = []
    for document in parse_documents(raw, file):
        policy, parts, found = _read(document)
        problems += found
        if policy is not None:
            loaded.append(policy)
        if parts is not None:
            all_parts.append(parts)
    problems += problems_of(all_parts)
    if problems:
        raise PolicyError(problems)
    return tuple(loaded)


def read_policy(document: Document) -> PolicyDocument:
    """One document by itself, whichever form it has.

    Raises:
        PolicyError: with everything that is wrong with it.
    """
    policy, parts, problems = _read(document)
    problems = [*problems, *problems_of([] if parts is None else [parts])]
    if policy is None or problems:
        raise PolicyError(problems)
    return policy


def _read(document: Document) -> tuple[PolicyDocument | None, Parts | None, list[Problem]]:
    """The policy of a document if it has one, its sound parts, and what is wrong with the others."""
    flat, form_problems = flattened(document)
    problems = list(form_problems)
    if problems and not flat.beneath:
        return None, None, problems
    try:
        policy = PolicyDocument(validate(flat, PoolPolicy), flat)
    except PolicyError as error:
        return None, _salvage(flat), [*problems, *error.problems]
    return policy, parts_of(policy), problems


def parts_of(policy: PolicyDocument) -> Parts:
    """The parts of a sound document."""
    model = ModelName(policy.spec.model.name)
    pools = [PoolPart(i, spec, compile_pool(spec, model)) for i, spec in enumerate(policy.spec.pools)]
    return Parts(
        document=policy.document,
        metadata_name=policy.spec.metadata.name,
        model=policy.spec.model,
        pools=tuple(pools),
        is_complete=True,
        disaggregation=policy.spec.disaggregation,
        fallback=policy.spec.fallback,
    )


def _salvage(document: Document) -> Parts:
    """The sound parts of an unsound document, so that what is wrong between them is said at once too."""
    data = document.data if isinstance(document.data, dict) else {}
    listed = data.get("pools")
    pools = listed if isinstance(listed, list) else []
    model = _read_part(data.get("model"), ModelSpec)
    metadata = _read_part(data.get("metadata"), Metadata)
    name = ModelName(model.name if model else "")
    parts = [
        PoolPart(i, spec, compile_pool(spec, name))
        for i, pool in enumerate(pools)
        if (spec := _read_part(pool, PoolSpec)) is not None
    ]
    return Parts(
        document=document,
        metadata_name=metadata.name if metadata else None,
        model=model,
        pools=tuple(parts),
        is_complete=0 < len(parts) == len(pools),
        disaggregation=_read_part(data.get("disaggregation", {}), DisaggregationSpec),
        fallback=_read_part(data.get("fallback", {}), FallbackSpec),
    )


def _read_part(data: object, part_class: type[PartClass]) -> PartClass | None:
    try:
        return part_class.model_validate_json(json.dumps(data), strict=True)
    except ValidationError:
        return None
