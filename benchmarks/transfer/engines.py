"""One side of a measured pair: an agent over made-up KV of some layout, and a buffer for bare NIXL."""

import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nixl._api import nixl_agent, nixl_agent_config

from transfer.agent import Agent
from transfer.backends.base import Backend
from transfer.backends.nixl import NixlBackend
from transfer.backends.tcp import TcpBackend
from transfer.canonical import TokenRange
from transfer.door import Identity
from transfer.layout import GroupShape, KvLayout, RankLayout
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.repack.torch_memory import TorchGroup
from transfer.repack.torch_repacker import TorchRepacker
from transfer.session.vocabulary import (
    ChunkComputed,
    LoadAsked,
    Opened,
    Proof,
    Report,
    Tables,
    TransferId,
)
from transfer.settings import AgentSettings
from transfer.staging import HostStaging

HOST = "127.0.0.1"
SHAPE = GroupShape(layer_count=8, kv_heads=8, key_dim=128, value_dim=128)
"""A quarter of an 8B model's layers: 32 KiB a token in bfloat16."""
WAIT_S_MAX = 60.0
_ELEMENTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Hand:
    """What a consumer must know of staged KV."""

    transfer: str
    nonce: str
    address: str
    token_count: int

    @property
    def proof(self) -> Proof:
        return Proof(bytes.fromhex(self.nonce), b"\0" * 16)


def make_backend(name: str) -> Backend:
    return NixlBackend() if name == "nixl" else TcpBackend(HOST)


class Side:
    """One engine's agent, with a pool that holds one prompt in scattered blocks."""

    def __init__(self, layout: KvLayout, backend: str, token_count: int, staging_bytes: int) -> None:
        self.layout = RankLayout(layout, 0, (SHAPE,))
        block_count = -(-token_count // layout.block_tokens)
        order = torch.randperm(block_count, generator=torch.Generator().manual_seed(0)) + 1
        self.tables: Tables = (tuple(order.tolist()),)
        tensors = dense_tensors(layout, SHAPE, SHAPE.kv_heads, block_count + 1)
        kind = _ELEMENTS[layout.dtype.item_bytes]
        # Written once, so that no page is touched for the first time while it is measured.
        flats = [torch.ones(tensor.element_count, dtype=kind) for tensor in tensors]
        layers = tuple(
            tuple(flat[layer * t.layer_stride :] for flat, t in zip(flats, tensors, strict=True))
            for layer in range(SHAPE.layer_count)
        )
        arrangement = arrangement_of(layout, SHAPE, SHAPE.kv_heads, tuple(t.strides for t in tensors))
        self.staging = HostStaging(staging_bytes)
        self.staging.numpy()[:] = 1
        settings = AgentSettings(
            listen_host=HOST,
            advertise_host=HOST,
            port=0,
            backends=(backend,),
            staging_bytes=staging_bytes,
            repack_threads=2,
            chunk_tokens_max=512,
            transfer_timeout_s=WAIT_S_MAX,
            lease_s=2 * WAIT_S_MAX,
        )
        repacker = TorchRepacker(self.layout, [TorchGroup(arrangement, layers)], self.staging.tensor())
        identity = Identity(secrets.token_hex(8), secrets.token_hex(8))
        self.agent = Agent(settings, identity, self.staging, repacker, [make_backend(backend)])
        self.agent.start()

    def open(self, token_count: int) -> Hand:
        transfer, nonce = secrets.token_hex(16), secrets.token_hex(16)
        hand = Hand(transfer, nonce, self.agent.address, token_count)
        self.agent.open(Opened(TransferId(transfer), transfer, hand.proof, token_count))
        return hand

    def stage(self, hand: Hand) -> float:
        """Stage a whole prompt and wait until its blocks are free; seconds."""
        began_s = time.perf_counter()
        whole = TokenRange(0, hand.token_count)
        self.agent.stage(ChunkComputed(TransferId(hand.transfer), whole, self.tables, is_last=True))
        _wait(lambda: hand.transfer in self.agent.poll().free_blocks)
        return time.perf_counter() - began_s

    def load(self, hand: Hand) -> None:
        self.agent.load(
            LoadAsked(
                request=hand.transfer,
                transfer=TransferId(hand.transfer),
                proof=hand.proof,
                address=hand.address,
                epoch="",
                tables=self.tables,
                tokens=TokenRange(0, hand.token_count),
                wait_s=WAIT_S_MAX,
            )
        )

    def loaded(self) -> Report:
        """Wait for the end of a load.

        Raises:
            RuntimeError: if it failed.
        """
        found: list[Report] = []

        def look() -> bool:
            found.extend(self.agent.poll().reports)
            return bool(found)

        _wait(look)
        if found[0].failure is not None:
            raise RuntimeError(f"the load failed: {found[0].failure}")
        return found[0]

    def close(self) -> None:
        self.agent.close()


def _wait(is_done: Any) -> None:
    deadline_s = time.perf_counter() + WAIT_S_MAX
    while not is_done():
        if time.perf_counter() > deadline_s:
            raise RuntimeError(f"nothing came in {WAIT_S_MAX:g} s")
        time.sleep(0.000_2)


class BareNixl:
    """NIXL by its own Python API, with one buffer: what the backend is measured against.

    Without NIXL's progress thread, which its Python binding lets spin: it would take a core from all that is
    measured. The owner makes progress once a millisecond instead; reads on one host need it only to connect.
    """

    def __init__(self, name: str, length_bytes: int) -> None:
        self.name = name
        self.buffer = np.ones(length_bytes, dtype=np.uint8)
        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._rows = [(self.buffer.ctypes.data, length_bytes, 0, "")]
        self._registered = self.agent.register_memory(self._rows, "DRAM")

    def told(self) -> tuple[bytes, int]:
        threading.Thread(target=self._progress, daemon=True).start()
        return self.agent.get_agent_metadata(), self.buffer.ctypes.data

    def _progress(self) -> None:
        while True:
            self.agent.get_new_notifs()
            time.sleep(0.001)

    def read(self, metadata: bytes, address: int, length_bytes: int) -> float:
        """Seconds of one READ, in one descriptor; the peer is added if it is new."""
        peer = self.agent.add_remote_agent(metadata)
        peer = peer.decode() if isinstance(peer, bytes) else peer
        mine = self.agent.get_xfer_descs([(self.buffer.ctypes.data, length_bytes, 0)], "DRAM")
        theirs = self.agent.get_xfer_descs([(address, length_bytes, 0)], "DRAM")
        began_s = time.perf_counter()
        handle = self.agent.initialize_xfer("READ", mine, theirs, peer)
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        took_s = time.perf_counter() - began_s
        if state != "DONE":
            raise RuntimeError(f"a bare NIXL read ended as {state}")
        self.agent.release_xfer_handle(handle)
        return took_s
