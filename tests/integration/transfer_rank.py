"""A process with the agent and the KV of one engine rank, ordered about by lines of JSON; no test by itself.

What a prompt's KV is follows from a seed: a producer writes it, a consumer compares what came with it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from transfer.agent import Agent
from transfer.backends.base import Backend, Piece, ReadReport, Region
from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.digest import part_digest
from transfer.door import Identity
from transfer.errors import TransferError
from transfer.layout import GroupShape, HeadRange, KvDtype, KvLayout, LayerScales, RankLayout
from transfer.repack.numbers import bits_type, convert
from transfer.repack.reference import GroupMemory, NumpyRepacker
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.session.vocabulary import ChunkComputed, LoadAsked, Opened, Proof, Slot, TransferId, Unpack
from transfer.session.wire import rank_layout_from_wire
from transfer.settings import settings_from_mapping
from transfer.staging import HostStaging


def make_backend(kind: str) -> Backend:
    if kind == "nixl":
        from transfer.backends.nixl import NixlBackend

        return NixlBackend()
    from transfer.backends.tcp import TcpBackend

    return TcpBackend("127.0.0.1")


class DeadlyBackend:
    """The real one, but a process dies as soon as a read has begun."""

    def __init__(self, real: Backend) -> None:
        self._real = real
        self.victim = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def start(self, region: Region) -> None:
        self._real.start(region)

    def read(self, peer: str, pieces: Sequence[Piece], *, timeout_s: float) -> "Future[ReadReport]":
        reading = self._real.read(peer, pieces, timeout_s=timeout_s)
        if self.victim:
            victim, self.victim = self.victim, 0
            os.kill(victim, signal.SIGKILL)
        return reading


def numbers(seed: int, group: int, shape: GroupShape, token_count: int) -> "np.ndarray[Any, Any]":
    """[layer][token][head][key elements, value elements], of all heads of the model."""
    size = (shape.layer_count, token_count, shape.kv_heads, shape.row_elements)
    return np.random.default_rng([seed, group]).standard_normal(size, dtype=np.float32)


def as_stored(
    values: "np.ndarray[Any, Any]", key_dim: int, path: Sequence[tuple[KvDtype, LayerScales]]
) -> "np.ndarray[Any, Any]":
    """One layer's numbers as the last of some engines stores them that hand them on to each other."""
    halves = []
    for part, name in ((values[..., :key_dim], "key"), (values[..., key_dim:], "value")):
        bits = np.ascontiguousarray(part).view(bits_type(KvDtype.FLOAT32))
        dtype, scale = KvDtype.FLOAT32, 1.0
        for next_dtype, scales in path:
            next_scale = getattr(scales, name)
            bits = convert(bits, dtype, next_dtype, scale, next_scale)
            dtype, scale = next_dtype, next_scale
        halves.append(bits)
    return np.concatenate(halves, axis=-1)


class Rank:
    def __init__(self, order: dict[str, Any]) -> None:
        self.layout = rank_layout_from_wire(order["layout"])
        memory = tuple(
            self._group(shape, index, order["blocks"]) for index, shape in enumerate(self.layout.groups)
        )
        staging_bytes = order["settings"].get("staging_bytes", 4 << 20)
        given = {
            "listen_host": "127.0.0.1",
            "advertise_host": "127.0.0.1",
            "port": 0,
            "staging_bytes": staging_bytes,
        }
        settings = settings_from_mapping(given | order["settings"], {})
        self.memory = memory
        self.staging = HostStaging(staging_bytes)
        repacker = NumpyRepacker(self.layout, memory, self.staging.numpy())
        self.backend = DeadlyBackend(make_backend(order["kind"]))
        identity = Identity(order["engine"], order["epoch"])
        self.agent = Agent(settings, identity, self.staging, repacker, [self.backend])
        self.agent.start()
        self.free: list[str] = []
        self.reports: dict[str, Any] = {}

    def _group(self, shape: GroupShape, index: int, block_count: int) -> GroupMemory:
        layout, heads = self.layout.layout, self.layout.heads(index).count
        tensors = dense_tensors(layout, shape, heads, block_count)
        arrangement = arrangement_of(layout, shape, heads, tuple(tensor.strides for tensor in tensors))
        whole = [np.zeros(tensor.element_count, dtype=bits_type(layout.dtype)) for tensor in tensors]
        layers = tuple(
            tuple(flat[layer * tensor.layer_stride :] for flat, tensor in zip(whole, tensors, strict=True))
            for layer in range(shape.layer_count)
        )
        return GroupMemory(layers, arrangement)

    def tables(self, blocks: list[int]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(blocks) for _ in self.layout.groups)

    def fill(self, seed: int, token_count: int, blocks: list[int]) -> None:
        """Write a prompt's KV into blocks, as if it had been computed."""
        plain = KvLayout(1, dtype=KvDtype.FLOAT32, tensor_parallel=self.layout.layout.tensor_parallel)
        source = RankLayout(plain, self.layout.rank, self.layout.groups)
        for index, shape in enumerate(self.layout.groups):
            heads = self.layout.heads(index)
            values = numbers(seed, index, shape, token_count)[:, :, heads.first : heads.end]
            flat = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
            part = PartShape(Form.TOKENS, index, heads, TokenRange(0, token_count))
            order = Unpack(
                "", 0, part, source, 0, len(flat), part_digest(flat.data), self.tables(blocks), part.tokens
            )
            assert NumpyRepacker(self.layout, self.memory, flat).unpack(order)

    def is_right(self, order: dict[str, Any]) -> bool:
        """Whether blocks hold what such producers' KV of a prompt comes to here, from a token on."""
        first, count = order["first"], order["tokens"]
        tokens = TokenRange(first, count - first)
        for index, shape in enumerate(self.layout.groups):
            heads = self.layout.heads(index)
            part = PartShape(Form.TOKENS, index, heads, tokens)
            length = part_bytes(part, shape, self.layout.layout)
            packed = np.empty(length, dtype=np.uint8)
            repacker = NumpyRepacker(self.layout, self.memory, packed)
            repacker.pack((Slot(part, 0, length),), self.tables(order["blocks"]))
            found = packed.view(bits_type(self.layout.layout.dtype))
            due = self._expected(order, index, heads)[:, first:]
            if not np.array_equal(found.reshape(due.shape), due):
                return False
        return True

    def _expected(self, order: dict[str, Any], index: int, heads: HeadRange) -> "np.ndarray[Any, Any]":
        shape = self.layout.groups[index]
        values = numbers(order["seed"], index, shape, order["tokens"])[:, :, heads.first : heads.end]
        none = [LayerScales()] * shape.layer_count
        own = self.layout.scales[index] if self.layout.scales else none
        theirs = [LayerScales(*pair) for pair in order["scales"][index]] if order["scales"] else none
        kinds = KvDtype(order["dtype"]), self.layout.layout.dtype
        layers = [
            as_stored(layer, shape.key_dim, [(kinds[0], theirs[n]), (kinds[1], own[n])])
            for n, layer in enumerate(values)
        ]
        return np.stack(layers)

    def poll(self) -> None:
        outcomes = self.agent.poll()
        self.free += outcomes.free_blocks
        for report in outcomes.reports:
            assert report.request not in self.reports, "a load is reported once"
            failure = report.failure
            self.reports[report.request] = [
                failure.kind if failure else "",
                failure.detail if failure else "",
            ]

    def stats(self) -> dict[str, Any]:
        stats = self.agent.stats()
        return {name: getattr(stats, name) for name in stats.__slots__}

    def do(self, order: dict[str, Any]) -> Any:
        proof = Proof(bytes.fromhex(order.get("nonce", "")), bytes.fromhex(order.get("hash", "")))
        transfer = TransferId(order.get("transfer", ""))
        match order["do"]:
            case "fill":
                self.fill(order["seed"], order["tokens"], order["blocks"])
            case "ranks":
                self.agent.set_ranks(order["addresses"])
            case "open":
                self.agent.open(Opened(transfer, order["request"], proof, order["tokens"]))
            case "stage":
                tokens = TokenRange(order["first"], order["count"])
                tables = self.tables(order["blocks"])
                self.agent.stage(ChunkComputed(transfer, tokens, tables, order["is_last"]))
            case "abort":
                self.agent.abort(transfer)
            case "load":
                tokens = TokenRange(order["first"], order["tokens"] - order["first"])
                self.agent.load(
                    LoadAsked(
                        order["request"], transfer, proof, order["address"], order["epoch"],
                        self.tables(order["blocks"]), tokens, order["wait_s"],
                    )
                )  # fmt: skip
            case "cancel":
                self.agent.cancel(order["request"])
            case "poll":
                self.poll()
                return {"free": self.free, "reports": self.reports}
            case "is_right":
                return self.is_right(order)
            case "stats":
                return self.stats()
            case "probe":
                told = self.agent.probe(order["address"], order["timeout_s"]).result(order["timeout_s"] + 5)
                return {name: getattr(told, name) for name in told.__struct_fields__}
            case "kill_at_read":
                self.backend.victim = order["pid"] or os.getpid()
            case "usage":
                return {"fds": len(list(Path("/proc/self/fd").iterdir())), "cpu_s": time.process_time()}
            case "close":
                self.agent.close()
        return None


def main() -> None:
    rank: Rank | None = None
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any]
        try:
            if order["do"] == "start":
                rank = Rank(order)
                answer = {"ok": rank.agent.address}
            else:
                assert rank is not None
                answer = {"ok": rank.do(order)}
        except (TransferError, TimeoutError) as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        # Libraries write to the standard output too: an answer has a mark of its own.
        sys.stdout.write(f"ANSWER {json.dumps(answer)}\n")
        sys.stdout.flush()
    if rank is not None:
        rank.agent.close()


if __name__ == "__main__":
    main()
