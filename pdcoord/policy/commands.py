"""`pdcoord policy check`, `pdcoord policy schema` and `pdcoord policy crd`."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pdcoord.policy.compile import CompiledPolicy, compile_policy
from pdcoord.policy.crd import crd_text
from pdcoord.policy.endpoints import (
    EndpointsDocument,
    MatchedEndpoint,
    match_endpoints,
    parse_endpoints,
    unmatched_entries,
)
from pdcoord.policy.errors import PolicyError, Problem
from pdcoord.policy.load import parse_policies
from pdcoord.policy.reference import json_schema_text
from pdcoord.policy.summary import describe_policy
from pdcoord.policy.yamltext import parse_documents, read_bytes

Found = CompiledPolicy | EndpointsDocument | PolicyError


@dataclass(frozen=True, slots=True)
class _Matching:
    """What a policy makes of the endpoints files given with it."""

    matched: tuple[MatchedEndpoint, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def check(paths: Sequence[Path], out: TextIO | None = None) -> int:
    """Say what is wrong with files, or what they describe; return the exit status, 0 or 1.

    Each policy is judged by itself, as `pdcoord serve` reads one, and together with the endpoints files
    among `paths`.
    """
    stream = sys.stdout if out is None else out
    found = [(path, _load(path)) for path in paths]
    endpoints = [file for _, file in found if isinstance(file, EndpointsDocument)]
    is_good = True
    for path, file in found:
        lines, is_file_good = _report(path, file, endpoints)
        is_good = is_good and is_file_good
        for line in lines:
            # A file name may hold bytes that no terminal can show.
            encoding = stream.encoding or "utf-8"
            stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 0 if is_good else 1


def schema() -> str:
    """JSON Schema (2020-12) of a PoolPolicy document, for editors and other checkers."""
    return json_schema_text()


def definition() -> str:
    """The PoolPolicy CustomResourceDefinition, as YAML that ends in a newline."""
    return crd_text()


def _load(path: Path) -> Found:
    """Read a file by the kind of its first document."""
    try:
        raw = read_bytes(path)
        first = parse_documents(raw, str(path))[0].data
        if isinstance(first, dict) and first.get("kind") == "Endpoints":
            return parse_endpoints(raw, str(path))
        return compile_policy(parse_policies(raw, str(path)))
    except PolicyError as error:
        return error


def _report(path: Path, file: Found, endpoints: Sequence[EndpointsDocument]) -> tuple[list[str], bool]:
    """Lines about one file, and whether it is good."""
    if isinstance(file, PolicyError):
        return str(file).splitlines(), False
    if isinstance(file, EndpointsDocument):
        return [f"{path}: ok, {_count(len(file.entries), 'endpoint')}"], True
    has_selector = any(binding.match_labels is not None for binding in file.bindings)
    matching = _match(file, endpoints if has_selector else ())
    if matching.problems:
        return [str(problem) for problem in matching.problems], False
    warnings = [warning.format("warning") for warning in (*file.warnings, *matching.warnings)]
    head = f"{path}: ok, {_count(len(file.models), 'model')}, {_count(len(warnings), 'warning')}"
    return [*warnings, head, *describe_policy(file, matching.matched if endpoints else None), ""], True


def _match(policy: CompiledPolicy, endpoints: Iterable[EndpointsDocument]) -> _Matching:
    matched: list[MatchedEndpoint] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for document in endpoints:
        try:
            matched += match_endpoints(policy.bindings, document)
        except PolicyError as error:
            problems += error.problems
        else:
            warnings += unmatched_entries(policy.bindings, document)
    return _Matching(tuple(matched), tuple(problems), tuple(warnings))


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
