"""What a fleet must not have once its requests have ended: read from pages, /proc and the folder."""

import asyncio
import json
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks.chaos.programs import Part, Programs, Use, use_of

SETTLED_S_MAX = 60.0
_FILES_MORE_MAX = 10
"""Connections that wait to be used again: two gateways ask each part for its metrics and its health, and
transfer agents keep one to each peer."""
_ROUNDS = 5
_PAUSE_S = 0.5
_THREADS_MORE_MAX = 2
_GAUGES = {
    "gateway": (
        "pdcoord_gateway_in_flight",
        "pdcoord_gateway_ledger_open",
        "pdcoord_gateway_remote_requests",
    ),
    "sidecar": ("pdcoord_sidecar_in_flight", "pdcoord_sidecar_resume_bytes"),
}


def gauge(page: bytes, name: str) -> float | None:
    """The sum of a metric's series; None if the page has none."""
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page.decode(), re.MULTILINE)
    return sum(map(float, found)) if found else None


async def counts_of(programs: Programs, part: Part) -> dict[str, float]:
    """What a part says that it has under way; every figure is 0 where nothing is left."""
    if part.kind in _GAUGES:
        status, page = await programs.get(part.admin, "/metrics")
        if status != 200:
            return {f"/metrics answers {status}": 1}
        values = {name: gauge(page, name) for name in _GAUGES[part.kind]}
        return {name: 1.0 if value is None else value for name, value in values.items()}
    status, raw = await programs.get(part.admin, "/emulator/state")
    if status != 200:
        return {f"/emulator/state answers {status}": 1}
    state = json.loads(raw)
    blocks, kv = state["blocks"], state["kv"] or {"staging_used_bytes": 0, "wrong": 0}
    return {
        "staged bytes of KV": kv["staging_used_bytes"],
        "arrivals of wrong KV": kv["wrong"],
        "requests": sum(state["requests"].values()),
        "leases": len(state["leases"]),
        "fetches": len(state["fetches"]),
        "rooms": state["rooms"],
        "pinned blocks": blocks["pinned"],
        "blocks taken": blocks["total"] - blocks["available"],
    }


async def kv_of(programs: Programs) -> list[dict[str, Any]]:
    """What each engine that answers tells of the real KV that it handed over or loaded."""
    found = []
    for part in programs.parts.values():
        if part.kind in {"prefill", "decode"}:
            status, raw = await programs.get(part.admin, "/emulator/state")
            if status == 200 and (kv := json.loads(raw)["kv"]) is not None:
                found.append(kv)
    return found


async def left_behind(programs: Programs, before: dict[str, Use]) -> list[str]:
    """What is still there after a while, a line for each; empty if all has settled.

    A scrape is a request too, and may be under way at any moment: what counts is there again and again.
    """
    deadline_s = time.monotonic() + SETTLED_S_MAX
    rounds: deque[dict[str, str]] = deque(maxlen=_ROUNDS)
    while True:
        rounds.append(await _now(programs, before))
        lasting = [line for what, line in rounds[-1].items() if all(what in each for each in rounds)]
        if not rounds[-1] or (len(rounds) == _ROUNDS and not lasting):
            return []
        if time.monotonic() > deadline_s:
            return lasting
        await asyncio.sleep(_PAUSE_S)


async def _now(programs: Programs, before: dict[str, Use]) -> dict[str, str]:
    """A line for each thing that is there, by what it is."""
    found: dict[str, str] = {}
    for name, part in programs.parts.items():
        if not programs.is_running(name):
            found[name] = f"{name} does not run"
            continue
        counts = await counts_of(programs, part)
        found |= {f"{name} {what}": f"{name} has {what} {n:g}" for what, n in counts.items() if n}
        use, then = use_of(programs.pid(name)), before[name]
        if use.files > then.files + _FILES_MORE_MAX:
            found[f"{name} files"] = f"{name} has {use.files} files and sockets, {then.files} at the start"
        if use.threads > then.threads + _THREADS_MORE_MAX:
            found[f"{name} threads"] = f"{name} has {use.threads} threads, {then.threads} at the start"
    return found


def strays(folder: Path) -> list[str]:
    """Files that nobody was told to write."""
    return [
        f"{each.name} lies in the folder of the run"
        for each in sorted(folder.rglob("*"))
        if each.suffix not in {".log", ".yaml", ".png"}
    ]
