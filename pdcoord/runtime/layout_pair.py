"""`pdcoord paths --layouts A B`: whether KV can move from one layout to another, and at what cost."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from pdcoord.policy.errors import PolicyError, format_key_path
from pdcoord.policy.poolschema import LayoutSpec
from pdcoord.policy.yamltext import Document, validate
from transfer.layout import KvLayout
from transfer.presets import PRESETS, Preset
from transfer.verdict import Connector, Cost, Side, Verdict, verdict

POSSIBLE = 0
IMPOSSIBLE = 1
BAD_INPUT = 2

_NUMBER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_EXAMPLE = "nvidia-flash-attn, intel-gaudi:dtype=float16 or block_tokens=128,order=HND"


class LayoutTextError(ValueError):
    """A text on the command line describes no layout; the message says what to write instead."""


@dataclass(frozen=True, slots=True)
class Described:
    """A layout as a person named it.

    Attributes:
        preset: what it starts from; None where every key was given.
        overrides: keys that were given, as text.
    """

    layout: KvLayout
    preset: Preset | None
    overrides: str


def parse_layout(text: str) -> Described:
    """Read `PRESET`, `PRESET:key=value,...` or `key=value,...`, with the keys of a policy's `layout`.

    Raises:
        LayoutTextError: naming each key at fault.
    """
    name, colon, rest = text.partition(":")
    if not colon and "=" in text:
        name, rest = "", text
    data: dict[str, Any] = {"preset": name} if name or not rest else {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key:
            raise LayoutTextError(f'"{item}" is not key=value; a layout is such as {_EXAMPLE}')
        if key in data:
            raise LayoutTextError(f"{key} is given twice; keep one")
        data[key] = int(value) if _NUMBER.fullmatch(value) else value
    try:
        spec = validate(Document("", data, {(): 1}), LayoutSpec)
    except PolicyError as error:
        faults = [f"{format_key_path(problem.key_path)} {problem.message}" for problem in error.problems]
        raise LayoutTextError(f"{'; '.join(faults)}; a layout is such as {_EXAMPLE}") from None
    return Described(spec.compiled(), PRESETS.get(spec.preset or ""), rest)


def compare(producer: str, consumer: str, *, as_json: bool, out: TextIO | None = None) -> int:
    """Print the verdict on two layouts; the exit status: 0 possible, 1 impossible, 2 no such layouts."""
    stream = sys.stdout if out is None else out
    described: list[Described] = []
    for text in (producer, consumer):
        try:
            described.append(parse_layout(text))
        except LayoutTextError as error:
            sys.stderr.write(f'pdcoord paths: layout "{text}": {error}\n')
    if len(described) < 2:
        return BAD_INPUT
    first, second = described
    found = _judge(Connector.PDCOORD, first, second)
    stock = _judge(Connector.NIXL, first, second)
    if as_json:
        page = {
            **_verdict_as_json(found),
            "stock": _verdict_as_json(stock),
            "producer": _as_json(first),
            "consumer": _as_json(second),
        }
        stream.write(json.dumps(page, indent=2) + "\n")
    else:
        stream.writelines(f"{line}\n" for line in _lines(found, stock, first, second))
    return POSSIBLE if found.is_possible else IMPOSSIBLE


def _judge(connector: Connector, producer: Described, consumer: Described) -> Verdict:
    return verdict(Side(connector, producer.layout), Side(connector, consumer.layout))


def _lines(found: Verdict, stock: Verdict, producer: Described, consumer: Described) -> Iterator[str]:
    yield f"verdict   {found.kind}"
    yield f"reason    {found.reason}"
    yield f"cost      {'-' if found.cost is None else _cost_in_words(found.cost)}"
    yield f"stock     {stock.kind} with connector nixl: {stock.reason}"
    for title, side in (("producer", producer), ("consumer", consumer)):
        preset = side.preset
        yield ""
        yield f"{title}  {_name(side)}"
        yield f"  layout    {' '.join(f'{key}={value}' for key, value in asdict(side.layout).items())}"
        yield f"  source    {'as given' if preset is None else preset.source}"
        if preset is not None:
            yield f"  evidence  {_evidence(side)}"
            yield f"  note      {preset.note}"


def _cost_in_words(cost: Cost) -> str:
    return (
        f"{cost.pack_passes} passes over the KV to pack and {cost.unpack_passes} to unpack, "
        f"{cost.wire_factor:g} times the consumer's bytes on the wire, "
        f"about {cost.core_s_per_gb:g} s of one CPU core a GB"
    )


def _name(side: Described) -> str:
    if side.preset is None:
        return "given by its keys"
    return side.preset.name + (f" with {side.overrides}" if side.overrides else "")


def _evidence(side: Described) -> str:
    assert side.preset is not None
    return side.preset.evidence + (", for the preset without what was overridden" if side.overrides else "")


def _verdict_as_json(found: Verdict) -> dict[str, Any]:
    cost = None if found.cost is None else asdict(found.cost)
    return {"verdict": found.kind, "reason": found.reason, "cost": cost}


def _as_json(side: Described) -> dict[str, Any]:
    preset = side.preset
    named = None if preset is None else {"name": preset.name, "overrides": side.overrides}
    told = (
        {} if preset is None else {"source": preset.source, "evidence": preset.evidence, "note": preset.note}
    )
    return {"preset": named, "layout": asdict(side.layout), **told}
