"""Real KV of one emulated engine: bytes in its vendor's layout, handed over by the transfer package.

The model of the engine says when a prefill is done and when a fetch may begin; here its prompt's KV is
written into real pages, staged, fetched, unpacked and compared with what the decode engine would compute.
"""

import asyncio
import os
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdcoord.protocol.headers import parse_host_port
from pdcoord.sim.kvstore import KvStore, tables
from pdcoord.sim.messages import KvTicket
from pdcoord.sim.settings import EngineSettings
from transfer.agent import Agent
from transfer.backends.base import Backend
from transfer.backends.loopback import LoopbackBackend, LoopbackNetwork
from transfer.backends.tcp import TcpBackend
from transfer.canonical import TokenRange
from transfer.digest import prompt_hash
from transfer.door import Identity
from transfer.errors import Failure, SettingError
from transfer.repack.reference import NumpyRepacker
from transfer.session.vocabulary import (
    ChunkComputed,
    LoadAsked,
    Opened,
    Proof,
    Report,
    TransferId,
)
from transfer.settings import AgentSettings
from transfer.staging import HostStaging

STAGING_BYTES = 64 << 20
POLL_S = 0.000_5
"""Between two looks for what has ended, while something is awaited."""
REMEMBERED_MAX = 256


@dataclass(frozen=True, slots=True)
class Arrival:
    """KV that came, as it stands in the decode engine's blocks.

    Attributes:
        digest: of the loaded tokens' numbers, 32 hex digits; the same in every layout.
        is_right: whether it is the digest of what this engine would have computed.
        transport: what carried it.
    """

    token_count: int
    digest: str
    is_right: bool
    transport: str

    def __str__(self) -> str:
        word = "right" if self.is_right else "wrong"
        return f"{word} tokens={self.token_count} digest={self.digest} over={self.transport}"


def make_backend(name: str, host: str, network: LoopbackNetwork, advertise_host: str = "") -> Backend:
    """A backend by name.

    Args:
        advertise_host: what peers dial; host if empty.
        network: what engines of one process that use loopback have in common.

    Raises:
        SettingError: if there is none of that name, or its library is not installed.
    """
    if name == "tcp":
        return TcpBackend(host, advertise_host=advertise_host)
    if name == "loopback":
        return LoopbackBackend(network)
    if name == "nixl":
        # Not in every environment, and only asked for by name.
        from transfer.backends.nixl import NixlBackend  # noqa: PLC0415

        return NixlBackend()
    raise SettingError("kv_backend", name, "give nixl, tcp or loopback")


class KvBytes:
    """The memory and the transfer agent of one engine, for one life of it. Used in one event loop."""

    def __init__(
        self,
        settings: EngineSettings,
        engine_id: str,
        address: str,
        backend: Backend,
        *,
        advertise_host: str = "",
        key: bytes = b"",
    ) -> None:
        """Nothing listens yet.

        Args:
            address: `host:port` to listen at.
            advertise_host: what peers dial; that host if empty.
            key: of all side channels; empty: they have none.
        """
        host, port = parse_host_port(address)
        self._store = KvStore(settings.layout, settings.block_total, settings.model_seed)
        self._staging = HostStaging(STAGING_BYTES)
        agent_settings = AgentSettings(
            listen_host=host,
            advertise_host=advertise_host or host,
            port=port,
            key=key,
            backends=(backend.name,),
            staging_bytes=STAGING_BYTES,
            lease_s=settings.lease_s,
            transfer_timeout_s=min(5.0, settings.lease_s / 2),
        )
        self._transfer_s = agent_settings.transfer_timeout_s
        self._epoch = secrets.token_hex(8)
        self._backend = backend
        repacker = NumpyRepacker(self._store.layout, self._store.memory, self._staging.numpy())
        self._agent = Agent(
            agent_settings, Identity(engine_id, self._epoch), self._staging, repacker, [self._backend]
        )
        self._reports: dict[str, asyncio.Future[Report]] = {}
        self._starting: asyncio.Future[None] | None = None
        self._tickets: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.arrivals: OrderedDict[str, Arrival] = OrderedDict()
        self._wrong_count = 0

    async def start(self) -> None:
        """Listen.

        Raises:
            TransferError: if the address or the backend cannot be had.
        """
        self._starting = asyncio.get_running_loop().run_in_executor(None, self._agent.start)
        await asyncio.shield(self._starting)

    async def close(self) -> None:
        """Give everything back, also after a start that failed or that nobody waited for."""
        if self._starting is not None:
            await asyncio.wait([self._starting])
        await asyncio.to_thread(self._agent.close)
        self._staging.close()

    def state(self) -> dict[str, Any]:
        """Counts of this life, and what is held of the staging buffer now."""
        told = self._agent.stats()
        return {
            "transport": self._backend.name,
            "loads": told.loads,
            "load_failures": told.load_failures,
            "wrong": self._wrong_count,
            "offers": told.offers,
            "offer_failures": told.offer_failures,
            "staging_used_bytes": told.staging_used_bytes,
        }

    # The prefill side.

    def offer(
        self, request: str, asked: KvTicket | None, prompt: Sequence[int], blocks: Sequence[int]
    ) -> None:
        """Write a finished prompt's KV into its blocks and stage it.

        Args:
            asked: transfer and nonce that the leg brought; None to mint them.
        """
        self._store.write(prompt, blocks)
        transfer = TransferId(asked.transfer if asked is not None else secrets.token_hex(16))
        nonce = bytes.fromhex(asked.nonce) if asked is not None else os.urandom(16)
        proof = Proof(nonce, prompt_hash(prompt))
        self._agent.open(Opened(transfer, request, proof, len(prompt)))
        whole = TokenRange(0, len(prompt))
        self._agent.stage(ChunkComputed(transfer, whole, tables(blocks), is_last=True))
        self._tickets[request] = {
            "version": 1,
            "transfer": transfer,
            "nonce": nonce.hex(),
            "address": self._agent.address,
            "epoch": self._epoch,
        }
        if len(self._tickets) > REMEMBERED_MAX:
            self._tickets.popitem(last=False)

    def ticket(self, request: str) -> dict[str, Any] | None:
        """The member `pdcoord` of a prefill leg's answer."""
        return self._tickets.pop(request, None)

    # The decode side.

    async def fetch(
        self, request: str, ticket: KvTicket, prompt: Sequence[int], blocks: Sequence[int], first_token: int
    ) -> Failure | None:
        """Load a prompt's KV from a token on; cancelled, it returns only when nothing is written any more."""
        tokens = TokenRange(first_token, len(prompt) - first_token)
        proof = Proof(bytes.fromhex(ticket.nonce), prompt_hash(prompt))
        waiting: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self._reports[request] = waiting
        self._agent.load(
            LoadAsked(
                request=request,
                transfer=TransferId(ticket.transfer),
                proof=proof,
                address=ticket.address,
                epoch=ticket.epoch,
                tables=tables(blocks),
                tokens=tokens,
                wait_s=self._transfer_s,
            )
        )
        try:
            report = await self._report(waiting)
        except asyncio.CancelledError:
            self._agent.cancel(request)
            await self._report(waiting)
            raise
        finally:
            del self._reports[request]
        if report.failure is None:
            self._note(request, prompt, blocks, tokens)
        return report.failure

    async def _report(self, waiting: "asyncio.Future[Report]") -> Report:
        """Look until a report is there; the agent bounds every load in time."""
        while not waiting.done():
            outcomes = self._agent.poll()
            for report in outcomes.reports:
                found = self._reports.get(report.request)
                if found is not None and not found.done():
                    found.set_result(report)
            if not waiting.done():
                await asyncio.sleep(POLL_S)
        return waiting.result()

    def _note(self, request: str, prompt: Sequence[int], blocks: Sequence[int], tokens: TokenRange) -> None:
        digest = self._store.digest(tokens, blocks)
        is_right = digest == self._store.expected(prompt, tokens)
        self._wrong_count += not is_right
        self.arrivals[request] = Arrival(tokens.count, digest, is_right, self._backend.name)
        if len(self.arrivals) > REMEMBERED_MAX:
            self.arrivals.popitem(last=False)
