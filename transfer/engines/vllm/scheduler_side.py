"""The scheduler's half of the vLLM connector: which requests hand KV over, which fetch it, and when.

Plain data in and out, no vLLM: `transfer.engines.vllm.connector` translates. One thread, the engine's own.

A prefill request is minted or claimed when it arrives, opened when it is first scheduled, staged chunk by
chunk as the scheduler plans them, and held after its end until the workers' packs are over. A decode request
is armed when it arrives, loads once blocks are allocated for it, and is forgotten when the load has ended;
whatever is wrong with its ticket, it is served without a transfer, and counted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transfer.canonical import TokenRange
from transfer.digest import prompt_hash
from transfer.engines.vllm.metadata import Settle, StepOrders
from transfer.engines.vllm.ticket import (
    NONCE_BYTES,
    Ask,
    Producer,
    Ticket,
    TicketError,
    parse_ask,
    parse_ticket,
    ticket,
)
from transfer.errors import FailureKind
from transfer.session.vocabulary import ChunkComputed, LoadAsked, Opened, Proof, Tables, TransferId


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it came to the engine.

    Attributes:
        params: its `kv_transfer_params`.
        tokens: of the prompt; None where it is not token ids alone, which is never transferred.
        extra: what else makes the KV of the same tokens differ: the LoRA adapter, images.
    """

    request: str
    params: Any
    tokens: Sequence[int] | None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's part in one step: its tokens before `computed_end` are computed when the step is done."""

    request: str
    computed_end: int


@dataclass(slots=True)
class _HandOver:
    """A prefill request's life."""

    request: str
    ask: Ask
    opened: Opened
    is_foreign: bool
    is_open: bool = False
    staged: int = 0
    is_over: bool = False

    @property
    def is_staged(self) -> bool:
        return self.staged == self.opened.token_count


@dataclass(slots=True)
class _Fetch:
    """A decode request's life, until its KV has come."""

    ticket: Ticket
    proof: Proof
    token_count: int
    is_loading: bool = False


class SchedulerSide:
    """Keeps the ledger of requests; every method is called by the scheduler's hook of the like name.

    Args:
        tensor_parallel: ranks of this engine, for the ticket.
        wait_s: longest time that a load may take.
        is_consumer: whether the engine may load. vLLM defers the reuse of blocks that a step in flight may
            still write only where its role consumes, so that a load elsewhere could be overwritten.
        prefill_wait_s: how much longer it may take if its prompt may not be computed yet.
        has_windows: some group gives blocks back while a request runs.
        mint: as os.urandom.
    """

    def __init__(
        self,
        engine_id: str,
        tensor_parallel: int,
        wait_s: float,
        *,
        is_consumer: bool,
        prefill_wait_s: float,
        has_windows: bool,
        mint: Callable[[int], bytes],
    ) -> None:
        self._engine_id = engine_id
        self._tensor_parallel = tensor_parallel
        self._wait_s = wait_s
        self._prefill_wait_s = prefill_wait_s
        self._is_consumer = is_consumer
        self._has_windows = has_windows
        self._mint = mint
        self._producer: Producer | None = None
        self._hand_overs: dict[str, _HandOver] = {}
        self._fetches: dict[str, _Fetch] = {}
        self._handing: set[TransferId] = set()
        self._fetching: set[TransferId] = set()
        self._next = _Next()
        self._failures: Counter[str] = Counter()

    def set_producer(self, address: str, epoch: str) -> None:
        """Tell where the workers' rank 0 listens; before the first request."""
        self._producer = Producer(self._engine_id, address, epoch, self._tensor_parallel)

    def arrived(self, arrival: Arrival) -> None:
        """A new request; it is taken note of only if it hands over or fetches."""
        try:
            ask = parse_ask(arrival.params)
            found = None if ask is not None else parse_ticket(arrival.params)
        except TicketError:
            self._failures[FailureKind.MALFORMED] += 1
            return
        if not arrival.tokens or arrival.request in self._hand_overs or arrival.request in self._fetches:
            return
        if ask is not None:
            self._arrived_prefill(arrival, ask, len(arrival.tokens))
        elif found is not None and not self._is_consumer:
            self._failures[FailureKind.NOT_A_CONSUMER] += 1
        elif found is not None:
            self._arrived_decode(arrival, found, len(arrival.tokens))

    def _arrived_prefill(self, arrival: Arrival, ask: Ask, token_count: int) -> None:
        is_foreign = ask.transfer is not None
        if ask.transfer is None or ask.nonce is None:
            ask = Ask(TransferId(self._mint(16).hex()), self._mint(NONCE_BYTES))
        transfer, nonce = ask.transfer, ask.nonce
        # One of several choices of a request carries the same transfer as the others.
        if transfer is None or nonce is None or transfer in self._handing:
            return
        self._handing.add(transfer)
        proof = Proof(nonce, prompt_hash(arrival.tokens or (), arrival.extra))
        opened = Opened(transfer, arrival.request, proof, token_count)
        self._hand_overs[arrival.request] = _HandOver(arrival.request, ask, opened, is_foreign)

    def _arrived_decode(self, arrival: Arrival, found: Ticket, token_count: int) -> None:
        if found.token_count is not None and found.token_count != token_count:
            self._failures[FailureKind.WRONG_PROMPT] += 1
            return
        if found.transfer in self._fetching:
            return
        self._fetching.add(found.transfer)
        proof = Proof(found.nonce, prompt_hash(arrival.tokens or (), arrival.extra))
        self._fetches[arrival.request] = _Fetch(found, proof, token_count)

    def matched_tokens(self, request: str, computed: int) -> int:
        """How many tokens of the prompt past `computed` would be loaded; asking changes nothing."""
        fetch = self._fetches.get(request)
        if fetch is None or fetch.is_loading:
            return 0
        return max(fetch.token_count - computed, 0)

    def allocated(self, request: str, tables: Callable[[], Tables], external: int) -> None:
        """Blocks are allocated, of which the last `external` tokens of the prompt are to be loaded."""
        fetch = self._fetches.get(request)
        if fetch is None or fetch.is_loading:
            return
        if external <= 0:
            self._release(request, fetch)
            return
        fetch.is_loading = True
        first = fetch.token_count - external
        self._next.loads.append(self._load(request, fetch, tables(), TokenRange(first, external)))

    def is_staging(self, request: str) -> bool:
        """Whether `step` must be told when this request is scheduled."""
        found = self._hand_overs.get(request)
        return found is not None and not found.is_over and not found.is_staged

    def step(
        self, scheduled: Iterable[Scheduled], preempted: Iterable[str], tables: Callable[[str], Tables]
    ) -> StepOrders:
        """This step's orders; what was gathered since the last step goes with them."""
        orders, self._next = self._next, _Next()
        for request in self._unsettled(preempted):
            hand_over = self._hand_overs[request]
            orders.settle.append(Settle(request, hand_over.opened.transfer))
        for part in scheduled:
            if self.is_staging(part.request):
                self._stage(orders, self._hand_overs[part.request], part.computed_end, tables)
        return orders.frozen()

    def _unsettled(self, preempted: Iterable[str]) -> list[str]:
        if self._has_windows:
            return [request for request, found in self._hand_overs.items() if found.staged]
        return [r for r in preempted if r in self._hand_overs and self._hand_overs[r].staged]

    @staticmethod
    def _stage(orders: "_Next", found: _HandOver, computed_end: int, tables: Callable[[str], Tables]) -> None:
        if not found.is_open:
            found.is_open = True
            orders.opened.append(found.opened)
        end = min(computed_end, found.opened.token_count)
        if end <= found.staged:
            # Resumed after a preemption: what was staged before is computed anew, and stays staged.
            return
        tokens = TokenRange(found.staged, end - found.staged)
        found.staged = end
        orders.chunks.append(
            ChunkComputed(found.opened.transfer, tokens, tables(found.request), found.is_staged)
        )

    def finished(
        self, request: str, tables: tuple[list[int], ...], *, is_served: bool
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request is over.

        Args:
            is_served: it came to its own end; nobody aborted it, and it did not fail.

        Returns:
            Whether its blocks must be held until `finished_sending` names it, and the ticket of its answer.
        """
        fetch = self._fetches.pop(request, None)
        if fetch is not None:
            self._fetching.discard(fetch.ticket.transfer)
            if fetch.is_loading:
                # The scheduler holds the blocks by itself until the load is reported.
                self._next.cancelled.append(request)
            else:
                self._release(request, fetch)
            return False, None
        found = self._hand_overs.get(request)
        return (False, None) if found is None else self._finished_prefill(found, tables, is_served=is_served)

    def _finished_prefill(
        self, found: _HandOver, tables: tuple[list[int], ...], *, is_served: bool
    ) -> tuple[bool, dict[str, Any] | None]:
        found.is_over = True
        is_handed = is_served and found.is_staged
        if not found.is_open:
            if found.is_foreign:
                self._next.stillborn.append(found.opened)
            self._forget_hand_over(found)
            return False, None
        # The consumer of a transfer that a sidecar minted may be reading by now; all it needs is staged.
        if not is_handed and not (found.is_foreign and found.is_staged):
            self._next.aborted.append(found.opened.transfer)
        self._next.held.append(found.request)
        if not is_handed or self._producer is None:
            return True, None
        return True, ticket(self._producer, found.request, tables, found.opened.token_count, found.ask)

    def sent(self, requests: Iterable[str]) -> None:
        """All workers have reported `finished_sending`."""
        for request in requests:
            found = self._hand_overs.get(request)
            if found is not None:
                self._forget_hand_over(found)

    def received(self, requests: Iterable[str]) -> None:
        """All workers have reported `finished_recving`, well or not."""
        for request in requests:
            fetch = self._fetches.get(request)
            if fetch is not None and fetch.is_loading:
                self._forget_fetch(request, fetch)

    def take_failures(self) -> dict[str, int]:
        """Requests since the last call that are served without a transfer, by FailureKind."""
        taken, self._failures = dict(self._failures), Counter()
        return taken

    def _release(self, request: str, fetch: _Fetch) -> None:
        """Nothing is missing here, or nobody wants it any more: let the producer forget it."""
        nothing = TokenRange(fetch.token_count, 0)
        self._next.loads.append(self._load(request, fetch, (), nothing))
        self._forget_fetch(request, fetch)

    def _load(self, request: str, fetch: _Fetch, tables: Tables, tokens: TokenRange) -> LoadAsked:
        # A ticket tells the epoch; without one both legs were sent at once.
        wait_s = self._wait_s + (0.0 if fetch.ticket.epoch else self._prefill_wait_s)
        return LoadAsked(
            request=request,
            transfer=fetch.ticket.transfer,
            proof=fetch.proof,
            address=fetch.ticket.address,
            epoch=fetch.ticket.epoch,
            tables=tables,
            tokens=tokens,
            wait_s=wait_s,
        )

    def _forget_fetch(self, request: str, fetch: _Fetch) -> None:
        self._fetches.pop(request, None)
        self._fetching.discard(fetch.ticket.transfer)

    def _forget_hand_over(self, found: _HandOver) -> None:
        self._hand_overs.pop(found.request, None)
        self._handing.discard(found.opened.transfer)


class _Next:
    """StepOrders in the making."""

    def __init__(self) -> None:
        self.settle: list[Settle] = []
        self.opened: list[Opened] = []
        self.chunks: list[ChunkComputed] = []
        self.aborted: list[TransferId] = []
        self.stillborn: list[Opened] = []
        self.held: list[str] = []
        self.loads: list[LoadAsked] = []
        self.cancelled: list[str] = []

    def frozen(self) -> StepOrders:
        return StepOrders(
            settle=tuple(self.settle),
            opened=tuple(self.opened),
            chunks=tuple(self.chunks),
            aborted=tuple(self.aborted),
            stillborn=tuple(self.stillborn),
            held=tuple(self.held),
            loads=tuple(self.loads),
            cancelled=tuple(self.cancelled),
        )
