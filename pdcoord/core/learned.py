"""Speed as it is learned from what was seen, with the policy's figures to begin with."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from pdcoord.core.costs import PathFigures, SpeedFigures
from pdcoord.core.estimators import LinearTime, Mean, MedianTime, RobustScale, Row, Slowness
from pdcoord.core.fleet import Endpoint, EndpointId, ModelName, Pool, PoolName
from pdcoord.core.observations import (
    Observation,
    ObservationKind,
    OutputSeen,
    PrefillSeen,
    StepsSeen,
    TransferSeen,
    is_sane,
    kind_of,
)
from pdcoord.core.speed import PATH_LATENCY_S

UNLIKE_FROM = math.log(1.25)
UNLIKE_UNTIL = math.log(1.12)
"""An endpoint counts as unlike its pool from a quarter slower or faster, until it is within an eighth."""
UNLIKE_SEEN_MIN = 3

POOLS_MAX = 1_024
PATHS_MAX = 4_096
MODELS_MAX = 1_024
TENANTS_MAX = 4_096

DOUBTFUL_WEIGHT = 0.3
"""What a prefill beside others is worth beside one alone: part of its time is a guess."""
STEPS_FULL = 16
"""Decode steps that make an answer worth a full observation; one of few steps says little."""

_PREFILL_REFERENCE = (1.0, 4_096.0, 4_096.0**2)
_STEP_REFERENCE = (1.0, 16_384.0, 16.0)
_EARLY_COUNT = 20
_EARLY_REFITS = (5, 10, 20)
_REFIT_ROUNDS = 3
_CENTRE_EVERY = 16
_CENTRE_EVERY_PER_ENDPOINT = 4
_FADE_SHARE = 0.95
_CENTRE_LEFT = 0.07
"""What endpoints may have in common, logarithmic: so much is noise, and the pool's line follows it."""
_LATENCY_S_MAX = 0.25
_MODEL_MEMORY = 256
_TENANT_MEMORY = 64
_MODEL_COUNT_MIN = 8
_TENANT_PRIOR_COUNT = 5
"""Answers of a tenant that weigh as much as what is known of the model."""


class LearnedSpeed:
    """A SpeedModel that learns.

    Per pool the coefficients of its prefills and of its steps; per endpoint how many times slower than its
    pool it is; per pair of pools the latency; per model and tenant how long answers are. Below
    UNLIKE_FROM an endpoint's own slowness is followed but not used, so that its pool's are alike.
    """

    def __init__(self) -> None:
        self._pools: OrderedDict[tuple[ModelName, PoolName, SpeedFigures], _PoolSpeed] = OrderedDict()
        # A pool's hash is that of all its fields: too slow for every prediction. The pool is kept with
        # what is known of it, so that its id is not another's.
        self._found: dict[int, tuple[Pool, _PoolSpeed]] = {}
        self._paths: OrderedDict[tuple[ModelName, PoolName, PoolName], _PathTime] = OrderedDict()
        self._model_outputs: OrderedDict[ModelName, Mean] = OrderedDict()
        self._tenant_outputs: OrderedDict[tuple[ModelName, str], Mean] = OrderedDict()
        self._unlike: set[EndpointId] = set()
        self._left_out: Counter[ObservationKind] = Counter()

    @property
    def unlike(self) -> Collection[EndpointId]:
        return self._unlike

    @property
    def left_out(self) -> Mapping[ObservationKind, int]:
        return self._left_out

    def prefill_s(self, endpoint: Endpoint, uncached_tokens: int) -> float:
        pool = self._pool(endpoint.pool)
        time_s = pool.figures.prefill_s(uncached_tokens)
        if pool.unlike:
            time_s *= pool.unlike.get(endpoint.id, _ALIKE)[0]
        return time_s

    def prefill_spread_s(self, endpoint: Endpoint, uncached_tokens: int) -> float:
        return self.prefill_s(endpoint, uncached_tokens) * self._pool(endpoint.pool).prefill.scale.spread

    def step_s(self, endpoint: Endpoint, batch: int, context_tokens: int) -> float:
        found = self._found.get(id(endpoint.pool))
        pool = found[1] if found is not None else self._find(endpoint.pool)
        time_s = pool.figures.step_s(batch, context_tokens)
        if pool.unlike:
            time_s *= pool.unlike.get(endpoint.id, _ALIKE)[1]
        return time_s

    def path(self, prefill: Endpoint, decode: Endpoint) -> PathFigures:
        """The slower of the two links; unknown (0.0) if either is. Only the latency is learned here.

        A path that carries less than its links is told apart by `PathTable`, where it is tried again after
        a while; were the way between two pools found too slow as a whole, nothing would show its recovery.
        """
        bandwidth = min(prefill.pool.link_bytes_per_s, decode.pool.link_bytes_per_s)
        known = self._paths.get(_pair(prefill, decode))
        if known is None:
            return PathFigures(PATH_LATENCY_S, bandwidth)
        figures = known.figures
        if figures is None or figures.bandwidth_bytes_per_s != bandwidth:
            figures = known.figures = PathFigures(known.latency.time_s, bandwidth, known.scale.spread)
        return figures

    def output_tokens(self, model: ModelName, tenant: str) -> float | None:
        of_model = self._model_outputs.get(model)
        if of_model is None or of_model.count < _MODEL_COUNT_MIN:
            return None
        of_tenant = self._tenant_outputs.get((model, tenant))
        if of_tenant is None:
            return of_model.value
        weight = of_tenant.count / (of_tenant.count + _TENANT_PRIOR_COUNT)
        return of_model.value + weight * (of_tenant.value - of_model.value)

    def pace(self, seen: StepsSeen) -> float | None:
        pool = self._pool(seen.endpoint.pool)
        if not is_sane(seen) or pool.step.count <= _EARLY_COUNT:
            return None  # The policy's figures may be far from true of every endpoint.
        usual_s = pool.step.line.time_s((1.0, seen.context_tokens, seen.batch)) * seen.step_count
        return seen.took_s / usual_s if usual_s > 0.0 else None

    def learn(self, observation: Observation) -> None:
        if not is_sane(observation):
            self._left_out[kind_of(observation)] += 1
            return
        match observation:
            case PrefillSeen(endpoint, uncached, took_s, is_alone):
                weight = 1.0 if is_alone else DOUBTFUL_WEIGHT
                row = (1.0, float(uncached), float(uncached) ** 2)
                self._learn_time(endpoint, row, took_s, weight, is_prefill=True)
            case StepsSeen(endpoint, step_count, took_s, batch, context_tokens):
                row = (1.0, context_tokens, batch)
                weight = min(1.0, step_count / STEPS_FULL)
                self._learn_time(endpoint, row, took_s / step_count, weight, is_prefill=False)
            case TransferSeen():
                self._learn_transfer(observation)
            case OutputSeen():
                self._learn_output(observation)

    def forget(self, endpoint_id: EndpointId) -> None:
        for pool in self._pools.values():
            pool.forget(endpoint_id)
        self._unlike.discard(endpoint_id)

    def validate(self) -> None:
        """Assert that everything kept is finite, bounded and of one mind."""
        assert len(self._pools) <= POOLS_MAX, "too many pools"
        assert len(self._paths) <= PATHS_MAX, "too many pairs of pools"
        assert len(self._model_outputs) <= MODELS_MAX, "too many models"
        assert len(self._tenant_outputs) <= TENANTS_MAX, "too many tenants"
        assert self._unlike == {name for pool in self._pools.values() for name in pool.unlike}, "unlike"
        for pool in self._pools.values():
            figures = (*pool.prefill.line.coefficients, *pool.step.line.coefficients)
            assert all(math.isfinite(x) and x >= 0.0 for x in figures), f"a bad coefficient: {figures}"

    def _pool(self, pool: Pool) -> "_PoolSpeed":
        found = self._found.get(id(pool))
        return found[1] if found is not None else self._find(pool)

    def _find(self, pool: Pool) -> "_PoolSpeed":
        """What is known of a pool; a policy that changes its figures starts anew from these."""
        key = (pool.model, pool.name, pool.speed)
        known = self._pools.get(key)
        if known is None:
            known = self._pools[key] = _PoolSpeed(pool.speed)
            if len(self._pools) > POOLS_MAX:
                self._pools.popitem(last=False)
                self._found.clear()
                self._unlike = {name for each in self._pools.values() for name in each.unlike}
        self._pools.move_to_end(key)
        if len(self._found) >= POOLS_MAX:
            self._found.clear()
        self._found[id(pool)] = pool, known
        return known

    def _learn_time(
        self, endpoint: Endpoint, row: Row, took_s: float, weight: float, *, is_prefill: bool
    ) -> None:
        pool = self._pool(endpoint.pool)
        before = set(pool.unlike)
        pool.learn(endpoint.id, row, took_s, weight, is_prefill=is_prefill)
        if before != pool.unlike.keys():
            self._unlike = {name for each in self._pools.values() for name in each.unlike}

    def _learn_transfer(self, seen: TransferSeen) -> None:
        bandwidth = min(seen.prefill.pool.link_bytes_per_s, seen.decode.pool.link_bytes_per_s)
        if bandwidth <= 0.0:
            self._left_out[ObservationKind.TRANSFER] += 1
            return
        moved_s = (seen.transfer_bytes + seen.bytes_ahead) / bandwidth
        path = _used(self._paths, _pair(seen.prefill, seen.decode), _PathTime, PATHS_MAX)
        path.scale.learn(math.log(seen.took_s / (path.latency.time_s + moved_s)), 1.0)
        path.latency.learn(seen.took_s - moved_s)
        path.figures = None

    def _learn_output(self, seen: OutputSeen) -> None:
        tokens = float(seen.output_tokens)
        _used(self._model_outputs, seen.model, _model_mean, MODELS_MAX).learn(tokens)
        if seen.tenant:
            key = (seen.model, seen.tenant)
            _used(self._tenant_outputs, key, _tenant_mean, TENANTS_MAX).learn(tokens)


class _PathTime:
    """The way between two pools.

    Attributes:
        figures: made of the rest for whoever asked last; None since something was learned.
    """

    def __init__(self) -> None:
        self.figures: PathFigures | None = None
        self.latency = MedianTime(PATH_LATENCY_S, PATH_LATENCY_S / 2.0, _LATENCY_S_MAX)
        self.scale = RobustScale()


class _Phase:
    """One kind of work in one pool: its coefficients, and each endpoint's slowness at it."""

    def __init__(self, seed: Row, reference: Row) -> None:
        self.line = LinearTime(seed, reference)
        self.scale = RobustScale()
        self.slowness: dict[EndpointId, Slowness] = {}
        self._seed, self._reference = seed, reference
        self._early: list[tuple[Row, float, float]] = []
        self._heard: set[EndpointId] = set()
        self._count = 0
        self._centred_count = 0

    @property
    def count(self) -> int:
        """Times that were taken in."""
        return self._count

    def learn(self, endpoint_id: EndpointId, row: Row, took_s: float, weight: float) -> bool:
        """Take in one time; whether endpoints other than this one may have changed beside their pool."""
        self._count += 1
        self._heard.add(endpoint_id)
        own = self.slowness.get(endpoint_id)
        if own is None:
            own = self.slowness[endpoint_id] = Slowness()
        residual = math.log(took_s / self.line.time_s(row)) - own.log_factor
        teaches = own.learn(residual, self.scale.limit, weight)
        if teaches or self._count <= _EARLY_COUNT:
            # A pool of which little is known is more likely to be wrong than its endpoint to be odd.
            self.line.learn(row, self.scale.clip(residual), weight)
        if teaches or not own.is_changing or self._count <= _EARLY_COUNT:
            self.scale.learn(residual, weight)
        if self._count <= _EARLY_COUNT:
            self._early.append((row, took_s, weight))
            if self._count in _EARLY_REFITS:
                self._refit()
                return True
        every = max(_CENTRE_EVERY, _CENTRE_EVERY_PER_ENDPOINT * len(self.slowness))
        if self._count < self._centred_count + every:
            return False
        self._centre()
        return True

    def _refit(self) -> None:
        """Fit the first observations together, so that it is no matter which of them came first.

        One by one, an outlier among the very first would look like a wrong seed. Of a seed that is wrong as a
        whole its shape is kept, at the level that was seen.
        """
        seeded = LinearTime(self._seed, self._reference)
        ratios = sorted(took_s / seeded.time_s(row) for row, took_s, _ in self._early)
        level = ratios[len(ratios) // 2]
        start = tuple(coefficient * level for coefficient in self._seed)
        for _ in range(_REFIT_ROUNDS):
            residuals = [math.log(took_s / self.line.time_s(row)) for row, took_s, _ in self._early]
            self.scale.restart(residuals)
            line = LinearTime((start[0], start[1], start[2]), self._reference)
            for (row, _, weight), residual in zip(self._early, residuals, strict=True):
                seen_s = self.line.time_s(row) * math.exp(self.scale.clip(residual))
                line.learn(row, math.log(seen_s / line.time_s(row)), weight)
            self.line = line
        for own in self.slowness.values():
            own.restart()
        if self._count == _EARLY_COUNT:
            self._early.clear()

    def factor(self, endpoint_id: EndpointId) -> float:
        own = self.slowness.get(endpoint_id)
        return 0.0 if own is None or own.seen_count < UNLIKE_SEEN_MIN else own.log_factor

    def forget(self, endpoint_id: EndpointId) -> None:
        self.slowness.pop(endpoint_id, None)
        self._heard.discard(endpoint_id)

    def _centre(self) -> None:
        """Give the pool what is common to its endpoints, and those not heard of back to the pool.

        An endpoint that was slow gets little work, so nothing else would tell that it has recovered.
        """
        self._centred_count = self._count
        for endpoint_id in self.slowness.keys() - self._heard:
            self.slowness[endpoint_id].fade(_FADE_SHARE)
        self._heard.clear()
        factors = sorted(s.log_factor for s in self.slowness.values() if s.seen_count >= UNLIKE_SEEN_MIN)
        if not factors:
            return
        # The median; of two middle ones that which changes less, so that one of two endpoints is the odd one.
        middle = min(factors[(len(factors) - 1) // 2], factors[len(factors) // 2], key=abs)
        common = math.copysign(max(0.0, abs(middle) - _CENTRE_LEFT), middle)
        if common:
            self.line.scale_by(math.exp(common))
            for own in self.slowness.values():
                own.shift(common)


class _PoolSpeed:
    """What is known of one pool.

    Attributes:
        figures: the pool's, as learned so far.
        unlike: factors of prefill and step times, of the endpoints that are unlike the pool.
    """

    def __init__(self, seed: SpeedFigures) -> None:
        prefill = (seed.prefill_base_s, seed.prefill_s_per_token, seed.prefill_s_per_token_squared)
        step = (seed.step_base_s, seed.step_s_per_context_token, seed.step_s_per_sequence)
        self.prefill = _Phase(prefill, _PREFILL_REFERENCE)
        self.step = _Phase(step, _STEP_REFERENCE)
        self.figures = seed
        self.unlike: dict[EndpointId, tuple[float, float]] = {}

    def learn(
        self, endpoint_id: EndpointId, row: Row, took_s: float, weight: float, *, is_prefill: bool
    ) -> None:
        phase = self.prefill if is_prefill else self.step
        is_centred = phase.learn(endpoint_id, row, took_s, weight)
        a, b, c = self.prefill.line.coefficients
        base, context, sequence = self.step.line.coefficients
        self.figures = SpeedFigures(a, b, base, c, context, sequence)
        if not is_centred:
            self._judge(endpoint_id)
            return
        for each in self.prefill.slowness.keys() | self.step.slowness.keys():
            self._judge(each)

    def forget(self, endpoint_id: EndpointId) -> None:
        self.prefill.forget(endpoint_id)
        self.step.forget(endpoint_id)
        self.unlike.pop(endpoint_id, None)

    def _judge(self, endpoint_id: EndpointId) -> None:
        """Whether the endpoint is unlike its pool; one that was stays so a little longer."""
        prefill, step = self.prefill.factor(endpoint_id), self.step.factor(endpoint_id)
        bound = UNLIKE_UNTIL if endpoint_id in self.unlike else UNLIKE_FROM
        if max(abs(prefill), abs(step)) > bound:
            self.unlike[endpoint_id] = math.exp(prefill), math.exp(step)
        else:
            self.unlike.pop(endpoint_id, None)


_ALIKE = (1.0, 1.0)

K = TypeVar("K")
V = TypeVar("V")


def _used(table: OrderedDict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """The entry of a key, made where there is none; the one not used for longest gives way."""
    found = table.get(key)
    if found is None:
        found = table[key] = make()
        if len(table) > most:
            table.popitem(last=False)
    else:
        table.move_to_end(key)
    return found


def _model_mean() -> Mean:
    return Mean(_MODEL_MEMORY)


def _tenant_mean() -> Mean:
    return Mean(_TENANT_MEMORY)


def _pair(prefill: Endpoint, decode: Endpoint) -> tuple[ModelName, PoolName, PoolName]:
    return decode.pool.model, prefill.pool.name, decode.pool.name
