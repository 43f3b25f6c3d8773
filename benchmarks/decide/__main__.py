"""The CPU time of one decision, by part, at 20 and at 1,000 endpoints, idle and busy, on a 30 KB prompt."""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from benchmarks.decide import parts
from benchmarks.decide.fleet import BenchFleet
from benchmarks.decide.parts import Times

ROWS = (*parts.READ, *parts.DECIDE, parts.REST, parts.WHOLE, parts.ROUND_ROBIN, parts.BRUTE_FORCE)
TARGETS_MS = {20: 0.3, 1_000: 1.5}
"""The most that `handle in all` may take in the middle, by endpoints."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decide", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument(
        "--requests", type=int, default=200, help="decisions per fleet and round (default 200)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    if min(options.rounds, options.requests) <= 0:
        parser.error("every number must be positive")
    return options


def measure(rounds: int, request_count: int) -> dict[str, list[Times]]:
    """Times by fleet, one for each round; the rounds of all fleets are interleaved."""
    found: dict[str, list[Times]] = {}
    for round_index in range(rounds):
        for endpoint_count in TARGETS_MS:
            for is_busy in (False, True):
                fleet = BenchFleet(endpoint_count, is_busy=is_busy, seed=round_index)
                parts.run(fleet, max(10, request_count // 10), "warm-up")
                name = f"{endpoint_count} {'busy' if is_busy else 'idle'}"
                found.setdefault(name, []).append(parts.run(fleet, request_count, "request"))
    return found


def quietest(rounds: list[Times]) -> Times:
    """The round that the rest of the machine disturbed least."""
    return min(rounds, key=lambda times: statistics.median(times[parts.WHOLE]))


def p99(times: list[float]) -> float:
    return sorted(times)[min(len(times) - 1, len(times) * 99 // 100)]


def table(found: dict[str, Times]) -> str:
    lines = [("part (us on the CPU)", *(f"{name}: median / p99" for name in found))]
    for part in ROWS:
        cells = [found[name].get(part) for name in found]
        shown = [f"{statistics.median(own):.1f} / {p99(own):.1f}" if own else "-" for own in cells]
        lines.append((part, *shown))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
    )


def targets(found: dict[str, Times]) -> str:
    lines = []
    for name, times in found.items():
        median_ms = statistics.median(times[parts.WHOLE]) / 1e3
        target_ms = TARGETS_MS[int(name.split()[0])]
        verdict = "within" if median_ms <= target_ms else "past"
        lines.append(f"{name}: {median_ms:.3f} ms, {verdict} the target of {target_ms:g} ms")
    return "\n".join(lines)


def record(found: dict[str, list[Times]]) -> dict[str, Any]:
    machine = {
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }
    figures = {
        name: [
            {part: {"median_us": statistics.median(own), "p99_us": p99(own)} for part, own in times.items()}
            for times in rounds
        ]
        for name, rounds in found.items()
    }
    return {"machine": machine, "prompt_bytes": parts.PROMPT_BYTES, "rounds": figures}


def main() -> None:
    options = parse()
    found = measure(options.rounds, options.requests)
    shown = {name: quietest(rounds) for name, rounds in found.items()}
    print(f"The quietest of {options.rounds} rounds of {options.requests} decisions each.")
    print(table(shown))
    print()
    print(targets(shown))
    if options.json is not None:
        options.json.write_text(json.dumps(record(found), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
