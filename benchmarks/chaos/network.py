"""The fleet on hosts of its own: cut, lossy, slow, late and reset lines; over TCP, then over NIXL."""

import asyncio
import importlib.util
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.chaos import hop
from benchmarks.chaos.fleet import DECODES, GATEWAYS, PREFILLS
from benchmarks.chaos.netns import Hosts, NoNetworkError
from benchmarks.chaos.processes import Network, run_on

FAULTS = 50
"""Over each backend."""
CLIENTS = 8
KV_BACKENDS = ("tcp", "nixl")


def run(seed: int, fault_count: int = FAULTS, client_count: int = CLIENTS, keep: Path | None = None) -> bool:
    """One run over each backend, printed; whether all was well.

    Skipped, with the reason, where there are no namespaces; over NIXL where it is not installed.
    """
    if not hop.is_there():
        print("  no late lines, and none that lose single ports: this kernel has no TAP devices")
    is_good = True
    for kv_backend in KV_BACKENDS:
        if kv_backend == "nixl" and importlib.util.find_spec("nixl") is None:
            print("  nothing over nixl: it is not installed")
            continue
        begun_s = time.monotonic()
        print(f"  over {kv_backend}:", flush=True)
        try:
            is_good &= _run_over(kv_backend, seed, fault_count, client_count, keep)
        except NoNetworkError as error:
            print(f"  skipped: {error}", flush=True)
            return True
        except asyncio.CancelledError:
            print("  ended by a signal", flush=True)
            return False
        print(f"  took {time.monotonic() - begun_s:.0f} s", flush=True)
    if not is_good:
        print(f"  replay: python -m benchmarks.chaos network --seed {seed} --faults {fault_count} --keep DIR")
    return is_good


def _run_over(kv_backend: str, seed: int, fault_count: int, client_count: int, keep: Path | None) -> bool:
    pods = [*PREFILLS, *DECODES, *GATEWAYS]
    with Hosts(pods) as hosts, tempfile.TemporaryDirectory(prefix="pdcoord-chaos-") as made:
        folder = Path(made) if keep is None else keep / kv_backend
        folder.mkdir(parents=True, exist_ok=True)
        network = Network(hosts, kv_backend)
        is_good = asyncio.run(_until_told(seed, fault_count, client_count, folder, network))
        left = hosts.pids()
    for pid in left:
        print(f"FAILED process {pid} still lives on one of the hosts")
    return is_good and not left


async def _until_told(seed: int, fault_count: int, client_count: int, folder: Path, network: Network) -> bool:
    """Run; SIGTERM and SIGHUP end it as SIGINT does, with everything removed."""
    task = asyncio.current_task()
    assert task is not None, "this runs in a task"
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run_on(seed, fault_count, client_count, folder, network)
