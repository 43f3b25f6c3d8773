"""A recorded Hello opens nothing: staging is told of only in a session that the peer has proved."""

import secrets
import socket
from collections.abc import Iterator

import pytest

from pdcoord.sim.kvstore import KvStore
from transfer.agent import Agent
from transfer.backends.tcp import TcpBackend
from transfer.door import Identity
from transfer.layout import KvLayout
from transfer.repack.reference import NumpyRepacker
from transfer.session.frames import Channel
from transfer.session.messages import VERSION, Admission, Hello, Renewal, Welcome
from transfer.session.wire import rank_layout_to_wire
from transfer.settings import AgentSettings
from transfer.staging import HostStaging

KEY = b"a key that both sides have"
HOST = "127.0.0.1"
BYTES = 1 << 20
DEADLINE_S = 5.0


@pytest.fixture
def agent() -> Iterator[Agent]:
    store = KvStore(KvLayout(16), 8, 1)
    staging = HostStaging(BYTES)
    settings = AgentSettings(
        listen_host=HOST, advertise_host=HOST, port=0, key=KEY, staging_bytes=BYTES, handshake_timeout_s=1.0
    )
    repacker = NumpyRepacker(store.layout, store.memory, staging.numpy())
    agent = Agent(settings, Identity("engine", "epoch"), staging, repacker, [TcpBackend(HOST)])
    agent.start()
    yield agent
    agent.close()
    staging.close()


def connect(agent: Agent) -> socket.socket:
    host, _, port = agent.address.rpartition(":")
    made = socket.create_connection((host, int(port)), DEADLINE_S)
    made.settimeout(DEADLINE_S)
    return made


def test_a_session_that_is_proved_is_admitted_and_a_recorded_hello_is_not(agent: Agent) -> None:
    layout = rank_layout_to_wire(agent.layout)
    nonce = secrets.token_bytes(16)
    channel = Channel(KEY, nonce, is_dialler=True)
    hello = channel.encode(
        Hello(version=VERSION, nonce=nonce, engine_id="x", epoch="y", layout=layout, backends=(("tcp", b""),))
    )
    with connect(agent) as own:
        own.sendall(hello)
        (welcome,) = channel.feed(own.recv(1 << 16))
        assert isinstance(welcome, Welcome)
        proof = channel.encode(Renewal(transfers=()))
        own.sendall(proof)
        (admission,) = channel.feed(own.recv(1 << 16))
        assert isinstance(admission, Admission)
        assert admission.metadata != b""
    with connect(agent) as thief:
        thief.sendall(hello)
        heard = thief.recv(1 << 16)
        thief.sendall(proof)  # Of another session: the producer's nonce is a new one.
        while more := thief.recv(1 << 16):
            heard += more
    assert b"welcome" in heard
    assert b"admission" not in heard
    assert admission.metadata not in heard
