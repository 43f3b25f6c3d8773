"""The fleet on hosts of its own: cut, lossy, slow, late and reset lines, the KV side channel's too."""

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.chaos.fleet import DECODES, GATEWAYS, PREFILLS
from benchmarks.chaos.netns import Hosts, NoNetworkError
from benchmarks.chaos.processes import run_on

FAULTS = 60
CLIENTS = 8


def run(seed: int, fault_count: int = FAULTS, client_count: int = CLIENTS, keep: Path | None = None) -> bool:
    """One run, printed; whether all was well. Skipped, with the reason, where there are no namespaces."""
    begun_s = time.monotonic()
    try:
        with Hosts([*PREFILLS, *DECODES, *GATEWAYS]) as hosts, tempfile.TemporaryDirectory() as made:
            if not hosts.has_netem:
                print("  no late lines: this kernel has no sch_netem")
            folder = Path(made) if keep is None else keep
            folder.mkdir(parents=True, exist_ok=True)
            is_good = asyncio.run(run_on(seed, fault_count, client_count, folder, hosts))
    except NoNetworkError as error:
        print(f"  skipped: {error}", flush=True)
        return True
    print(f"  took {time.monotonic() - begun_s:.0f} s", flush=True)
    if not is_good:
        print(f"  replay: python -m benchmarks.chaos network --seed {seed} --faults {fault_count} --keep DIR")
    return is_good
