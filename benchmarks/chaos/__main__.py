"""Chaos at every level, each from a seed: `python -m benchmarks.chaos [LEVEL] [--seed N]`; see docs/chaos.md.

Levels: simulation (virtual time), processes (killed, stopped, terminated, and failing as engines fail),
network (hosts of their own), fuzz (parsers); all of them one after another if none is named. The exit status
is 1 if a rule was broken; each failure is printed with the command that runs it again.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos import network, processes, simulation

LEVELS = ("simulation", "processes", "network", "fuzz")
_FUZZ_EXAMPLES = 2_000


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("level", nargs="?", choices=LEVELS, help="only this one")
    parser.add_argument(
        "--seed", type=int, default=0, help="first seed of the simulation, seed of the others"
    )
    parser.add_argument("--count", type=int, default=simulation.SEEDS, help="simulation: seeds")
    parser.add_argument("--faults", type=int, help="processes, network: how many")
    parser.add_argument("--keep", type=Path, help="processes, network: folder for the files of the run")
    parser.add_argument("--examples", type=int, default=_FUZZ_EXAMPLES, help="fuzz: of each parser")
    return parser.parse_args()


def fuzz(examples: int) -> bool:
    """Longer runs of tests/fuzz; a failing input is printed by hypothesis, and belongs into its corpus."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-n", "2", "tests/fuzz"]
    environment = {**os.environ, "PDCOORD_FUZZ_EXAMPLES": str(examples)}
    return subprocess.run(command, check=False, env=environment).returncode == 0


def main() -> int:
    """Run what was asked for; the exit status."""
    given = parsed()
    runs: dict[str, Callable[[], bool]] = {
        "simulation": lambda: simulation.run(given.seed, given.count),
        "processes": lambda: processes.run(given.seed, given.faults or processes.FAULTS, keep=given.keep),
        "network": lambda: network.run(given.seed, given.faults or network.FAULTS, keep=given.keep),
        "fuzz": lambda: fuzz(given.examples),
    }
    begun_s = time.monotonic()
    failed = []
    for level in [given.level] if given.level else LEVELS:
        print(f"{level}:", flush=True)
        if not runs[level]():
            failed.append(level)
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all held"
    print(f"{verdict} ({time.monotonic() - begun_s:.0f} s)")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
