from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import SettingError
from transfer.roce import (
    RoceSettings,
    check,
    is_rdma_name,
    problems,
    read_ports,
    roce_from_mapping,
)

NO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"
LINK_LOCAL = "fe80:0000:0000:0000:0a00:00ff:fe00:0001"
V4 = "0000:0000:0000:0000:0000:ffff:0a00:0001"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def add_port(
    root: Path, device: str = "mlx5_0", *, state: str = "4: ACTIVE", layer: str = "Ethernet", mtu: int = 9_000
) -> None:
    port = root / "sys/class/infiniband" / device / "ports/1"
    write(port / "state", state)
    write(port / "link_layer", layer)
    write(port / "rate", "100 Gb/sec (4X EDR)")
    for index, (gid, kind) in enumerate(
        [
            (LINK_LOCAL, "IB/RoCE v1"),
            (LINK_LOCAL, "RoCE v2"),
            (V4, "IB/RoCE v1"),
            (V4, "RoCE v2"),
            (NO_GID, ""),
        ]
    ):
        write(port / f"gids/{index}", gid)
        write(port / f"gid_attrs/types/{index}", kind)
        write(port / f"gid_attrs/ndevs/{index}", "eth1")
    write(root / "sys/class/infiniband" / device / "device/numa_node", "1")
    write(root / "sys/class/net/eth1/mtu", str(mtu))


def test_a_port_is_read_as_sysfs_shows_it(tmp_path: Path) -> None:
    add_port(tmp_path)
    (port,) = read_ports(tmp_path)
    assert (port.name, port.state, port.link_layer, port.numa_node) == ("mlx5_0:1", "ACTIVE", "Ethernet", 1)
    assert [gid.index for gid in port.gids] == [0, 1, 2, 3]
    assert port.suggested_gid is not None
    assert port.suggested_gid.index == 3
    assert port.path_mtu_bytes == 4_096


@pytest.mark.parametrize(("interface", "path"), [(9_000, 4_096), (1_500, 1_024), (4_200, 4_096), (300, None)])
def test_the_path_mtu_leaves_room_for_headers(tmp_path: Path, interface: int, path: int | None) -> None:
    add_port(tmp_path, mtu=interface)
    assert read_ports(tmp_path)[0].path_mtu_bytes == path


def test_a_node_without_rdma_has_no_ports(tmp_path: Path) -> None:
    assert read_ports(tmp_path) == ()


def test_settings_that_this_node_has_pass(tmp_path: Path) -> None:
    add_port(tmp_path)
    for device in ("mlx5_0:1", "mlx5_0", "eth1"):
        check(RoceSettings(devices=(device,), gid_index=3, transports=("rc", "ud", "self", "sm")), tmp_path)


@pytest.mark.parametrize(
    ("settings", "field", "remedy"),
    [
        (RoceSettings(devices=("mlx5_7:1",)), "devices", "mlx5_0:1"),
        (RoceSettings(devices=("mlx5_0:2",)), "devices", "not on this node"),
        (RoceSettings(devices=("eth9",)), "devices", "not on this node"),
        (RoceSettings(devices=("mlx5_1:1",)), "devices", "DOWN"),
        (RoceSettings(gid_index=4), "gid_index", "no GID there: use 3"),
        (RoceSettings(devices=("mlx5_0:1",), gid_index=2), "gid_index", "not RoCE v2: use 3"),
        (RoceSettings(transports=("rc_verbs", "self")), "transports", "add ud"),
    ],
)
def test_what_the_node_cannot_do_is_named_with_a_remedy(
    tmp_path: Path, settings: RoceSettings, field: str, remedy: str
) -> None:
    add_port(tmp_path)
    add_port(tmp_path, "mlx5_1", state="1: DOWN")
    with pytest.raises(SettingError, match=remedy) as caught:
        check(settings, tmp_path)
    assert caught.value.field == field


def test_rdma_alone_needs_a_device(tmp_path: Path) -> None:
    (problem,) = problems(RoceSettings(transports=("rc", "ud", "self")), tmp_path)
    assert problem.field == "transports"
    assert problems(RoceSettings(transports=("rc", "tcp", "self")), tmp_path) == []
    assert (
        problems(RoceSettings(gid_index=3), tmp_path)[0].remedy == "there is no RDMA port here: leave it out"
    )


def test_infiniband_takes_any_gid(tmp_path: Path) -> None:
    add_port(tmp_path, layer="InfiniBand")
    check(RoceSettings(gid_index=0), tmp_path)


def test_the_environment_says_what_was_set_and_no_more() -> None:
    assert RoceSettings().environment() == {}
    settings = RoceSettings(("mlx5_0", "mlx5_1:2"), ("rc", "self"), 3, 106, 3, 2)
    assert settings.environment() == {
        "UCX_NET_DEVICES": "mlx5_0:1,mlx5_1:2",
        "UCX_TLS": "rc,self",
        "UCX_IB_GID_INDEX": "3",
        "UCX_IB_TRAFFIC_CLASS": "106",
        "UCX_IB_SL": "3",
        "UCX_MAX_RMA_RAILS": "2",
        "UCX_MAX_RNDV_RAILS": "2",
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RoceSettings(), False),
        (RoceSettings(transports=("tcp", "self", "sm")), False),
        (RoceSettings(transports=("rc_mlx5", "ud", "self")), True),
        (RoceSettings(devices=("eth0",)), False),
        (RoceSettings(devices=("bnxt_re0",)), True),
    ],
)
def test_whether_rdma_is_asked_for(settings: RoceSettings, expected: bool) -> None:
    assert settings.asks_for_rdma is expected


def test_device_names_tell_rdma_from_interfaces() -> None:
    assert all(map(is_rdma_name, ["mlx5_0", "mlx5_bond_0", "rocep1s0", "eth0:1", "ionic_0"]))
    assert not any(map(is_rdma_name, ["eth0", "ens1f0np0", "bond0", "lo"]))


@pytest.mark.parametrize(
    "given_by",
    [
        {"devices": ["a b"]},
        {"devices": 5},
        {"transports": "rc;ud"},
        {"gid_index": -1},
        {"gid_index": "x"},
        {"gid_index": True},
        {"traffic_class": 256},
        {"service_level": 16},
        {"rails": 0},
        {"gid": 3},
    ],
)
def test_a_bad_setting_is_named(given_by: dict[str, object]) -> None:
    with pytest.raises(SettingError) as caught:
        roce_from_mapping(given_by)
    assert caught.value.field == next(iter(given_by))


@given(
    st.lists(st.sampled_from(["mlx5_0", "mlx5_1:2", "eth0"]), max_size=3, unique=True),
    st.none() | st.integers(0, 1_023),
    st.none() | st.integers(0, 255),
)
def test_text_and_lists_mean_the_same(devices: list[str], gid_index: int | None, traffic: int | None) -> None:
    as_text = {"devices": ",".join(devices), "gid_index": None if gid_index is None else str(gid_index)}
    as_lists = {"devices": devices, "gid_index": gid_index}
    first = roce_from_mapping({**as_text, "traffic_class": traffic})
    assert first == roce_from_mapping({**as_lists, "traffic_class": traffic})
