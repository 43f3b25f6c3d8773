"""CPU of an ext_proc call in `pdcoord extproc`, beside an empty grpc.aio server in the same run."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.relay import machine
from benchmarks.relay.contenders import Launch
from benchmarks.relay.processes import StartError, started
from pdcoord.sim.ports import free_ports

BAR = 0.5
"""Least rate of a core, as a share of the empty server's."""
MODEL = "demo/llama-8b"
EMPTY, PICKER = "empty grpc.aio server", "pdcoord extproc"
_BINARIES = Path(sys.executable).parent
_LOAD_S_MAX = 60.0
Round = dict[str, float]


@dataclass(frozen=True, slots=True)
class _Pool:
    name: str
    profile: str
    role: str
    vendor: str
    preset: str
    share: float
    prefill_ms: float


# As many vendors as the fleet that the project is for; a fifth and two fifths of the endpoints each.
_POOLS = (
    _Pool("gaudi", "intel-gaudi3-8b", "prefill", "intel-gaudi", "intel-gaudi", 0.4, 0.11),
    _Pool("h100", "nvidia-h100-8b", "prefill", "nvidia", "nvidia-flash-attn", 0.2, 0.2),
    _Pool("mi300x", "amd-mi300x-8b", "decode", "amd", "amd-aiter-unified", 0.4, 0.17),
)
_HEAD = f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: bench}}
model: {{name: {MODEL}}}
canary: {{mode: off}}
pools:
"""
_POOL = """\
  - name: {name}
    role: {role}
    vendor: {vendor}
    engine: vllm
    connector: pdcoord
    layout: {{preset: {preset}}}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    limits: {{in_flight_max: 4096, context_tokens_max: 131072}}
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: {prefill_ms}, step_base_ms: 12}}
    endpoints:
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.extproc", description=__doc__)
    parser.add_argument("--endpoints", type=int, default=20, help="of the fleet (default 20)")
    parser.add_argument("--prompt-bytes", type=int, default=30_000, help="default 30000")
    parser.add_argument("--concurrent", type=int, default=8, help="calls at once (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--window-s", type=float, default=4.0, help="measured per round and row (default 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    if (
        min(options.endpoints - 4, *(value for value in vars(options).values() if isinstance(value, int)))
        <= 0
    ):
        parser.error("every number must be positive, and the fleet of 5 endpoints at least")
    return options


def write_files(folder: Path, endpoint_count: int) -> None:
    """Fleet and policy, with a port of its own for each engine."""
    fleet = ["apiVersion: pdcoord.io/v1alpha1", "kind: EmulatedFleet", f"model: {MODEL}", "engines:"]
    policy = _HEAD
    counts = [round(pool.share * endpoint_count) for pool in _POOLS]
    counts[-1] = endpoint_count - sum(counts[:-1])
    for pool, count in zip(_POOLS, counts, strict=True):
        policy += _POOL.format(
            name=pool.name,
            role=pool.role,
            vendor=pool.vendor,
            preset=pool.preset,
            prefill_ms=pool.prefill_ms,
        )
        for index, port in enumerate(free_ports(count)):
            name = f"{pool.name}-{index}"
            fleet.append(f"  - {{name: {name}, profile: {pool.profile}, role: {pool.role}, port: {port}}}")
            policy += f'      - {{name: {name}, address: "127.0.0.1:{port}"}}\n'
    (folder / "fleet.yaml").write_text("\n".join(fleet) + "\n", encoding="utf-8")
    (folder / "policy.yaml").write_text(policy, encoding="utf-8")


def picker(folder: Path) -> tuple[Launch, int]:
    """How it is started, and the port where Envoy would ask."""
    grpc_port, health_port, metrics_port, admin_port = free_ports(4)
    command = ["/usr/bin/env", f"PDCOORD_ADMIN_PORT={admin_port}", "PDCOORD_HOST=127.0.0.1"]
    command += ["PDCOORD_DRAIN_NOTICE_S=0", str(_BINARIES / "pdcoord"), "extproc", "--no-secure-serving"]
    command += [f"--policy={folder / 'policy.yaml'}", f"--grpc-port={grpc_port}"]
    command += [f"--grpc-health-port={health_port}", f"--metrics-port={metrics_port}"]
    return Launch(command, metrics_port, "/readyz"), grpc_port


def measure(port: int, pid: int, options: argparse.Namespace) -> Round:
    """One window of load by a process of its own.

    Raises:
        RuntimeError: if the client failed.
    """
    command = [sys.executable, "-m", "benchmarks.extproc.load", f"--port={port}", f"--pid={pid}"]
    command += [f"--model={MODEL}", f"--prompt-bytes={options.prompt_bytes}"]
    command += [f"--concurrent={options.concurrent}", f"--window-s={options.window_s}"]
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, timeout=_LOAD_S_MAX + options.window_s
    )
    if done.returncode != 0:
        raise RuntimeError(f"the client of port {port} failed")
    result: Round = json.loads(done.stdout)
    return result


def run(options: argparse.Namespace, folder: Path) -> dict[str, list[Round]]:
    """Rounds by row; in each round one follows the other, the order changing from round to round."""
    write_files(folder, options.endpoints)
    launch, grpc_port = picker(folder)
    emulate = [str(_BINARIES / "pdcoord"), "emulate", str(folder / "fleet.yaml")]
    first_engine = int((folder / "policy.yaml").read_text().partition("127.0.0.1:")[2].partition('"')[0])
    empty = [sys.executable, "-m", "benchmarks.extproc.empty", f"--destination=127.0.0.1:{first_engine}"]
    found: dict[str, list[Round]] = {EMPTY: [], PICKER: []}
    with ExitStack() as stack:
        stack.enter_context(started(Launch(emulate, first_engine, "/health"), folder / "emulate.log"))
        empty_process, empty_port = stack.enter_context(started(Launch(empty), folder / "empty.log"))
        picker_process, _ = stack.enter_context(started(launch, folder / "extproc.log"))
        rows: list[tuple[str, Callable[[], Round]]] = [
            (EMPTY, lambda: measure(empty_port, empty_process.pid, options)),
            (PICKER, lambda: measure(grpc_port, picker_process.pid, options)),
        ]
        for index in range(options.rounds):
            for name, take in rows if index % 2 == 0 else reversed(rows):
                found[name].append(take())
            print(f"round {index + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, list[Round]]) -> str:
    lines = [f"{'':24}{'CPU us a call':>24}{'calls/s a core':>24}{'idle %':>12}{'calls/s':>12}"]
    for name, rounds in found.items():
        keys = ("cpu_us", "per_core", "idle_percent", "per_s")
        cells = [_spread([each[key] for each in rounds]) for key in keys]
        idle, rate = (cell.partition(" ")[0] for cell in cells[2:])
        lines.append(f"{name:24}{cells[0]:>24}{cells[1]:>24}{idle:>12}{rate:>12}")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def ratios(found: dict[str, list[Round]]) -> list[float]:
    """The picker's rate of a core over the empty server's, round by round."""
    pairs = zip(found[PICKER], found[EMPTY], strict=True)
    return [ours["per_core"] / empty["per_core"] for ours, empty in pairs]


def main() -> int:
    options = parse()
    facts = machine.facts()
    with tempfile.TemporaryDirectory(prefix="pdcoord-extproc-") as folder:
        try:
            found = run(options, Path(folder))
        except (StartError, RuntimeError) as error:
            print(f"ext_proc benchmark: {error}", file=sys.stderr)
            return 1
    facts |= {
        "endpoints": options.endpoints,
        "prompt_bytes": options.prompt_bytes,
        "concurrent": options.concurrent,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(table(found))
    shares = ratios(found)
    share = statistics.median(shares)
    verdict = "within the bar" if share >= BAR else "BELOW THE BAR"
    print(
        f"rate of a core: {share:.2f} ({min(shares):.2f}-{max(shares):.2f}) of the empty server's, ", end=""
    )
    print(f"{verdict} of {BAR}")
    if options.json is not None:
        record = {"facts": facts, "bar": BAR, "share": share, "shares": shares, "rounds": found}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
