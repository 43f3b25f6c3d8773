"""What the NIXL backend does apart from the promises that all backends keep."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed")

# Each runs in a process of its own: a process takes one UCX, and UCX reads its settings once.
PRELUDE = """
import os, sys
import numpy as np
from transfer.backends.base import Piece, Region
from transfer.backends.nixl import NixlBackend, NixlSettings, nixl_settings_from_mapping
from transfer.errors import BackendError, SettingError
from transfer.roce import RoceSettings

memory = np.zeros(1 << 20, np.uint8)
region = Region(memory.ctypes.data, memory.size)
LOCAL = {"transports": "tcp,self"}

def refused(settings, field, where=region):
    try:
        NixlBackend(settings).start(where)
    except SettingError as error:
        assert error.field == field, error
        return str(error)
    raise SystemExit("was not refused")
"""


def run(script: str, **environment: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    ended = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        env={**clean, "PYTHONPATH": str(ROOT), "NIXL_LOG_LEVEL": "FATAL", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2_000:] + ended.stderr[-2_000:]


def test_an_absent_plugin_is_refused_with_those_that_are_there() -> None:
    run("""
assert "UCX" in refused(NixlSettings(plugin="UCCL"), "plugin")
""")


def test_device_memory_that_cannot_be_reached_is_refused() -> None:
    run("""
told = refused(nixl_settings_from_mapping(LOCAL), "staging_device", Region(4096, 4096, "cuda:0"))
assert "stage in host memory" in told
told = refused(NixlSettings(plugin="POSIX"), "staging_device", Region(4096, 4096, "cuda:0"))
""")


def test_settings_that_the_environment_contradicts_are_refused() -> None:
    run(
        """assert "unset it" in refused(nixl_settings_from_mapping(LOCAL), "UCX_TLS")""",
        UCX_TLS="tcp,self,sm",
    )


def test_a_device_that_is_not_there_is_refused() -> None:
    run("""refused(nixl_settings_from_mapping({"devices": "mlx5_77:1"}), "devices")""")


def test_the_environment_is_left_as_it_was() -> None:
    run("""
before = dict(os.environ)
backend = NixlBackend(nixl_settings_from_mapping(LOCAL))
backend.start(region)
assert {k: v for k, v in os.environ.items() if k.startswith("UCX")} == {}
assert before.items() <= dict(os.environ).items()
backend.close()
""")


def test_ucxx_beside_nixl_is_refused_both_ways() -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed")
    run("""
from transfer.backends.ucx import UcxBackend
backend = NixlBackend(nixl_settings_from_mapping(LOCAL))
backend.start(region)
try:
    UcxBackend().start(region)
except SettingError as error:
    assert "another" in str(error) or "brings its own UCX" in str(error), error
else:
    raise SystemExit("was not refused")
backend.close()
""")
    run("""
from transfer.backends.ucx import UcxBackend, ucx_settings_from_mapping
backend = UcxBackend(ucx_settings_from_mapping(LOCAL))
backend.start(region)
refused(nixl_settings_from_mapping(LOCAL), "backends")
backend.close()
""")


def test_one_process_may_read_from_itself_and_is_told_what_carries_it() -> None:
    run("""
source = np.arange(1 << 20, dtype=np.uint64).astype(np.uint8)
owner, reader = NixlBackend(nixl_settings_from_mapping(LOCAL)), NixlBackend(nixl_settings_from_mapping(LOCAL))
owner.start(Region(source.ctypes.data, source.size))
reader.start(region)
reader.connect("owner", owner.metadata()).result(10)
assert reader.transport("owner") == "UCX (unknown)"
report = reader.read("owner", [Piece(0, 0, source.size)], timeout_s=10).result(10)
assert report.read_bytes == source.size and (source == memory).all()
assert reader.transport("owner").startswith("UCX tcp/"), reader.transport("owner")
assert not reader.is_degraded("owner")
reader.close()
owner.close()
""")


def test_a_silent_downgrade_to_tcp_is_told() -> None:
    run("""
settings = nixl_settings_from_mapping({"transports": "rc,tcp,self"})
owner, reader = NixlBackend(settings), NixlBackend(settings)
source = np.ones(4096, np.uint8)
owner.start(Region(source.ctypes.data, source.size))
reader.start(region)
reader.connect("owner", owner.metadata()).result(10)
assert not reader.is_degraded("owner")
reader.read("owner", [Piece(0, 0, 4096)], timeout_s=10).result(10)
if not os.path.isdir("/sys/class/infiniband"):
    assert reader.is_degraded("owner"), reader.transport("owner")
reader.close()
owner.close()
""")


def test_use_before_start_and_a_second_start_are_refused() -> None:
    run("""
backend = NixlBackend(nixl_settings_from_mapping(LOCAL))
backend.close()
for call in (backend.metadata, lambda: backend.forget("x"), lambda: backend.transport("x")):
    try:
        call()
    except BackendError:
        continue
    raise SystemExit("was not refused")
backend.start(region)
try:
    backend.start(region)
except BackendError:
    pass
else:
    raise SystemExit("was not refused")
backend.close()
""")
