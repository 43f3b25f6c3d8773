"""Ports for servers: free, below those of outgoing connections, and not those of a neighbour."""

import socket

import pytest

from pdcoord.sim import ports


def test_ports_are_free_apart_and_below_those_of_outgoing_connections() -> None:
    given = ports.free_ports(40)
    assert len(set(given)) == 40
    assert all(20_000 <= port < 32_000 for port in given)
    assert {port + 1 for port in given}.isdisjoint(given)
    with socket.socket() as server:
        server.bind(("127.0.0.1", given[0]))


def test_a_port_that_somebody_holds_is_not_given() -> None:
    (held,) = ports.free_ports(1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", held))
        server.listen()
        assert held not in {port for _ in range(4) for port in ports.free_ports(100)}


def test_neighbours_have_shares_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def given_to(process_id: int) -> set[int]:
        monkeypatch.setattr(ports.os, "getpid", lambda: process_id)
        return set(ports.free_ports(200))

    first, second = given_to(4_711), given_to(4_712)
    assert first.isdisjoint(second)


def test_more_than_a_share_is_refused_with_its_bounds() -> None:
    with pytest.raises(OSError, match="301 free ports were not found between"):
        ports.free_ports(301)
