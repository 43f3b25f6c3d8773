"""Recorded traffic: Mooncake's JSON lines and Azure's CSV, row by row, with bad rows left out and named."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import BinaryIO

from pdcoord.policy.errors import quote

ROWS_MAX = 1_000_000
ROW_BYTES_MAX = 1 << 20
TOKENS_MAX = 10_000_000
NAMED_MAX = 20
"""Bad rows that are named; the rest is counted."""
MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(Exception):
    """A trace cannot be used at all; the message is about the file."""


class RowError(ValueError):
    """A row cannot be used; the message names field and value."""


@dataclass(frozen=True, slots=True)
class Row:
    """One call of a trace.

    Attributes:
        at_s: in the trace's own time while it is read; from its first row once it is.
        hash_ids: one for each block of 512 tokens, the last perhaps not full; empty where unknown.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """Which rows are wanted.

    Attributes:
        rows_max: the first so many; None for all.
        from_s, until_s: from the first row's time; None for no end.
        context_tokens_max: rows of more tokens, prompt and answer together, are left out.
    """

    rows_max: int | None = None
    from_s: float = 0.0
    until_s: float | None = None
    context_tokens_max: int = TOKENS_MAX


@dataclass(slots=True)
class Trace:
    """What a file held, in the order of time.

    Attributes:
        skipped_count: rows that could not be used.
        too_long_count: sound rows that were left out for `context_tokens_max`.
        named: the first NAMED_MAX of those skipped, as `row 3: output_length is -1, expected ...`.
    """

    rows: list[Row] = field(default_factory=list)
    skipped_count: int = 0
    too_long_count: int = 0
    named: list[str] = field(default_factory=list)

    def skip(self, number: int, why: str) -> None:
        self.skipped_count += 1
        if len(self.named) < NAMED_MAX:
            self.named.append(f"row {number}: {why}")

    def notes(self, name: str) -> list[str]:
        """What a person should know of the reading, in lines; empty if all went well."""
        lines = [f"{name}: {text}; skipped" for text in self.named]
        if self.skipped_count > len(self.named):
            lines.append(f"{name}: {self.skipped_count} rows were skipped, the first {NAMED_MAX} are named")
        if self.too_long_count:
            lines.append(
                f"{name}: {self.too_long_count} rows were left out: more tokens than context_tokens_max"
            )
        return lines


def read_mooncake(path: Path, window: Window) -> Trace:
    """A trace of Mooncake's FAST'25 release: timestamp in ms, input_length, output_length, hash_ids.

    Raises:
        TraceError: if the file cannot be read, or no row of it can be used.
    """
    return _read(path, window, _mooncake_rows)


def read_azure(path: Path, window: Window) -> Trace:
    """A trace of AzurePublicDataset, LLM inference 2023 or 2024: TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        TraceError: if the file cannot be read, lacks a column, or no row of it can be used.
    """
    return _read(path, window, _azure_rows)


_Rows = Iterator[tuple[int, Row | RowError]]


def _read(path: Path, window: Window, rows_of: Callable[[BinaryIO], _Rows]) -> Trace:
    trace = Trace()
    try:
        with path.open("rb") as file:
            _collect(rows_of(file), window, trace)
    except OSError as error:
        message = f"is {quote(str(path))}, which cannot be read: {error.strerror or error}"
        raise TraceError(message) from error
    if not trace.rows:
        first = f"; {trace.named[0]}" if trace.named else ""
        message = f"is {quote(str(path))}, of which no row can be used: {trace.skipped_count} are bad{first}"
        raise TraceError(message)
    trace.rows.sort(key=lambda row: row.at_s)
    return trace


def _collect(rows: _Rows, window: Window, trace: Trace) -> None:
    origin_s: float | None = None
    for number, row in rows:
        if number > ROWS_MAX:
            raise TraceError(f"has more than {ROWS_MAX} rows; cut the file, or set first_rows")
        if isinstance(row, RowError):
            trace.skip(number, str(row))
            continue
        if origin_s is None:
            origin_s = row.at_s
        at_s = row.at_s - origin_s
        if at_s < 0.0:
            trace.skip(number, "is earlier than the first row that can be used; sort the file by time")
            continue
        if at_s < window.from_s or (window.until_s is not None and at_s >= window.until_s):
            continue
        if row.prompt_tokens + row.output_tokens > window.context_tokens_max:
            trace.too_long_count += 1
            continue
        trace.rows.append(Row(at_s - window.from_s, row.prompt_tokens, row.output_tokens, row.hash_ids))
        if window.rows_max is not None and len(trace.rows) >= window.rows_max:
            return


def _lines(file: BinaryIO) -> Iterator[tuple[int, str | RowError]]:
    """Lines that are not blank, by number; of one that is too long nothing is kept in memory."""
    number = 0
    while raw := file.readline(ROW_BYTES_MAX + 1):
        number += 1
        if len(raw) > ROW_BYTES_MAX:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(ROW_BYTES_MAX)
            yield number, RowError(f"is longer than {ROW_BYTES_MAX} bytes")
            continue
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            yield number, RowError("is not UTF-8 text")
            continue
        if text:
            yield number, text


def _mooncake_rows(file: BinaryIO) -> _Rows:
    for number, line in _lines(file):
        if isinstance(line, RowError):
            yield number, line
            continue
        try:
            yield number, _mooncake_row(line)
        except RowError as error:
            yield number, error


def _mooncake_row(line: str) -> Row:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise RowError("is not JSON") from None
    if not isinstance(data, dict):
        raise RowError("is no JSON object")
    at_ms = data.get("timestamp")
    if not isinstance(at_ms, int | float) or isinstance(at_ms, bool) or not 0 <= at_ms <= 1e15:
        raise RowError(f"timestamp is {_shown(at_ms)}, expected milliseconds of 0 or more")
    prompt_tokens = _whole("input_length", data.get("input_length"))
    output_tokens = _whole("output_length", data.get("output_length"))
    ids = data.get("hash_ids")
    block_count = -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS)
    if not isinstance(ids, list) or len(ids) != block_count:
        found = f"a list of {len(ids)}" if isinstance(ids, list) else _shown(ids)
        wanted = f"{block_count} ids for {prompt_tokens} tokens in blocks of {MOONCAKE_BLOCK_TOKENS}"
        raise RowError(f"hash_ids is {found}, expected {wanted}")
    for each in ids:
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < 1 << 64:
            raise RowError(f"hash_ids holds {_shown(each)}, expected whole numbers below 2^64")
    return Row(at_ms / 1e3, prompt_tokens, output_tokens, tuple(ids))


def _azure_rows(file: BinaryIO) -> _Rows:
    lines = _lines(file)
    places = _azure_places(next(lines, (0, "")))
    for number, line in lines:
        if isinstance(line, RowError):
            yield number, line
            continue
        try:
            yield number, _azure_row(line, places)
        except RowError as error:
            yield number, error


def _azure_places(header: tuple[int, str | RowError]) -> tuple[int, int, int]:
    """Where the columns stand."""
    line = header[1]
    names = [name.strip() for name in _cells(line)] if isinstance(line, str) and line else []
    missing = [name for name in AZURE_COLUMNS if name not in names]
    if missing:
        found = ", ".join(quote(name) for name in names[:10]) or "none"
        raise TraceError(f"has no column {', '.join(missing)}; its first line has {found}")
    first, second, third = (names.index(name) for name in AZURE_COLUMNS)
    return first, second, third


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _azure_row(line: str, places: tuple[int, int, int]) -> Row:
    cells = _cells(line)
    if len(cells) <= max(places):
        raise RowError(f"has {len(cells)} columns, expected at least {max(places) + 1}")
    when, prompt, output = (cells[place].strip() for place in places)
    try:
        at = datetime.fromisoformat(when)
    except ValueError:
        raise RowError(f"TIMESTAMP is {quote(when)}, expected such as 2023-11-16 18:15:46.68") from None
    at_s = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
    return Row(at_s, _whole("ContextTokens", prompt), _whole("GeneratedTokens", output))


def _whole(name: str, value: object) -> int:
    """A count of tokens, written as a number or, in CSV, as digits."""
    number = value
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 12:
        number = int(value)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= TOKENS_MAX:
        raise RowError(f"{name} is {_shown(value)}, expected a whole number from 1 to {TOKENS_MAX}")
    return number


def _shown(value: object) -> str:
    match value:
        case None:
            return "missing"
        case bool() | list() | dict():
            return f"a {type(value).__name__}"
        case float() if not isfinite(value):
            return "not finite"
        case int() if abs(value) >= 10**20:
            return "a number of more than 20 digits"
        case str():
            return quote(value)
        case _:
            return str(value)
