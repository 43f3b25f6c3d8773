import json
import resource
import socket
from pathlib import Path

import pytest

from transfer import preflight
from transfer.preflight import (
    Level,
    Line,
    Wants,
    huge_page_line,
    key_line,
    memlock_line,
    nixl_lines,
    port_line,
    printed,
    processor_lines,
    rdma_lines,
    shm_line,
    transport_lines,
)
from transfer.roce import RoceSettings


def port(root: Path, *, state: str = "4: ACTIVE", mtu: int = 9_000, kind: str = "RoCE v2") -> None:
    files = {
        "sys/class/infiniband/mlx5_0/ports/1/state": state,
        "sys/class/infiniband/mlx5_0/ports/1/link_layer": "Ethernet",
        "sys/class/infiniband/mlx5_0/ports/1/rate": "100 Gb/sec",
        "sys/class/infiniband/mlx5_0/ports/1/gids/3": "0000:0000:0000:0000:0000:ffff:0a00:0001",
        "sys/class/infiniband/mlx5_0/ports/1/gid_attrs/types/3": kind,
        "sys/class/infiniband/mlx5_0/ports/1/gid_attrs/ndevs/3": "eth1",
        "sys/class/net/eth1/mtu": str(mtu),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "dev/infiniband").mkdir(parents=True, exist_ok=True)


def levels(root: Path, *, needs_rdma: bool = False, roce: RoceSettings | None = None) -> dict[str, Level]:
    wants = Wants(roce or RoceSettings(), needs_rdma, root=root)
    return {line.subject: line.level for line in rdma_lines(wants)}


def test_missing_rdma_fails_only_where_it_is_required(tmp_path: Path) -> None:
    assert levels(tmp_path) == {"rdma": Level.WARN}
    assert levels(tmp_path, needs_rdma=True) == {"rdma": Level.FAIL}


def test_a_good_port_is_all_ok(tmp_path: Path) -> None:
    port(tmp_path)
    told = levels(tmp_path, needs_rdma=True, roce=RoceSettings(devices=("mlx5_0:1",), gid_index=3))
    assert told == dict.fromkeys(("mlx5_0:1", "mlx5_0:1 GID", "mlx5_0:1 MTU"), Level.OK)


def test_each_fault_of_a_port_has_a_line(tmp_path: Path) -> None:
    port(tmp_path, state="1: DOWN")
    assert levels(tmp_path, needs_rdma=True) == {"rdma": Level.FAIL, "mlx5_0:1": Level.WARN}
    port(tmp_path, mtu=1_500, kind="IB/RoCE v1")
    told = levels(tmp_path)
    assert (told["mlx5_0:1 GID"], told["mlx5_0:1 MTU"]) == (Level.WARN, Level.WARN)
    (tmp_path / "dev/infiniband").rmdir()
    assert levels(tmp_path)["rdma verbs"] is Level.WARN


def test_a_setting_that_cannot_work_is_a_failure(tmp_path: Path) -> None:
    port(tmp_path)
    assert levels(tmp_path, roce=RoceSettings(gid_index=0))["setting gid_index"] is Level.FAIL


def test_locked_memory_matters_with_rdma_only() -> None:
    assert memlock_line(resource.RLIM_INFINITY, has_rdma=True).level is Level.OK
    assert memlock_line(8 << 20, has_rdma=False).level is Level.OK
    assert memlock_line(8 << 20, has_rdma=True).level is Level.FAIL
    assert memlock_line(64 << 30, has_rdma=True).level is Level.OK


def test_shared_memory_and_huge_pages() -> None:
    assert [shm_line(size << 20).level for size in (64, 4_096)] == [Level.WARN, Level.OK]
    assert huge_page_line("always madvise [never]").level is Level.WARN
    assert huge_page_line("[always] madvise never").level is Level.OK


def test_nixl_plugins_are_told_with_their_memory() -> None:
    lines = list(nixl_lines({"UCX": ["DRAM_SEG", "VRAM_SEG"], "GDS": None}, ""))
    assert [line.level for line in lines] == [Level.OK, Level.OK]
    assert "DRAM, VRAM" in lines[0].finding
    assert "GDS" in lines[1].finding
    assert [line.level for line in nixl_lines({"POSIX": ["DRAM_SEG"]}, "")] == [Level.WARN, Level.OK]
    for found in ({}, {"UCX": None}, None):
        assert [line.level for line in nixl_lines(found, "broken")] == [Level.WARN]


def test_transports_are_read_from_ucx_info() -> None:
    text = (
        "# Component: tcp\n#      Transport: tcp\n#         Device: eth0\n#         Device: lo\n# Type: net\n"
    )
    (line,) = transport_lines(text, "")
    assert line.finding == "tcp/eth0, tcp/lo"
    assert next(iter(transport_lines("", ""))).level is Level.WARN
    assert next(iter(transport_lines(None, "not there"))).level is Level.OK


def test_a_taken_port_is_a_failure() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert port_line("127.0.0.1", number).level is Level.FAIL
    assert port_line("127.0.0.1", 0).level is Level.OK
    assert port_line("203.0.113.1", 0).level is Level.FAIL


def test_the_key_is_there_long_enough_and_private(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert key_line(str(path)).level is Level.FAIL
    path.write_text("0123456789abcdef\n")
    path.chmod(0o644)
    assert key_line(str(path)).level is Level.FAIL
    path.chmod(0o440)
    assert key_line(str(path)).level is Level.OK
    path.chmod(0o600)
    path.write_text("short\n")
    told = key_line(str(path))
    assert told.level is Level.FAIL
    assert "short" not in told.finding + told.remedy


def test_processors_are_counted_and_near_nodes_named(tmp_path: Path) -> None:
    port(tmp_path)
    for node in ("node0", "node1"):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
    (tmp_path / "sys/class/infiniband/mlx5_0/device").mkdir()
    (tmp_path / "sys/class/infiniband/mlx5_0/device/numa_node").write_text("1\n")
    lines = list(processor_lines(Wants(RoceSettings(), root=tmp_path)))
    assert "2 NUMA nodes" in lines[0].finding
    assert "node 1" in lines[1].finding


def test_the_exit_status_tells_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [Line(Level.OK, "a", "fine"), Line(Level.WARN, "b", "odd", "mend it")]
    monkeypatch.setattr(preflight, "inspect", lambda _: lines)
    assert preflight.main([]) == 0
    assert "-> mend it" in capsys.readouterr().out
    lines.append(Line(Level.FAIL, "c", "broken", "replace it"))
    assert preflight.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)[2] == {
        "level": "fail",
        "subject": "c",
        "finding": "broken",
        "remedy": "replace it",
    }
    assert preflight.main(["--devices", "no good"]) == 2
    assert "devices" in capsys.readouterr().err


def test_every_line_that_is_not_ok_has_a_remedy(tmp_path: Path) -> None:
    port(tmp_path, state="1: DOWN", mtu=1_500)
    lines = [
        *rdma_lines(Wants(RoceSettings(devices=("x:1",)), root=tmp_path)),
        shm_line(0),
        huge_page_line("[never]"),
    ]
    lines += [
        memlock_line(0, has_rdma=True),
        key_line("/nowhere"),
        *nixl_lines(None, "x"),
        *nixl_lines({}, ""),
    ]
    assert all(line.remedy for line in lines if line.level is not Level.OK)
    assert printed([]) == ""
