"""Fleets to decide for: as many prefill as decode endpoints, idle or in the middle of work."""

import random
from collections import deque

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    Dispatch,
    ModelsReplaced,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.learned import LearnedSpeed
from pdcoord.core.ledger import Entry
from pdcoord.core.model import Model, Slo
from pdcoord.core.plan import Plan
from pdcoord.core.prefix import PrefixIndex
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

MODEL = ModelName("bench/llama-8b")
BUSY_REQUESTS_PER_ENDPOINT = 4

# Figures as in deploy/policies: an accelerator strong in compute and one strong in bandwidth.
_PREFILL_SPEED = SpeedFigures(0.010, 1.1e-4, 0.012)
_DECODE_SPEED = SpeedFigures(
    0.008, 2.5e-4, 0.012, step_s_per_context_token=2.5e-8, step_s_per_sequence=3.0e-5
)


def _pool(name: str, role: Role, speed: SpeedFigures, block_tokens: int) -> Pool:
    return Pool(
        name=PoolName(name),
        model=MODEL,
        role=role,
        vendor=name,
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(block_tokens)),
        speed=speed,
        kv_bytes_per_token=131_072,
        link_bytes_per_s=1.25e10,
        cost_per_hour=2.5,
    )


PREFILL = _pool("prefill", Role.PREFILL, _PREFILL_SPEED, 128)
DECODE = _pool("decode", Role.DECODE, _DECODE_SPEED, 64)


class BenchFleet:
    """A coordinator over `endpoint_count` endpoints, and the requests that it has in flight.

    Args:
        is_busy: whether it starts with BUSY_REQUESTS_PER_ENDPOINT requests per endpoint, each at some
            point of its life, and with requests of others in every sample.

    Attributes:
        speed: the coordinator's own.
        routed: an index that is told of each request beside the coordinator's own.
    """

    def __init__(self, endpoint_count: int, *, is_busy: bool, seed: int) -> None:
        self._rng = random.Random(seed)
        self.speed = LearnedSpeed()
        self.coordinator = Coordinator(self.speed)
        self.routed = PrefixIndex()
        self.model = Model(MODEL, (PREFILL, DECODE), slo=Slo(ttft_s=2.0, tpot_s=0.05))
        self.now_s = 0.0
        self._in_flight: deque[RequestId] = deque()
        self._begun: set[RequestId] = set()
        self.coordinator.handle(ModelsReplaced((self.model,)), self.now_s)
        self.endpoints = [
            Endpoint(EndpointId(f"{pool.name}/{index}"), pool, HostPort(f"{pool.name}-{index}.svc:8000"))
            for pool in (PREFILL, DECODE)
            for index in range(endpoint_count // 2)
        ]
        for endpoint in self.endpoints:
            self.coordinator.handle(EndpointSeen(endpoint), self.now_s)
        if is_busy:
            self._fill(endpoint_count * BUSY_REQUESTS_PER_ENDPOINT)
        self._sample(others_max=2 if is_busy else 0)

    def arrive(self, request: Request) -> Dispatch:
        """The event that is measured.

        Raises:
            RuntimeError: if the request was refused.
        """
        (action,) = self.coordinator.handle(RequestArrived(request), self.now_s)
        if isinstance(action, Refuse):
            message = f"the fleet refused a request: {action.refusal.message}"
            raise RuntimeError(message)  # noqa: TRY004 - of the fleet's state, not of a type
        self._in_flight.append(request.id)
        return action

    def record(self, plan: Plan, request: Request) -> None:
        """Note a prompt on both its endpoints, as the coordinator did."""
        for endpoint in (plan.decode, plan.prefill):
            state = self.coordinator.fleet.get(endpoint.id) if endpoint is not None else None
            if state is not None:
                bound = self.model.prefix_blocks_per_endpoint_max
                self.routed.record(state.ordinal, request.block_keys, bound)

    def move_on(self) -> None:
        """Time passes, one response begins and one request ends, so that the load stays what it is."""
        self.now_s += self._rng.uniform(0.0, 0.01)
        begins = next((name for name in self._in_flight if name not in self._begun), None)
        if begins is not None:
            self._begun.add(begins)
            self.coordinator.handle(ResponseBegan(begins, None), self.now_s)
        ends = self._in_flight.popleft()
        self._begun.discard(ends)
        self.coordinator.handle(RequestEnded(ends, Outcome.OK), self.now_s)

    def _fill(self, request_count: int) -> None:
        # Straight into the ledger: sizes that differ more than those that one policy would choose.
        workers = [endpoint.id for endpoint in self.endpoints if endpoint.pool is PREFILL]
        decodes = [endpoint.id for endpoint in self.endpoints if endpoint.pool is DECODE]
        for index in range(request_count):
            tokens = self._rng.randrange(200, 16_000)
            entry = Entry(
                request_id=RequestId(f"standing-{index}"),
                decode=self._rng.choice(decodes),
                worker=self._rng.choice(workers),
                prefill_us=round(PREFILL.speed.prefill_s(tokens) * 1e6),
                prompt_tokens=tokens,
                transfer_bytes=tokens * PREFILL.kv_bytes_per_token,
            )
            self.coordinator.ledger.begin(entry, self.now_s)
            if self._rng.random() < 0.8:
                self.coordinator.ledger.finish_prefill(entry.request_id, self.now_s)

    def _sample(self, others_max: int) -> None:
        for endpoint in self.endpoints:
            running = self.coordinator.ledger.load(endpoint.id).request_count
            running += self._rng.randint(0, others_max)
            self.coordinator.handle(SampleTaken(endpoint.id, Sample(running, 0, 0.4, 0.0)), self.now_s)
