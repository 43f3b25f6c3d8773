"""YAML files that people write, read with the line of every value and checked against a model."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pdcoord.policy.errors import KeyPath, PolicyError, Problem, quote
from pdcoord.policy.expect import Expectations, expectations_of
from pdcoord.policy.yamlnodes import Data, DataBuilder, YamlTextError, read_nodes
from pdcoord.wire.files import read_regular

FILE_BYTES_MAX = 1 << 20
"""1 MiB, which is also the most that a Kubernetes ConfigMap holds."""
DOCUMENTS_MAX = 256

ModelClass = TypeVar("ModelClass", bound=BaseModel)


class FaultsError(ValueError):
    """Raised by a pydantic validator that finds fault with several values beneath its own.

    Attributes:
        faults: (key path from the value that is validated, message).
    """

    def __init__(self, faults: Iterable[tuple[KeyPath, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(message for _, message in self.faults))


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document of a file.

    Attributes:
        file: the file as the operator named it.
        data: plain data: None, bool, int, float, str, list, dict with text keys.
        positions: line of every value by its key path in the text; of a mapping's entry it is the key's
            line. Empty where there is no text, as for an object that an API server sent.
        beneath: the key of the text under which everything stands that is not in `outside`; empty where
            `data` is shaped as the text is.
        outside: keys that stand at the top all the same.
    """

    file: str
    data: Data
    positions: Mapping[KeyPath, int]
    beneath: str = ""
    outside: frozenset[str] = frozenset()

    def written_path(self, key_path: KeyPath) -> KeyPath:
        """Where a value of `data` stands in the text."""
        if not self.beneath or not key_path or key_path[0] in self.outside:
            return key_path
        return (self.beneath, *key_path)

    def position_of(self, key_path: KeyPath) -> int | None:
        """Line of a value, counted from 1; where it is not written, of what would hold it."""
        written = self.written_path(key_path)
        for length in range(len(written), 0, -1):
            if written[:length] in self.positions:
                return self.positions[written[:length]]
        return self.positions.get(())

    def place_of(self, key_path: KeyPath) -> str:
        """Where a value stands, in words for a problem elsewhere: `line 7`, or the object it is of."""
        line = self.position_of(key_path)
        return self.file if line is None else f"line {line}"

    def problem(self, key_path: KeyPath, message: str) -> Problem:
        """A problem with a value of this document, on its line."""
        return Problem(self.file, self.position_of(key_path), self.written_path(key_path), message)


def read_bytes(path: Path, *, is_watched: bool = False) -> bytes:
    """Read a file of at most FILE_BYTES_MAX bytes.

    Args:
        is_watched: it is read again and again, so that it has to be a regular file; else a pipe will do.

    Raises:
        PolicyError: if it cannot be read, is a directory, or is too large.
    """
    try:
        if path.is_dir():
            raise PolicyError([Problem(str(path), None, (), "is a directory; name one YAML file")])
        if is_watched:
            raw = read_regular(path, FILE_BYTES_MAX)
        else:
            with path.open("rb") as file:
                raw = file.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PolicyError([Problem(str(path), None, (), f"cannot be read: {reason}")]) from error
    if len(raw) > FILE_BYTES_MAX:
        raise PolicyError([Problem(str(path), None, (), f"is larger than {FILE_BYTES_MAX} bytes; split it")])
    return raw


def read_documents(path: Path) -> list[Document]:
    """Read every document of a file; empty ones, as templates leave behind, are skipped.

    Raises:
        PolicyError: if the file cannot be read, is not YAML, breaks a limit, repeats a key, or holds
            no document.
    """
    return parse_documents(read_bytes(path), str(path))


def parse_documents(raw: bytes, file: str) -> list[Document]:
    """`read_documents` for bytes at hand; `file` is how problems name them."""
    documents: list[Document] = []
    problems: list[Problem] = []
    builder = DataBuilder()
    try:
        for root in read_nodes(_decode(raw), documents_max=DOCUMENTS_MAX):
            plain = builder.build(root)
            problems += [Problem(file, line, path, message) for line, path, message in plain.problems]
            if plain.data is not None:
                documents.append(Document(file, plain.data, plain.lines))
    except YamlTextError as error:
        problems.append(Problem(file, error.line, (), error.message))
    if not problems and not documents:
        problems.append(Problem(file, None, (), "holds no document"))
    if problems:
        raise PolicyError(problems)
    return documents


def _decode(raw: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise YamlTextError(line, "is not UTF-8 text; save it as UTF-8") from error


def validate(document: Document, model_class: type[ModelClass]) -> ModelClass:
    """Check a document against a pydantic model, strictly: no text where a number is expected.

    A validator of the model may raise ValueError for its own value or FaultsError for values
    beneath it. A document of another kind or version is reported as that alone.

    Raises:
        PolicyError: with one problem per value at fault.
    """
    try:
        # As JSON, because pydantic's strict mode takes a list for a tuple and text for an enum there.
        return model_class.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
    expectations = expectations_of(model_class)
    problems = [
        document.problem(path, message)
        for detail in details
        for path, message in _faults_of(detail, expectations, document)
    ]
    wrong_kind = [p for p in problems if p.key_path in {("kind",), ("apiVersion",)} and _is_set(document, p)]
    raise PolicyError(wrong_kind or problems)


def _is_set(document: Document, problem: Problem) -> bool:
    return isinstance(document.data, dict) and problem.key_path[0] in document.data


def _faults_of(
    detail: ErrorDetails, expectations: Expectations, document: Document
) -> Iterator[tuple[KeyPath, str]]:
    """Put one of pydantic's errors into an operator's words."""
    path: KeyPath = detail["loc"]
    if path[-1:] == ("[key]",):
        key = show(detail["input"])
        yield path[:-1], f"has the key {key}, expected {expectations.key_words(path[:-2])}"
        return
    match detail["type"]:
        case "missing":
            yield path, f"is missing, expected {expectations.words(path)}"
        case "extra_forbidden":
            top, outside = document.beneath or "the top level", document.outside
            suggestion = expectations.suggestion(path[:-1], str(path[-1]), top, outside)
            yield path, f"is not a known key; {suggestion}"
        case "value_error":
            error = detail["ctx"]["error"]
            if isinstance(error, FaultsError):
                yield from ((path + beneath, message) for beneath, message in error.faults)
            else:
                yield path, str(error)
        case "too_short" if len(detail["input"]) >= detail["ctx"]["min_length"]:
            pass  # Only the sound items were counted, and the others have problems of their own.
        case _:
            yield path, f"is {show(detail['input'])}, expected {expectations.words(path)}"


def show(value: object) -> str:
    """Write a value from a file into a message: a scalar as YAML would, of the rest only its kind."""
    match value:
        case None:
            return "empty"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case str():
            return quote(value)
        case dict():
            return "a mapping"
        case _:
            return f"a list of {len(value)}" if isinstance(value, list) else "a value"
