"""Results as JSON lines: one call a line, one file a run."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from pdcoord.sim.study.results import CallResult
from pdcoord.sim.study.statistics import Summary

_DECIMALS = 6
"""Microseconds are kept; what is finer is noise of addition, and would make files differ."""


def encode_result(result: CallResult) -> bytes:
    """One line, without its end."""
    return msgspec.json.encode(rounded(asdict(result)))


def decode_result(line: bytes) -> CallResult:
    """The result that a line holds.

    Raises:
        msgspec.DecodeError: saying what is wrong; nothing of the line is used.
    """
    return _DECODER.decode(line)


def write_results(path: Path, results: Iterable[CallResult]) -> None:
    """Write a file in the order given."""
    with path.open("wb") as file:
        file.writelines(encode_result(result) + b"\n" for result in results)


@dataclass(frozen=True, slots=True)
class BadLine:
    """One line that could not be used; `number` counts from 1."""

    number: int
    why: str


def read_results(raw: bytes) -> tuple[list[CallResult], list[BadLine]]:
    """All good lines in order, and the bad ones; an empty line is neither."""
    results: list[CallResult] = []
    bad: list[BadLine] = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            results.append(decode_result(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            bad.append(BadLine(number, str(error)))
    return results, bad


def summary_data(summary: Summary) -> dict[str, Any]:
    """A summary as JSON would have it."""
    data: dict[str, Any] = rounded(asdict(summary))
    return data


def rounded(value: Any) -> Any:
    """The value with all its numbers cut to microseconds, mappings throughout."""
    if isinstance(value, float):
        return round(value, _DECIMALS)
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return value


_DECODER = msgspec.json.Decoder(CallResult)
