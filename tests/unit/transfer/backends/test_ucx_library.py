import os
from pathlib import Path

import pytest

from transfer.backends import ucx_library
from transfer.backends.ucx_library import (
    ReadTable,
    TableReader,
    UcxLog,
    is_tcp,
    loaded_libraries,
    refuse_second_ucx,
    transport_text,
    ucx_environment,
)
from transfer.errors import SettingError

# What UCX 1.21 wrote for NIXL 1.5.1 on a host without RDMA, and a table of two rails put together from it.
LOG = """\
[1795244949.515358] [vm:1202 :0]   +--------+-------------+-----------------------------------+
[1795244949.515358] [vm:1202 :0]   | R self cfg#0                                             |
[1795244949.515358] [vm:1202 :0]   | remote memory write by ucp_put* from host memory to host |
[1795244949.515358] [vm:1202 :0]   | 0..inf | zero-copy   | cma/memory                        |
[1795245183.619770] [vm:2441 :0]   +--------+-------------+-------------------------------------------+
[1795245183.619770] [vm:2441 :0]   | R intra-node cfg#1                                               |
[1795245183.619770] [vm:2441 :0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1795245183.619770] [vm:2441 :0]   +--------+-------------+-------------------------------------------+
[1795245183.619770] [vm:2441 :0]   | Range  | Description |                  Config                   |
[1795245183.619770] [vm:2441 :0]   +--------+-------------+-------------------------------------------+
[1795245183.619770] [vm:2441 :0]   | 0..99 | software emulation | tcp/lo |
[1795245183.619770] [vm:2441 :0]   | 100..inf  | zero-copy   | cma/memory                                |
[1795245183.619770] [vm:2441 :0]   +--------+-------------+-------------------------------------------+
[1795245183.619771] [vm:2441 :0]   | R inter-node cfg#2 |
[1795245183.619771] [vm:2441 :0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1795245183.619771] [vm:2441 :0] | 0..inf | zero-copy | 50% rc_mlx5/mlx5_0:1/path0 and 50% rc_mlx5/mlx5_1:1|
"""


def read(text: str) -> tuple[ReadTable, ...]:
    reader = TableReader()
    for line in text.splitlines():
        reader.take(line)
    reader.finish()
    return tuple(reader.tables)


def test_only_the_largest_reads_of_a_worker_count() -> None:
    near, far = read(LOG)
    assert (near.worker, near.scope, near.lanes, near.is_emulated) == (
        "R",
        "intra-node",
        ("cma/memory",),
        False,
    )
    assert (far.scope, far.lanes) == ("inter-node", ("rc_mlx5/mlx5_0:1", "rc_mlx5/mlx5_1:1"))


def test_the_transport_is_that_of_the_peers_kind() -> None:
    tables = read(LOG)
    assert transport_text(tables, "R", is_same_host=True) == "cma/memory"
    assert transport_text(tables, "R", is_same_host=False) == "rc_mlx5/mlx5_0:1 rc_mlx5/mlx5_1:1"
    assert transport_text(tables, "another", is_same_host=True) is None
    apart = tuple(table for table in tables if table.scope == "inter-node")
    assert transport_text(apart, "R", is_same_host=True) == "rc_mlx5/mlx5_0:1 rc_mlx5/mlx5_1:1"
    near = tuple(table for table in tables if table.scope != "inter-node")
    assert transport_text(near, "R", is_same_host=False) is None


@pytest.mark.parametrize(
    "text", ["", "|", "| |", "| a cfg#", "||||", "| R intra-node cfg#1 |\n| 0..inf | x | y/z |"]
)
def test_other_lines_are_no_table(text: str) -> None:
    assert read(text) == ()


def test_tcp_is_told_from_others() -> None:
    assert all(map(is_tcp, ["tcp/eth0", "UCX tcp/lo", "tcp"]))
    assert not any(map(is_tcp, ["UCX cma/memory", "UCX rc_mlx5/mlx5_0:1", "UCX (unknown)"]))


MAPS = """\
7f00-7f10 r-xp 00000000 08:01 1 /opt/nixl_cu12.libs/libucp-b39b3ed9.so.0.0.0
7f10-7f20 rw-p 00001000 08:01 1 /opt/nixl_cu12.libs/libucp-b39b3ed9.so.0.0.0
7f20-7f30 r-xp 00000000 08:01 2 /opt/libucx/lib/libucp.so.0.0.0
7f30-7f40 r-xp 00000000 08:01 3 /opt/libucx/lib/libucpx.so.0
7f40-7f50 rw-p 00000000 00:00 0 [heap]
"""


def test_libraries_are_found_by_name() -> None:
    found = {str(path) for path in loaded_libraries("libucp", MAPS)}
    assert found == {"/opt/nixl_cu12.libs/libucp-b39b3ed9.so.0.0.0", "/opt/libucx/lib/libucp.so.0.0.0"}


def test_a_second_ucx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_library, "bundled_folder", lambda _: Path("/opt/libucx/lib"))
    monkeypatch.setattr(ucx_library, "loaded_libraries", lambda _: loaded_libraries("libucp", MAPS))
    with pytest.raises(SettingError, match="brings its own UCX"):
        refuse_second_ucx("ucxx", ("libucx",), is_allowed=False)
    refuse_second_ucx("ucxx", ("libucx",), is_allowed=True)
    monkeypatch.setattr(ucx_library, "bundled_folder", lambda _: None)
    refuse_second_ucx("ucxx", ("libucx",), is_allowed=False)


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.delenv("UCX_IB_SL", raising=False)
    with ucx_environment({"UCX_TLS": "tcp", "UCX_IB_SL": "3"}):
        assert os.environ["UCX_IB_SL"] == "3"
    assert "UCX_IB_SL" not in os.environ
    assert os.environ["UCX_TLS"] == "tcp"
    with pytest.raises(SettingError, match="the environment says 'tcp'"), ucx_environment({"UCX_TLS": "rc"}):
        pass


def test_a_log_that_a_person_directs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_LOG_FILE", "/dev/null")
    log = UcxLog()
    assert log.environment() == {}
    assert log.tables() == ()
