"""GB/s of packing and unpacking on one core and on a GPU where there is one, beside a plain copy."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.relay import machine
from benchmarks.transfer.repack_cases import Case, Engine, cases

BLOCK_TOKENS = (128, 16)
HOST = "cpu"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer.repack", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a part (default 512)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model (default 32)")
    parser.add_argument("--device", action="append", help="cpu or cuda; repeatable (default: all there are)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    if min(options.rounds, options.tokens, options.layers) <= 0:
        parser.error("every number must be positive")
    if not options.device:
        options.device = [HOST, *(["cuda"] if torch.cuda.is_available() else [])]
    return options


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def shown(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Row:
    """One way of moving a case's part.

    Attributes:
        what: `pack` and `unpack` without digests; `pack+digest` and `unpack+digest` as the agent calls them.
        gb_per_s: bytes of the part by the time that it took.
        ratio: to the plain copy of as many bytes in the same round.
        is_within_bar: None where no bar is set.
    """

    device: str
    block_tokens: int
    name: str
    what: str
    gb_per_s: Spread
    ratio: Spread
    is_within_bar: bool | None


class Bench:
    """One case on one device, with a plain copy of as many bytes between the same places."""

    def __init__(self, case: Case, options: argparse.Namespace, device: str, staging: Any) -> None:
        self.case = case
        self._device = device
        self.engine = Engine(case, options.layers, options.tokens, device, staging)
        self._staged = staging[: self.engine.length_bytes]
        self._source = torch.ones(self.engine.length_bytes, dtype=torch.uint8, device=device)
        self._digest = self.engine.pack()

    def ways(self) -> dict[str, Callable[[], object]]:
        return {
            "copy": lambda: self._staged.copy_(self._source),
            "pack": self.engine.pack_only,
            "unpack": self.engine.unpack_only,
            "pack+digest": self.engine.pack,
            "unpack+digest": lambda: self.engine.unpack(self._digest),
        }

    def seconds(self, call: Callable[[], object]) -> float:
        """What a call takes; CPU time of this thread on a host, so that others on the machine count less."""
        if self._device == HOST:
            began_s = time.thread_time()
            call()
            return time.thread_time() - began_s
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began_s

    def round(self) -> dict[str, float]:
        ways = self.ways()
        return {name: self.seconds(call) for name, call in ways.items()}


def measure(options: argparse.Namespace, device: str, block_tokens: int) -> list[Row]:
    """All cases of a block size, their rounds interleaved."""
    chosen = cases(block_tokens)
    length = max(Engine.bytes_of(case, options.layers, options.tokens) for case in chosen)
    staging = torch.zeros(length, dtype=torch.uint8, device=device)
    benches = [Bench(case, options, device, staging) for case in chosen]
    for bench in benches:
        bench.round()
    rounds = [[bench.round() for bench in benches] for _ in range(options.rounds)]
    found: list[Row] = []
    for index, bench in enumerate(benches):
        times = [each[index] for each in rounds]
        for what in times[0]:
            if what == "copy":
                continue
            ratio = Spread.of([each["copy"] / each[what] for each in times])
            is_held = device == HOST and "+" not in what
            found.append(
                Row(
                    device,
                    bench.case.layout.block_tokens,
                    bench.case.name,
                    what,
                    Spread.of([bench.engine.length_bytes / each[what] / 1e9 for each in times]),
                    ratio,
                    ratio.median >= bench.case.ratio_min if is_held else None,
                )
            )
        copy = Spread.of([bench.engine.length_bytes / each["copy"] / 1e9 for each in times])
        found.append(
            Row(
                device,
                bench.case.layout.block_tokens,
                bench.case.name,
                "copy",
                copy,
                Spread(1.0, 1.0, 1.0),
                None,
            )
        )
    return found


def table(rows: list[Row]) -> str:
    bars = {case.name: case.ratio_min for case in cases(BLOCK_TOKENS[0])}
    lines = [("device", "block", "layout", "what", "GB/s", "x copy", "bar")]
    for row in rows:
        bar = ""
        if row.is_within_bar is not None:
            least = bars[row.name]
            bar = f"{least:g} {'pass' if row.is_within_bar else 'FAIL'}"
        lines.append(
            (
                row.device,
                str(row.block_tokens),
                row.name,
                row.what,
                row.gb_per_s.shown(),
                row.ratio.shown(),
                bar,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    facts: dict[str, Any] = {**machine.facts(), "torch": torch.__version__}
    if "cuda" in options.device:
        facts["gpu"] = torch.cuda.get_device_name()
    facts |= {"tokens": options.tokens, "layers": options.layers, "rounds": options.rounds}
    rows = [
        row for device in options.device for size in BLOCK_TOKENS for row in measure(options, device, size)
    ]
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print("Medians of rounds with the lowest and highest; bytes count once, though each is read and written.")
    print(table(rows))
    if options.json is not None:
        record = {"machine": facts, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.is_within_bar is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
