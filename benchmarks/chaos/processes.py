"""The fleet as real processes under load and under faults, all from one seed."""

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.chaos.clients import Clients, Verdicts
from benchmarks.chaos.fleet import GATEWAYS, lay_out
from benchmarks.chaos.leftovers import kv_of, left_behind, strays
from benchmarks.chaos.netns import Hosts
from benchmarks.chaos.programs import ChaosError, Programs, Use, use_of
from benchmarks.chaos.trouble import Trouble
from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client
from transfer.errors import FailureKind

FAULTS = 180
"""As many as half an hour has at one each ten seconds."""
CLIENTS = 10
_GAP_S = 1.0
_CALM_S = 3.0
_PROGRESS_S = 15.0
_NO_LINE_DOES_THIS = (
    FailureKind.NOT_AUTHENTICATED,
    FailureKind.VERSION_MISMATCH,
    FailureKind.IMPOSSIBLE_LAYOUT,
    FailureKind.WRONG_NONCE,
    FailureKind.WRONG_PROMPT,
    FailureKind.PACK_FAILED,
    FailureKind.UNPACK_FAILED,
    FailureKind.MALFORMED,
    FailureKind.NOT_A_CONSUMER,
)
"""Ends of transfers that are a fault of ours wherever they are seen."""


class Network(NamedTuple):
    """Hosts for the pods, and what their engines hand real KV over with."""

    hosts: Hosts
    kv_backend: str


@dataclass
class Site:
    """A fleet that runs, its clients and its trouble.

    Attributes:
        before: what each process had open before the first call.
    """

    folder: Path
    programs: Programs
    trouble: Trouble
    clients: Clients
    before: dict[str, Use]

    async def settle(self) -> list[str]:
        """Let every call end; what is left behind, and what went wrong on the way."""
        self.clients.is_over = True
        await self.clients.idle.wait()
        found = await left_behind(self.programs, self.before)
        return [*self.trouble.failures, *self.clients.verdicts.wrong, *found, *strays(self.folder)]


async def start(stack: AsyncExitStack, folder: Path, seed: int, network: Network | None = None) -> Site:
    """Start the fleet and wait until both gateways serve."""
    client = await stack.enter_async_context(Client())
    hosts, parts = None, lay_out(folder)
    if network is not None:
        hosts, kv_backend = network
        parts = lay_out(folder, hosts.addresses, hosts.prefixes, kv_backend=kv_backend)
    programs = await stack.enter_async_context(Programs(folder, parts, client))
    for kinds in ({"prefill", "decode"}, {"sidecar"}, {"gateway"}):
        names = [part.name for part in programs.parts.values() if part.kind in kinds]
        for name in names:
            await programs.start(name)
        for name in names:
            await programs.until_ready(name)
    trouble = Trouble(programs, random.Random(seed), hosts)
    gateways = [programs.parts[name] for name in GATEWAYS]
    for gateway in gateways:
        while (await programs.get(gateway.address, "/readyz"))[0] != 200:  # noqa: ASYNC110  # of a process
            await asyncio.sleep(0.1)

    def pick(rng: random.Random) -> HostPort | None:
        """As a Service would: a gateway that was ready when it was last asked."""
        well = [part.address for part in gateways if not trouble.is_struck(part.name)]
        return rng.choice(well) if well else None

    clients = Clients(client, pick, trouble.is_lost)
    await asyncio.sleep(_CALM_S)
    before = {name: use_of(programs.pid(name)) for name in programs.parts}
    return Site(folder, programs, trouble, clients, before)


async def run_faults(site: Site, count: int, seed: int) -> None:
    """Strike as often as told, with calls under way all the time."""
    rng = random.Random(seed + 1)
    told_s = begun_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        struck = 0
        while struck < count:
            fault = site.trouble.draw()
            if fault is not None:
                struck += 1
                group.create_task(site.trouble.strike(fault))
            await asyncio.sleep(rng.uniform(0.6, 1.4) * _GAP_S)
            if time.monotonic() - told_s > _PROGRESS_S:
                told_s = time.monotonic()
                verdicts = site.clients.verdicts
                print(
                    f"  {struck}/{count} faults, {told_s - begun_s:.0f} s, {verdicts.asked} calls, "
                    f"{len(verdicts.wrong)} wrong",
                    flush=True,
                )


def resumed_ids(programs: Programs) -> dict[str, float]:
    """Every stream that was continued, by its id, with the silence that the gateway saw, in s."""
    found: dict[str, float] = {}
    for name in GATEWAYS:
        for line in programs.log(name).read_text(errors="replace").splitlines():
            if '"resumes":' in line and '"request.done"' in line:
                told = json.loads(line)
                if told["resumes"] and told["resume_gap_ms"] is not None:
                    found[told["id"]] = told["resume_gap_ms"] / 1e3
    return found


def report(verdicts: Verdicts, trouble: Trouble, resumed: dict[str, float]) -> Iterator[str]:
    """What a person wants to know of a run."""
    yield f"{verdicts.asked} calls, {sum(trouble.counts.values())} faults"
    yield "  faults    " + ", ".join(f"{kind} {n}" for kind, n in trouble.counts.most_common())
    if trouble.connections_reset:
        yield f"  connections reset  {trouble.connections_reset}"
    yield "  calls     " + ", ".join(f"{kind} {n}" for kind, n in verdicts.kinds.most_common())
    yield "  outcomes  " + ", ".join(f"{kind} {n}" for kind, n in verdicts.outcomes.most_common())
    at_client = [verdicts.gaps_s[each] for each in resumed if each in verdicts.gaps_s]
    yield f"  streams resumed {len(resumed)}, of which {len(at_client)} came whole to clients that stayed"
    if at_client:
        added = sorted(longest - median for longest, median in at_client)
        p50, p99 = (added[min(int(len(added) * share), len(added) - 1)] * 1e3 for share in (0.5, 0.99))
        yield f"  added latency of a resumed token at the client: p50 {p50:.0f} ms, p99 {p99:.0f} ms"


async def kv_report(programs: Programs, kv_backend: str) -> tuple[str, list[str]]:
    """A line on the real KV that engines loaded since each was started, and what is wrong with it."""
    told = await kv_of(programs)
    failures = sum((Counter(each["load_failures"]) for each in told), Counter())
    loads, failed = sum(each["loads"] for each in told), failures.total()
    line = f"  KV over {kv_backend}  {loads - failed} loaded, {failed} failed"
    if failures:
        line += ": " + ", ".join(f"{kind} {n}" for kind, n in failures.most_common())
    wrong = [f"KV went over {each['transport']}" for each in told if each["transport"] != kv_backend]
    ends = failures + sum((Counter(each["offer_failures"]) for each in told), Counter())
    wrong += [f"{ends[kind]} transfers ended with {kind}" for kind in _NO_LINE_DOES_THIS if ends[kind]]
    return line, wrong if loads > failed else [*wrong, f"no KV was loaded over {kv_backend}"]


async def run_on(
    seed: int, fault_count: int, client_count: int, folder: Path, network: Network | None = None
) -> bool:
    """One run on a fleet of its own, printed; whether all was well."""
    async with AsyncExitStack() as stack:
        try:
            site = await start(stack, folder, seed, network)
        except ChaosError as error:
            print(f"FAILED {error}")
            return False
        async with asyncio.TaskGroup() as group:
            for index in range(client_count):
                group.create_task(site.clients.run(seed * 1_000 + index))
            keeping = group.create_task(site.trouble.keep_running())
            await run_faults(site, fault_count, seed)
            found = await site.settle()
            keeping.cancel()
        for line in report(site.clients.verdicts, site.trouble, resumed_ids(site.programs)):
            print(line)
        if network is not None:
            line, wrong = await kv_report(site.programs, network.kv_backend)
            print(line)
            found += wrong
    for each in found[:40]:
        print(f"FAILED {each}")
    return not found


def run(seed: int, fault_count: int = FAULTS, client_count: int = CLIENTS, keep: Path | None = None) -> bool:
    """One run, printed; whether every request ended once and right, and nothing was left."""
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pdcoord-chaos-") as made:
        folder = Path(made) if keep is None else keep
        folder.mkdir(parents=True, exist_ok=True)
        is_good = asyncio.run(run_on(seed, fault_count, client_count, folder))
    print(f"  took {time.monotonic() - begun_s:.0f} s", flush=True)
    if not is_good:
        print(
            f"  replay: python -m benchmarks.chaos processes --seed {seed} --faults {fault_count} --keep DIR"
        )
    return is_good
