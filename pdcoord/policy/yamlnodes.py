"""YAML text to nodes that know their line, read event by event under limits, and to plain data."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from pdcoord.policy.errors import KeyPath, quote

DEPTH_MAX = 32
VALUES_MAX = 200_000
"""Bound on the values of all documents of a file with aliases expanded: the defence against a few
hundred bytes of nested aliases that stand for billions of values."""
NUMBER_LENGTH_MAX = 64
MERGE_KEY = "<<"

# libyaml's parser is ten times faster; both yield the same events.
_LOADER: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# YAML 1.2 core schema (yaml.org/spec/1.2.2, 10.3.2), less its octal-looking decimals: PyYAML's own
# resolver speaks YAML 1.1, in which `no` is false, 1:30 is 90 and 1e9 is text.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_OCTAL = re.compile(r"0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_WORDS: dict[str, bool | float | None] = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
    ".nan": float("nan"),
    ".NaN": float("nan"),
    ".NAN": float("nan"),
}
_TAG = "tag:yaml.org,2002:"
Scalar = bool | int | float | str | None
Data = Scalar | list["Data"] | dict[str, "Data"]


class YamlTextError(Exception):
    """The text is not one that can be read; `line` counts from 1, None where it is not known."""

    def __init__(self, line: int | None, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True, slots=True)
class ScalarNode:
    line: int
    value: Scalar


@dataclass(frozen=True, slots=True)
class SequenceNode:
    line: int
    items: list["Node"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class MappingNode:
    """A mapping as written: keys may repeat, merge keys are not resolved."""

    line: int
    entries: list[tuple["Node", "Node"]] = field(default_factory=list)


Node = ScalarNode | SequenceNode | MappingNode


def read_nodes(text: str, *, documents_max: int) -> Iterator[Node]:
    """Yield the root of each document.

    Raises:
        YamlTextError: if the text is not YAML, nests deeper than DEPTH_MAX or uses a tag of its own,
            or holds more than `documents_max` documents.
    """
    try:
        events = yaml.parse(text, Loader=_LOADER)
        documents_left = documents_max
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents_left -= 1
                if documents_left < 0:
                    raise YamlTextError(
                        _line_of(event), f"holds more than {documents_max} documents; split it"
                    )
                yield _Reader(events).read(next(events), DEPTH_MAX)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # A parser puts the end of input on a line after the last.
        line = None if mark is None else min(mark.line, text.rstrip("\n").count("\n")) + 1
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlTextError(line, f"is not YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        raise YamlTextError(_control_line(text), "is not YAML: holds a control character") from error


def _control_line(text: str) -> int | None:
    """Line of the first character that YAML text must not hold."""
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    return None if found is None else text.count("\n", 0, found.start()) + 1


class _Reader:
    """Builds the nodes of one document from its events."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._anchors: dict[str, Node] = {}

    def read(self, event: yaml.Event, depth_left: int) -> Node:
        """Read the node that `event` begins."""
        line = _line_of(event)
        if depth_left == 0:
            raise YamlTextError(line, f"nests deeper than {DEPTH_MAX} levels")
        node: Node
        match event:
            case yaml.AliasEvent():
                return self._named(event.anchor or "", line)
            case yaml.SequenceStartEvent():
                _refuse_tag(event.tag, "seq", line)
                node = SequenceNode(line, list(self._read_items(depth_left)))
            case yaml.MappingStartEvent():
                _refuse_tag(event.tag, "map", line)
                items = list(self._read_items(depth_left))
                node = MappingNode(line, list(zip(items[::2], items[1::2], strict=True)))
            case yaml.ScalarEvent():
                node = ScalarNode(line, _scalar(event, line))
            case _:
                raise YamlTextError(line, "is not YAML: a document ends before its value")
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _named(self, anchor: str, line: int) -> Node:
        # An anchor counts once its node has ended, so that no node can hold itself.
        if anchor not in self._anchors:
            raise YamlTextError(line, f"alias {quote(anchor)} has no anchor that ended before it")
        return self._anchors[anchor]

    def _read_items(self, depth_left: int) -> Iterator[Node]:
        for event in self._events:
            if isinstance(event, yaml.CollectionEndEvent):
                return
            yield self.read(event, depth_left - 1)


def _line_of(event: yaml.Event) -> int:
    return 1 if event.start_mark is None else event.start_mark.line + 1


def _refuse_tag(tag: str | None, expected: str, line: int) -> None:
    if tag not in {None, "!", _TAG + expected}:
        raise YamlTextError(
            line, f"tag {quote(str(tag).replace(_TAG, '!!'))} is not allowed here; leave it out"
        )


def _scalar(event: yaml.ScalarEvent, line: int) -> Scalar:
    text: str = event.value
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise YamlTextError(line, "holds half a surrogate pair, which is not a character")
    is_text = event.tag in {"!", _TAG + "str"} or (event.tag is None and not event.implicit[0])
    if is_text:
        return text
    _refuse_tag(event.tag, "str", line)
    return _resolve(text, line)


def _resolve(text: str, line: int) -> Scalar:
    """Read a plain scalar by the core schema."""
    if text in _WORDS:
        return _WORDS[text]
    for pattern, base in ((_INTEGER, 10), (_HEXADECIMAL, 16), (_OCTAL, 8)):
        if pattern.fullmatch(text):
            _refuse_long_number(text, line)
            return int(text, base) if base == 10 else int(text[2:], base)
    if _FLOAT.fullmatch(text):
        _refuse_long_number(text, line)
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return float(infinite[1] + "inf")
    return text


def _refuse_long_number(text: str, line: int) -> None:
    if len(text) > NUMBER_LENGTH_MAX:
        raise YamlTextError(
            line, f"holds a number of {len(text)} characters, {NUMBER_LENGTH_MAX} are allowed"
        )


@dataclass(slots=True)
class PlainData:
    """One document as plain data, with the line of every value and all that is wrong with its keys.

    Attributes:
        lines: of a mapping's entry the line of its key, of a sequence's item that of the item.
        problems: (line, key path, message).
    """

    data: Data = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, KeyPath, str]] = field(default_factory=list)


class DataBuilder:
    """Expands aliases and merge keys; one per file, since the bound on values is the file's."""

    def __init__(self) -> None:
        self._values_left = VALUES_MAX

    def build(self, root: Node) -> PlainData:
        """Build one document; keys that repeat or are not text are problems, the rest is kept.

        Raises:
            YamlTextError: if aliases expand past VALUES_MAX or DEPTH_MAX.
        """
        plain = PlainData()
        plain.data = self._value(plain, root, (), root.line)
        return plain

    def _value(self, plain: PlainData, node: Node, path: KeyPath, line: int) -> Data:
        plain.lines[path] = line
        self._spend(1, node.line)
        if len(path) > DEPTH_MAX:
            raise YamlTextError(node.line, f"nests deeper than {DEPTH_MAX} levels once aliases are expanded")
        if isinstance(node, ScalarNode):
            return node.value
        if isinstance(node, SequenceNode):
            return [self._value(plain, item, (*path, i), item.line) for i, item in enumerate(node.items)]
        return {
            key: self._value(plain, value, (*path, key), key_line)
            for key, (key_line, value) in self._entries(plain, node, path, DEPTH_MAX).items()
        }

    def _entries(
        self, plain: PlainData, node: MappingNode, path: KeyPath, merges_left: int
    ) -> dict[str, tuple[int, Node]]:
        """Entries by key with the key's line; what is written here wins over what is merged in."""
        self._spend(len(node.entries), node.line)
        entries: dict[str, tuple[int, Node]] = {}
        merged: dict[str, tuple[int, Node]] = {}
        for key, value in node.entries:
            if not isinstance(key, ScalarNode) or not isinstance(key.value, str):
                message = "a key is not text; put it in quotes or remove it"
                plain.problems.append((key.line, path, message))
            elif key.value == MERGE_KEY:
                sources = self._merge_sources(plain, key.line, value, path)
                if sources and not merges_left:
                    raise YamlTextError(key.line, f"merges through more than {DEPTH_MAX} levels")
                for source in sources:
                    for name, entry in self._entries(plain, source, path, merges_left - 1).items():
                        merged.setdefault(name, entry)
            elif key.value in entries:
                message = f"key {quote(key.value)} is already set on line {entries[key.value][0]}; keep one"
                plain.problems.append((key.line, path, message))
            else:
                entries[key.value] = (key.line, value)
        return {**merged, **entries}

    @staticmethod
    def _merge_sources(plain: PlainData, line: int, value: Node, path: KeyPath) -> list[MappingNode]:
        """The mapping or mappings that a merge key names."""
        named = value.items if isinstance(value, SequenceNode) else [value]
        sources = [node for node in named if isinstance(node, MappingNode)]
        if len(sources) != len(named):
            plain.problems.append((line, path, "a merge key << takes a mapping or a list of mappings"))
        return sources

    def _spend(self, count: int, line: int) -> None:
        self._values_left -= count
        if self._values_left < 0:
            raise YamlTextError(line, f"holds more than {VALUES_MAX} values once aliases are expanded")
