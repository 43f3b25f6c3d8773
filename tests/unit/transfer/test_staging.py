"""Staging memory: bytes in, bytes out, and what cannot be had is said so."""

import numpy as np
import pytest

from transfer.errors import SettingError
from transfer.staging import HOST, HostStaging, host_view, make_staging


def test_host_memory_is_one_piece_in_all_its_views() -> None:
    staging = HostStaging(1 << 16)
    try:
        assert staging.region.length_bytes == 1 << 16
        assert staging.region.address % 4_096 == 0
        assert staging.region.device == HOST
        assert not staging.is_pinned
        staging.write_bytes(100, b"abc")
        assert staging.read_bytes(99, 5) == b"\0abc\0"
        assert staging.numpy()[101] == ord("b")
        view = host_view(staging.region)
        view[101] = ord("x")
        assert staging.read_bytes(100, 3) == b"axc"
        assert staging.numpy().ctypes.data == staging.region.address
        assert staging.numpy().dtype == np.uint8
    finally:
        staging.close()
    staging.close()
    with pytest.raises(SettingError, match="closed"):
        staging.numpy()


def test_a_view_that_outlives_the_buffer_keeps_its_pages() -> None:
    staging = HostStaging(1 << 16)
    view = staging.numpy()
    staging.close()
    view[:] = 1
    assert view.sum() == 1 << 16


@pytest.mark.parametrize("length_bytes", [0, -1, 1 << 62])
def test_memory_that_cannot_be_had_is_named(length_bytes: int) -> None:
    with pytest.raises(SettingError, match="staging_bytes"):
        HostStaging(length_bytes)


@pytest.mark.parametrize(("wanted", "is_reached"), [("cpu", True), ("auto", True), ("auto", False)])
def test_an_engine_in_host_memory_stages_there(wanted: str, *, is_reached: bool) -> None:
    staging = make_staging(1 << 16, wanted, HOST, is_reached=is_reached)
    assert isinstance(staging, HostStaging)
    staging.close()


def test_a_device_needs_torch_and_one_that_torch_knows() -> None:
    with pytest.raises(SettingError, match="staging_device"):
        make_staging(1 << 16, "cuda:99", "cuda:99", is_reached=True)
