"""Lengths and pauses as a person writes them: a number, or what it is drawn from."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import exp, isfinite, log, log1p, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import ClassVar, Literal, Protocol, Self

from pydantic import ConfigDict, Field, model_validator

from pdcoord.policy.errors import KeyPath, quote
from pdcoord.policy.expect import EXPECTED
from pdcoord.policy.values import Spec
from pdcoord.policy.yamltext import FaultsError

AMOUNT_MAX = 10_000_000
FILE_VALUES_MAX = 1_000_000
LINE_CHARACTERS_MAX = 10_000

Shape = Literal["fixed", "uniform", "normal", "lognormal", "exponential", "empirical"]
_NEEDS: dict[str, tuple[str, ...]] = {
    "fixed": ("value",),
    "uniform": ("min", "max"),
    "normal": ("mean", "std_dev"),
    "lognormal": ("mean", "std_dev"),
    "exponential": ("mean",),
    "empirical": ("file",),
}
_MAY: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "uniform": (),
    "normal": ("min", "max"),
    "lognormal": ("min", "max"),
    "exponential": ("min", "max"),
    "empirical": ("min", "max", "column"),
}
_STANDARD = NormalDist()


class AmountFileError(ValueError):
    """A file of amounts cannot be used; the message names what to do about it."""


class Quantile(Protocol):
    """The value below which a share of the draws lies, 0 < share < 1."""

    def __call__(self, draw: float) -> float: ...


@dataclass(frozen=True, slots=True)
class Amount:
    """Something to draw.

    Attributes:
        low, high: draws beyond are moved there, as inference-perf does.
    """

    quantile: Quantile
    low: float
    high: float

    def at(self, draw: float) -> float:
        """What a draw from (0, 1) gives."""
        return min(max(self.quantile(draw), self.low), self.high)

    def tokens(self, draw: float) -> int:
        """The same as a whole number within the bounds."""
        return round(self.at(draw))


class AmountSpec(Spec):
    """A number, or what it is drawn from. Draws below `min` or above `max` are moved there."""

    model_config = ConfigDict(
        json_schema_extra={EXPECTED: "a number, or a mapping with type, mean, std_dev, min, max"}
    )
    least: ClassVar[float] = 0.0

    type: Shape = Field(
        default="normal",
        description=(
            "fixed: value. uniform: min to max. normal, lognormal: mean and std_dev, of the amount itself. "
            "exponential: mean. empirical: drawn from the values of a file."
        ),
    )
    value: float | None = Field(default=None, ge=0, le=AMOUNT_MAX, description="The amount, if fixed.")
    min: float | None = Field(default=None, ge=0, le=AMOUNT_MAX, description="Smallest amount.")
    max: float | None = Field(default=None, ge=0, le=AMOUNT_MAX, description="Largest amount.")
    mean: float | None = Field(default=None, gt=0, le=AMOUNT_MAX, description="Mean before the bounds.")
    std_dev: float | None = Field(default=None, ge=0, le=AMOUNT_MAX, description="Standard deviation.")
    file: str | None = Field(
        default=None, min_length=1, max_length=4096, description="One number a line; beside this file."
    )
    column: str | None = Field(
        default=None, min_length=1, max_length=256, description="Which column, if the file is CSV."
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: object) -> object:
        if isinstance(data, int | float) and not isinstance(data, bool):
            return {"type": "fixed", "value": data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults: list[tuple[KeyPath, str]] = []
        keys = ("value", "min", "max", "mean", "std_dev", "file", "column")
        needed, allowed = _NEEDS[self.type], _NEEDS[self.type] + _MAY[self.type]
        for key in keys:
            value = getattr(self, key)
            if value is None and key in needed:
                faults.append(((key,), f"is missing, which type {self.type} needs"))
            elif value is not None and key not in allowed:
                faults.append(((key,), f"is not for type {self.type}; its keys are {', '.join(allowed)}"))
            elif key in {"value", "min", "max"} and value is not None:
                faults += [((key,), message) for message in self._bound_faults(value)]
        if not faults and self.min is not None and self.max is not None and self.min > self.max:
            faults.append((("max",), f"is {self.max:g}, expected at least min ({self.min:g})"))
        if faults:
            raise FaultsError(faults)
        return self

    def _bound_faults(self, value: float) -> list[str]:
        if value < self.least:
            return [f"is {value:g}, expected at least {self.least:g}"]
        if self.is_whole and value != int(value):
            return [f"is {value:g}, expected a whole number"]
        return []

    def compiled(self, folder: Path) -> Amount:
        """This as something to draw from; a file is looked for in `folder`.

        Raises:
            AmountFileError: if the file cannot be read or holds no usable value.
        """
        low = self.least if self.min is None else self.min
        high = float(AMOUNT_MAX) if self.max is None else self.max
        return Amount(self._quantile(folder), low, high)

    def _quantile(self, folder: Path) -> Quantile:
        low, high, mean, spread = (self.min or 0.0, self.max or 0.0, self.mean or 0.0, self.std_dev or 0.0)
        match self.type:
            case "fixed":
                return _Fixed(self.value or 0.0)
            case "uniform":
                return _Uniform(low, high, is_whole=self.is_whole)
            case "normal":
                return _Normal(mean, spread)
            case "lognormal":
                variance = log1p((spread / mean) ** 2)
                return _Lognormal(log(mean) - variance / 2, sqrt(variance))
            case "exponential":
                return _Exponential(mean)
            case "empirical":
                return _Empirical(_read_values(folder / (self.file or ""), self.column))

    @property
    def is_whole(self) -> bool:
        return False


class TokensSpec(AmountSpec):
    """A number of tokens or of turns, at least one."""

    least: ClassVar[float] = 1.0

    @property
    def is_whole(self) -> bool:
        return True


class TokensOrNoneSpec(TokensSpec):
    """A number of tokens that may be 0."""

    least: ClassVar[float] = 0.0


class SecondsSpec(AmountSpec):
    """A time in seconds."""


@dataclass(frozen=True, slots=True)
class _Fixed:
    value: float

    def __call__(self, draw: float) -> float:  # noqa: ARG002  # the same whatever is drawn
        return self.value


@dataclass(frozen=True, slots=True)
class _Uniform:
    low: float
    high: float
    is_whole: bool

    def __call__(self, draw: float) -> float:
        if self.is_whole:  # Both ends as often as what lies between them.
            return int(self.low + draw * (self.high - self.low + 1))
        return self.low + draw * (self.high - self.low)


@dataclass(frozen=True, slots=True)
class _Normal:
    mean: float
    spread: float

    def __call__(self, draw: float) -> float:
        return self.mean + self.spread * _STANDARD.inv_cdf(draw)


@dataclass(frozen=True, slots=True)
class _Lognormal:
    log_mean: float
    log_spread: float

    def __call__(self, draw: float) -> float:
        # Far beyond what is allowed, and well before the exponential overflows.
        return exp(min(self.log_mean + self.log_spread * _STANDARD.inv_cdf(draw), 50.0))


@dataclass(frozen=True, slots=True)
class _Exponential:
    mean: float

    def __call__(self, draw: float) -> float:
        return -self.mean * log1p(-draw)


@dataclass(frozen=True, slots=True)
class _Empirical:
    values: tuple[float, ...]

    def __call__(self, draw: float) -> float:
        return self.values[int(draw * len(self.values))]


def _read_values(path: Path, column: str | None) -> tuple[float, ...]:
    """The usable numbers of a file in ascending order; lines that hold none are left out."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            lines = iter(lambda: file.readline(LINE_CHARACTERS_MAX), "")
            texts = lines if column is None else _column(lines, column, path.name)
            values = sorted(value for text in texts if (value := _number(text)) is not None)
    except (OSError, ValueError) as error:
        if isinstance(error, AmountFileError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise AmountFileError(f"is {quote(path.name)}, which cannot be read: {reason}") from error
    if not values:
        raise AmountFileError(f"is {quote(path.name)}, which holds no number of 0 to {AMOUNT_MAX}")
    if len(values) > FILE_VALUES_MAX:
        message = f"is {quote(path.name)}, which holds more than {FILE_VALUES_MAX} numbers; shorten it"
        raise AmountFileError(message)
    return tuple(values)


def _column(lines: Iterable[str], column: str, name: str) -> Iterator[str]:
    rows = csv.reader(lines)
    header = next(rows, [])
    if column not in header:
        found = ", ".join(quote(key) for key in header[:20]) or "none"
        raise AmountFileError(f"is {quote(name)}, which has no column {quote(column)}; it has {found}")
    index = header.index(column)
    yield from (row[index] for row in rows if len(row) > index)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) and 0.0 <= value <= AMOUNT_MAX else None
