"""Who is let in at a rank's door, and what others are told."""

from typing import Any

import pytest

from transfer.backends.loopback import LoopbackBackend, LoopbackNetwork
from transfer.door import Door, House, Identity
from transfer.errors import FailureKind, LayoutError
from transfer.layout import GroupShape, KvLayout, RankLayout
from transfer.links import LinkError, LinkLimits
from transfer.session.messages import VERSION, Hello, Welcome
from transfer.session.wire import rank_layout_to_wire
from transfer.staging import HostStaging

NONCE = bytes(16)
SHAPE = GroupShape(2, 4, 16, 16)
OWN = RankLayout(KvLayout(16), 0, (SHAPE,))


@pytest.fixture
def backend() -> Any:
    staging = HostStaging(1 << 16)
    made = LoopbackBackend(LoopbackNetwork())
    made.start(staging.region)
    yield made
    made.close()
    staging.close()


def door(backend: LoopbackBackend, advertise_host: str = "10.0.0.1") -> Door:
    house = House(
        Identity("engine", "epoch"), OWN, {"loopback": backend}, advertise_host, 1 << 16, lambda: ("a:1",)
    )
    return Door(house, b"", LinkLimits(1.0, 1.0, 1 << 20), 2)


def hello(**fields: Any) -> Hello:
    layout = rank_layout_to_wire(RankLayout(KvLayout(32), 0, (SHAPE,)))
    own = {"version": VERSION, "nonce": bytes(16), "engine_id": "x", "epoch": "y", "layout": layout}
    return Hello(**own | {"backends": (("ucx", b""), ("loopback", b""))} | fields)


def refusal(door: Door, said: Hello, host: str = "10.0.0.2") -> LinkError:
    with pytest.raises(LinkError) as raised:
        door._judge(said, NONCE, host)
    return raised.value


def test_a_peer_that_fits_is_told_all_that_it_needs(backend: LoopbackBackend) -> None:
    peer, welcome = door(backend)._judge(hello(), NONCE, "10.0.0.2")
    assert isinstance(welcome, Welcome)
    assert (peer.engine_id, peer.epoch, peer.backend) == ("x", "y", "loopback")
    assert peer.layout is not None
    assert peer.layout.layout.block_tokens == 32
    assert welcome.backend == "loopback"
    assert (welcome.ranks, welcome.epoch, welcome.verdict[0]) == (("a:1",), "epoch", "regroup")


def test_a_sidecar_is_told_no_backend(backend: LoopbackBackend) -> None:
    peer, welcome = door(backend)._judge(hello(layout=None, backends=()), NONCE, "127.0.0.1")
    assert isinstance(welcome, Welcome)
    assert (peer.layout, welcome.backend) == (None, "")


def test_why_others_are_not_let_in(backend: LoopbackBackend) -> None:
    own = door(backend)
    other = rank_layout_to_wire(RankLayout(KvLayout(16), 0, (GroupShape(3, 4, 16, 16),)))
    cases = (
        (hello(version=VERSION + 1), FailureKind.VERSION_MISMATCH, "version"),
        (hello(layout=other), FailureKind.IMPOSSIBLE_LAYOUT, "layer"),
        (hello(backends=(("ucx", b""),)), FailureKind.UNREACHABLE, "no backend in common"),
    )
    for said, kind, word in cases:
        failure = refusal(own, said).failure
        assert failure.kind is kind
        assert word in failure.detail
    with pytest.raises(LayoutError):
        own._judge(hello(layout={"rank": 0}), NONCE, "10.0.0.2")


@pytest.mark.parametrize("advertised", ["", "127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_a_remote_peer_is_refused_where_only_this_host_could_dial_back(
    backend: LoopbackBackend, advertised: str
) -> None:
    own = door(backend, advertised)
    failure = refusal(own, hello()).failure
    assert failure.kind is FailureKind.UNREACHABLE
    assert "advertise_host" in failure.detail
    for host in ("127.0.0.1", "::1"):
        own._judge(hello(), NONCE, host)


def test_one_too_many_is_told_so(backend: LoopbackBackend) -> None:
    own = door(backend)
    own._count = 3
    assert refusal(own, hello()).failure.kind is FailureKind.OVERLOADED
