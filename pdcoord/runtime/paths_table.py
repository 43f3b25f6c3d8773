"""`pdcoord paths`: every path that the gateway knows, with its verdict, its breaker and what probes found."""

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import msgspec

from pdcoord.core.gates import UNTRIED
from pdcoord.policy.summary import table
from pdcoord.runtime.adminclient import AdminListener
from pdcoord.wire.errors import WireError

PRINTED = 0
UNREACHABLE = 2
PATHS_MAX = 1_000

Row = dict[str, Any]

_LAYOUTS = frozenset({"canary.prefill_layout", "canary.decode_layout"})

# Keys of a path, those of what is inside it behind a dot, with what stands above their column.
_COLUMNS = {
    "prefill": "prefill",
    "decode": "decode",
    "verdict": "verdict",
    "breaker": "breaker",
    "bandwidth_gbit_per_s": "Gbit/s",
    "bytes_in_flight": "bytes in flight",
    "probe.verdict": "probed",
    "probe.transport": "transport",
    "probe.is_degraded": "degraded",
    "probe.latency_ms": "latency ms",
    "probe.bandwidth_gbit_per_s": "measured Gbit/s",
    "probe.age_ms": "age ms",
    "probe.failure": "failure",
    "canary.state": "canary",
    "fault": "shut by",
    "canary.detail": "canary's detail",
    "canary.prefill_layout": "prefill layout",
    "canary.decode_layout": "decode layout",
    "verdict_reason": "reason",
    "probe.verdict_reason": "probe's reason",
    "probe.detail": "detail",
}


def show_paths(
    admin_url: str,
    *,
    as_json: bool,
    admin_key_file: Path | None = None,
    admin_ca_file: Path | None = None,
    out: TextIO | None = None,
) -> int:
    """Print the paths; the exit status: 0 printed, 2 the admin listener does not answer.

    Args:
        admin_url: of the gateway's admin listener, such as http://127.0.0.1:8081.
        admin_key_file: with the key that it asks for.
        admin_ca_file: of who signed its certificate, with https.
    """
    stream = sys.stdout if out is None else out
    try:
        page = asyncio.run(_fetch(AdminListener(admin_url, admin_key_file, admin_ca_file)))
        lines = list(describe_paths(page))
    except (ValueError, WireError, TimeoutError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"pdcoord paths: {admin_url} does not answer as an admin listener: {error}\n")
        return UNREACHABLE
    if as_json:
        stream.write(json.dumps(page, indent=2) + "\n")
    else:
        stream.writelines(f"{line}\n" for line in lines)
    return PRINTED


async def _fetch(listener: AdminListener) -> Row:
    async with listener.client() as client:
        raw = await listener.get(client, f"/paths?limit={PATHS_MAX}")
    if raw is None:
        raise ValueError("there is no GET /paths")
    return msgspec.json.decode(raw, type=Row)


def describe_paths(page: Row) -> Iterator[str]:
    """Lines that show what GET /paths answered: one row a path, one column a fact that any path has.

    Raises:
        ValueError: if it is no such answer.
    """
    paths = page.get("paths")
    if not isinstance(paths, list) or not all(isinstance(path, dict) for path in paths):
        raise ValueError("GET /paths answered without a list of paths")
    rows = [_shown(dict(_flat(path))) for path in paths]
    if not rows:
        yield "no paths: the policy in force has no prefill endpoint beside a decode endpoint"
        return
    keys = [key for key in _COLUMNS if any(row.get(key) for row in rows)]
    yield from table([_COLUMNS[key] for key in keys], [[_cell(row.get(key)) for key in keys] for row in rows])
    total = page.get("total", len(rows))
    if total != len(rows):
        yield ""
        yield f"{len(rows)} of {total} paths; GET /paths?limit=N of the admin listener gives more"


def _flat(facts: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Facts of a path by key, those of an inner mapping as `outer.inner`."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _shown(row: Row) -> Row:
    """A row without the layouts, which are long, unless a canary that failed is what they explain."""
    if row.get("canary.fault") in {None, "", UNTRIED}:
        return {key: value for key, value in row.items() if key not in _LAYOUTS}
    return row


def _cell(value: Any) -> str:
    """A value as people read it; what is unknown, none or nothing is a dash."""
    if not value:
        return "-"
    if value is True:
        return "yes"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
