"""What the UCX backend does apart from the promises that all backends keep."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")

PRELUDE = """
import logging
import os, sys, time
import msgspec
import numpy as np
from transfer.backends.base import Piece, Region
from transfer.backends.ucx import UcxBackend, ucx_settings_from_mapping
from transfer.backends.ucx_messages import UcxMetadata
from transfer.errors import BackendError, PeerLostError, ReadTimeoutError, SettingError

memory = np.zeros(1 << 20, np.uint8)
region = Region(memory.ctypes.data, memory.size)
source = np.arange(1 << 20, dtype=np.uint64).astype(np.uint8)
LOCAL = {"transports": "tcp,self"}

def pair():
    owner, reader = UcxBackend(ucx_settings_from_mapping(LOCAL)), UcxBackend(ucx_settings_from_mapping(LOCAL))
    owner.start(Region(source.ctypes.data, source.size))
    reader.start(region)
    return owner, reader
"""


def run(script: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    ended = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        env={**clean, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2_000:] + ended.stderr[-2_000:]


def test_one_process_may_read_from_itself_and_is_told_what_carries_it() -> None:
    run("""
owner, reader = pair()
reader.connect("owner", owner.metadata()).result(10)
report = reader.read("owner", [Piece(0, 0, source.size)], timeout_s=10).result(10)
assert report.read_bytes == source.size and (source == memory).all()
assert "tcp/" in reader.transport("owner"), reader.transport("owner")
assert not reader.is_degraded("owner")
reader.close()
owner.close()
""")


def test_without_the_token_of_the_side_channel_nothing_is_read() -> None:
    run("""
owner, reader = pair()
told = msgspec.msgpack.decode(owner.metadata(), type=UcxMetadata)
forged = msgspec.structs.replace(told, token=bytes(16))
reader.connect("forged", msgspec.msgpack.encode(forged)).result(10)
try:
    reader.read("forged", [Piece(0, 0, 4096)], timeout_s=0.5).result(10)
except (ReadTimeoutError, PeerLostError):
    pass
else:
    raise SystemExit("was answered")
assert not memory.any()
reader.connect("owner", owner.metadata()).result(10)
assert reader.read("owner", [Piece(0, 0, 4096)], timeout_s=10).result(10).read_bytes == 4096
reader.close()
owner.close()
""")


def test_the_owner_refuses_what_is_outside_whatever_the_reader_believes() -> None:
    run("""
owner, reader = pair()
told = msgspec.msgpack.decode(owner.metadata(), type=UcxMetadata)
larger = msgspec.structs.replace(told, length_bytes=1 << 30)
reader.connect("owner", msgspec.msgpack.encode(larger)).result(10)
try:
    reader.read("owner", [Piece(source.size - 10, 0, 11)], timeout_s=10).result(10)
except BackendError as error:
    assert "refused" in str(error), error
else:
    raise SystemExit("was answered")
reader.close()
owner.close()
""")


def test_memory_that_ucxx_does_not_reach_is_refused() -> None:
    run("""
for device in ("xpu:0", "hpu:0"):
    try:
        UcxBackend(ucx_settings_from_mapping(LOCAL)).start(Region(4096, 4096, device))
    except SettingError as error:
        assert error.field == "staging_device"
    else:
        raise SystemExit("was not refused")
""")


def test_an_unknown_setting_is_refused() -> None:
    run("""
for given in ({"transport": "tcp"}, {"allow_second_ucx": 1}, {"rails": "x"}):
    try:
        ucx_settings_from_mapping(given)
    except SettingError as error:
        assert error.field in given
    else:
        raise SystemExit("was not refused")
""")
