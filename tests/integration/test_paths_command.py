"""`pdcoord paths` asks a running gateway and prints what it knows of each path."""

import asyncio
import io
import json
import os
import sys
from pathlib import Path

from pdcoord.runtime.paths_table import PRINTED, show_paths

POOL = """\
  - name: {name}
    role: {role}
    vendor: v
    engine: vllm
    connector: pdcoord
    layout: {{preset: {preset}}}
    kv_bytes_per_token: 1024
    link_gbit_per_s: 100
    endpoints: [{{name: a, address: "127.0.0.1:{port}"}}]
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}}
"""
POLICY = (
    "apiVersion: pdcoord.io/v1alpha1\nkind: PoolPolicy\nmetadata: {name: m}\n"
    "model: {name: org/model}\npools:\n"
    + POOL.format(name="fast", role="prefill", preset="intel-gaudi", port=9)
    + POOL.format(name="wide", role="decode", preset="cpu-vec", port=10)
)
MAIN = """\
import sys
from pdcoord.runtime.serve import serve
from pdcoord.runtime.settings import load_settings
sys.exit(serve(load_settings()))
"""


async def test_the_paths_of_a_running_gateway_are_printed(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    ports = {"PDCOORD_PORT": "0", "PDCOORD_ADMIN_PORT": "0"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        MAIN,
        env=os.environ | {"PDCOORD_POLICY": str(policy)} | ports,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30.0):
            line = json.loads(await process.stderr.readline())
            while line["event"] != "process.started":
                line = json.loads(await process.stderr.readline())
        text, raw = io.StringIO(), io.StringIO()
        for as_json, out in ((False, text), (True, raw)):
            assert await asyncio.to_thread(show_paths, line["admin_url"], as_json=as_json, out=out) == PRINTED
    finally:
        process.kill()
        await process.communicate()
    head, row = text.getvalue().splitlines()
    assert head.split()[:5] == ["prefill", "decode", "verdict", "breaker", "Gbit/s"]
    # Nobody has tried the pair yet, and until then nothing goes over it.
    assert row.split()[:7] == ["fast/a", "wide/a", "regroup", "open", "100", "untried", "canary-untried"]
    assert row.endswith("layouts differ in order, tiling, split")
    page = json.loads(raw.getvalue())
    assert (page["total"], page["paths"][0]["verdict"]) == (1, "regroup")
