"""CPU per SSE event of gateway and sidecar, beside a splice of sockets and, on request, other routers."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.relay import machine, peers, report
from benchmarks.relay.contenders import OURS, PEER_ENVIRONMENT, PEERS, SPLICE, Contender, Site
from benchmarks.relay.processes import StartError, python_module, started

_LOAD_S_MAX = 60.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay", description=__doc__)
    parser.add_argument("--streams", type=int, default=100, help="streams at once (default 100)")
    parser.add_argument(
        "--interval-ms", type=float, default=30.0, help="between a stream's events (default 30)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--window-s", type=float, default=3.0, help="measured per round and row (default 3)")
    parser.add_argument("--peers", action="store_true", help=f"other routers too, from {PEER_ENVIRONMENT}")
    parser.add_argument("--only", action="append", metavar="ROW", help="only this row; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    if min(options.streams, options.interval_ms, options.rounds, options.window_s) <= 0:
        parser.error("every number must be positive")
    return options


def chosen(options: argparse.Namespace) -> list[Contender]:
    """The rows that were asked for.

    Raises:
        SystemExit: naming what is not there.
    """
    rows = [*OURS, *(PEERS if options.peers else ())]
    if options.only:
        unknown = set(options.only) - {row.name for row in rows}
        if unknown:
            names = ", ".join(row.name for row in rows)
            raise SystemExit(f"--only {min(unknown)!r} is not a row; there are: {names}")
        rows = [row for row in rows if row.name in options.only]
    missing = {str(path) for row in rows for path in row.needs if not path.exists()}
    if missing:
        raise SystemExit(
            f"not installed: {', '.join(sorted(missing))}; run make venv or choose rows with --only"
        )
    return rows


def measure(targets: list[dict[str, object]], options: argparse.Namespace) -> report.Round:
    """One window over these relays at once, by a client process of its own.

    Raises:
        RuntimeError: if a stream was lost, so that what was measured is not what was asked.
    """
    command = [sys.executable, "-m", "benchmarks.relay.load", "--targets", json.dumps(targets)]
    command += ["--streams", str(options.streams), "--window-s", str(options.window_s)]
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, timeout=_LOAD_S_MAX + options.window_s
    )
    if done.returncode != 0:
        raise RuntimeError(f"{targets[0]['name']}: the client failed")
    result: report.Round = json.loads(done.stdout)
    for name, figures in result.items():
        if figures["streams_lost"]:
            raise RuntimeError(f"{name}: {figures['streams_lost']:g} streams were lost")
    return result


def run(options: argparse.Namespace, contenders: list[Contender], folder: Path) -> list[report.Pair]:
    """Start everything, then measure each contender once per round, the splice beside it.

    Both carry their streams at the same time, since whatever else the machine does changes what an event
    costs: cold caches and many wake-ups on an idle machine, events in batches on a busy one.
    """
    pairs: list[report.Pair] = []
    with ExitStack() as stack:
        engine = python_module("upstream", "--interval-ms", str(options.interval_ms))
        _, engine_port = stack.enter_context(started(engine, folder / "engine.log"))
        _, prefill_port = stack.enter_context(started(engine, folder / "prefill.log"))
        site = Site(engine_port, prefill_port, folder)
        running = {}
        for contender in (SPLICE, *contenders):
            if contender.process not in running:
                log_file = folder / f"{contender.process}.log"
                running[contender.process] = stack.enter_context(started(contender.launch(site), log_file))

        def target(contender: Contender) -> dict[str, object]:
            process, port = running[contender.process]
            return {
                "name": contender.name,
                "port": port,
                "pid": process.pid,
                "headers": contender.header_of(site),
                "expected": contender.expected,
            }

        for index in range(options.rounds):
            for contender in contenders:
                both = measure([target(contender), target(SPLICE)], options)
                pairs.append(report.Pair(contender.name, both[contender.name], both[SPLICE.name]))
            print(f"round {index + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return pairs


def main() -> int:
    options = parse()
    began_s = time.monotonic()
    if options.peers:
        peers.ensure_installed()
    contenders = chosen(options)
    facts = machine.facts()
    with tempfile.TemporaryDirectory(prefix="pdcoord-relay-") as folder:
        try:
            pairs = run(options, contenders, Path(folder))
        except (StartError, RuntimeError) as error:
            print(f"relay benchmark: {error}", file=sys.stderr)
            return 1
    found = report.rows(pairs, {each.name for each in contenders if each.is_held_to_bar})
    facts |= {
        "streams": options.streams,
        "interval_ms": options.interval_ms,
        "window_s": options.window_s,
        "elapsed_s": round(time.monotonic() - began_s, 1),
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(report.table(found))
    if options.json is not None:
        options.json.write_text(
            json.dumps(report.record(found, pairs, facts), indent=1) + "\n", encoding="utf-8"
        )
    return 1 if any(row.is_within_bar is False for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
