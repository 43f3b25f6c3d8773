from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.backends.nixl_thread import (
    PeerMetadata,
    decode_metadata,
    memory_of,
    patient_progress,
    translated,
)
from transfer.errors import BackendError, PeerLostError

GOOD = PeerMetadata("UCX", b"agent", 1 << 40, 4_096, "DRAM", 0, "boot")


def test_metadata_comes_back() -> None:
    assert decode_metadata(msgspec.msgpack.encode(GOOD)) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"address": -1},
        {"length_bytes": -1},
        {"length_bytes": 1 << 62},
        {"device_index": -1},
        {"memory": "FILE"},
        {"agent": b"a" * (1 << 20)},
    ],
)
def test_metadata_without_a_region_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BackendError):
        decode_metadata(msgspec.msgpack.encode(msgspec.structs.replace(GOOD, **change)))


@given(st.binary(max_size=200))
def test_other_bytes_are_no_metadata(data: bytes) -> None:
    with pytest.raises(BackendError):
        decode_metadata(data)


@pytest.mark.parametrize(
    ("device", "memory"), [("cpu", ("DRAM", 0)), ("cuda:3", ("VRAM", 3)), ("xpu", ("VRAM", 0))]
)
def test_a_device_has_a_kind_of_memory(device: str, memory: tuple[str, int]) -> None:
    assert memory_of(device) == memory


class StockConfig:
    pthrDelay = -1  # noqa: N815  # NIXL's name


def test_the_delay_of_the_progress_thread_is_kept_while_an_agent_is_made() -> None:
    api = SimpleNamespace(nixlBind=SimpleNamespace(nixlAgentConfig=StockConfig))
    with patient_progress(api, 100_000):
        config = api.nixlBind.nixlAgentConfig()
        config.pthrDelay = 0
        config.lthrDelay = 5
    assert (config.pthrDelay, config.lthrDelay) == (100_000, 5)
    assert api.nixlBind.nixlAgentConfig is StockConfig


def test_a_nixl_that_has_no_such_delay_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with patient_progress(SimpleNamespace(), 100_000):
        assert "may keep a core busy" in caplog.text


class nixlRemoteDisconnectError(Exception):  # noqa: N801  # NIXL's name
    pass


def test_a_disconnect_is_a_lost_peer() -> None:
    assert isinstance(translated(nixlRemoteDisconnectError("x")), PeerLostError)
    other = translated(RuntimeError("x"))
    assert isinstance(other, BackendError)
    assert not isinstance(other, PeerLostError)
