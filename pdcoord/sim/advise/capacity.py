"""What one engine of a kind can do in each phase, under the objectives of the traffic.

The model of a step is the engine's own: `a + k * sequences + b * context`, and a prompt computed beside
running streams adds its time to one of their steps. With y answers begun per second, each of O tokens, and a
share s of the time spent on prompts, the batch is y * O * t / (1 - s) at a step of t (Little's law). So the
time per token stays within its objective T while `(k * O + b * context_steps) * y + s <= 1 - a / T`, and the
batch within its bound B while `O * t(B) / B * y + s <= 1`: both are lines, which is what an LP needs.
"""

from dataclasses import dataclass
from math import ceil, exp, isfinite, sqrt

from pdcoord.sim.advise.demand import Demand, Traffic
from pdcoord.sim.advise.kinds import Kind

USE_MAX = 0.95
"""Share of its time that an engine can be busy: beyond it no queue stays short."""
USE_MIN = 0.2
LATE_SHARE = 0.05
"""Of calls, that may wait too long for their prefill to begin."""
CROWDING = 1.3
"""Standard deviations that a batch, or the stalls of a call, may lie above their mean: nine in ten do not."""
STALL_SHARE = 0.25
"""Share of a mixed engine's time that prompts take, where the spread of stalls is reckoned."""
FELT_MAX = 3.0


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """What one call of a part costs one engine; seconds of its time.

    Attributes:
        prefill_s: its prompt computed alone, without what is cached.
        stall_s: the same beside running streams, whose step would have been made anyway.
        felt_stall_s: more than that where objectives are near: stalls come by chance, and a short answer that
            meets more of them than others has too few steps to make up for it.
        step_share: what it adds to the left of the line for the objective, times calls per second.
        batch_share: what it adds to the left of the line for the batch's bound; infinite where the KV pool
            does not hold one such call.
    """

    prefill_s: float
    stall_s: float
    felt_stall_s: float
    step_share: float
    batch_share: float

    @property
    def can_decode(self) -> bool:
        return isfinite(self.batch_share)


@dataclass(frozen=True, slots=True)
class Capacity:
    """One engine of a kind under some traffic.

    Attributes:
        costs: by part, in the traffic's order.
        step_room: right side of the line for the objective: 1 - a / T; 0 or less if even an empty step
            is too slow, None without an objective.
        prefill_tokens_per_s: prompt tokens computed per second by an engine that does nothing else.
        batch: the largest mean batch within objective, KV pool and the engine's own limit.
        batch_bound: what bounds it: objective, kv or running_max.
        decode_tokens_per_s: of an engine that does nothing else.
    """

    costs: tuple[PhaseCost, ...]
    step_room: float | None
    prefill_tokens_per_s: float
    batch: float
    batch_bound: str
    decode_tokens_per_s: float


def prefill_s(kind: Kind, uncached_tokens: int) -> float:
    """One prompt alone; the fixed cost is paid for each chunk."""
    settings = kind.settings
    chunks = ceil(uncached_tokens / settings.step_tokens_max)
    extra_s = max(0, chunks - 1) * settings.speed.prefill_base_s
    return settings.speed.prefill_s(uncached_tokens) + extra_s


def capacity(kind: Kind, traffic: Traffic) -> Capacity:
    """What one engine of this kind can do."""
    speed = kind.settings.speed
    objective_s = traffic.tpot_s_max
    felt = _felt(kind, traffic)
    costs = tuple(_cost(kind, demand, felt) for demand in traffic.demands)
    output = traffic.output_tokens_per_call
    context = sum(each.share * each.context_steps for each in traffic.demands) / output
    per_sequence_s = speed.step_s_per_sequence + speed.step_s_per_context_token * context
    bounds = {
        "running_max": float(min(kind.settings.running_max, kind.settings.step_tokens_max)),
        "kv": kind.kv_tokens / context,
    }
    if objective_s is not None:
        room_s = max(0.0, objective_s - speed.step_base_s)
        bounds["objective"] = room_s / per_sequence_s if per_sequence_s > 0.0 else float("inf")
    bound = min(bounds, key=lambda name: bounds[name])
    batch = bounds[bound]
    step = speed.step_base_s + per_sequence_s * batch
    uncached = sum(each.share * each.uncached_tokens for each in traffic.demands)
    busy_s = sum(each.share * cost.prefill_s for each, cost in zip(traffic.demands, costs, strict=True))
    return Capacity(
        costs=costs,
        step_room=None if objective_s is None else 1.0 - speed.step_base_s / objective_s,
        prefill_tokens_per_s=uncached / busy_s if busy_s > 0.0 else float("inf"),
        batch=batch,
        batch_bound=bound,
        decode_tokens_per_s=batch / step if step > 0.0 else 0.0,
    )


def _felt(kind: Kind, traffic: Traffic) -> float:
    """How much worse than their mean the stalls are that a call must be able to bear, 1 or more.

    Stalls of mean s come as a Poisson process that takes a share p of the time. The stalls of one answer of
    O tokens at T each then vary, in proportion to their mean, by sqrt(E[s^2] / (E[s] p O T)).
    """
    if traffic.tpot_s_max is None:
        return 1.0
    base_s = kind.settings.speed.step_base_s
    mean = square = 0.0
    for demand in traffic.demands:
        for tokens in demand.uncached:
            stall_s = max(0.0, prefill_s(kind, tokens) - base_s)
            mean += stall_s * demand.share / len(demand.uncached)
            square += stall_s * stall_s * demand.share / len(demand.uncached)
    if mean <= 0.0:
        return 1.0
    answer_s = traffic.output_tokens_per_call * traffic.tpot_s_max
    return min(FELT_MAX, 1.0 + CROWDING * sqrt(square / (mean * STALL_SHARE * answer_s)))


def _cost(kind: Kind, demand: Demand, felt: float) -> PhaseCost:
    speed = kind.settings.speed
    times = [prefill_s(kind, tokens) for tokens in demand.uncached]
    stalls = [max(0.0, each - speed.step_base_s) for each in times]
    output = demand.output_tokens
    batch_max = min(
        kind.settings.running_max, kind.settings.step_tokens_max, kind.kv_tokens / demand.kv_tokens
    )
    per_sequence_s = speed.step_s_per_sequence + speed.step_s_per_context_token * demand.kv_tokens
    full_step_s = speed.step_base_s + per_sequence_s * batch_max
    return PhaseCost(
        prefill_s=sum(times) / len(times),
        stall_s=sum(stalls) / len(stalls),
        felt_stall_s=felt * sum(stalls) / len(stalls),
        step_share=speed.step_s_per_sequence * output + speed.step_s_per_context_token * demand.context_steps,
        batch_share=output * full_step_s / batch_max if batch_max >= 1.0 else float("inf"),
    )


def crowding(batch: float, engine_count: int) -> float:
    """Share of its largest batch that an engine's mean batch may be, 0..1.

    The batch of an engine varies as the square root of its mean; among several engines a router evens
    that out, as the square root of their number.
    """
    if batch <= 0.0:
        return 1.0
    spread = CROWDING / sqrt(batch * max(1, engine_count))
    return max(0.3, 1.0 - spread)


def prefill_use(kind: Kind, traffic: Traffic, engine_count: int) -> float:
    """Share of their time that engines may spend on prefills so that few calls wait too long, 0..1.

    The wait is taken to be exponential, as in a queue with one line for all engines under random arrivals
    (its heavy traffic limit): P(wait > t) = use * exp(-2 n (1 - use) t / (S (1 + v))) with S the mean
    prefill and v its squared variation. The time to wait is what the objective leaves.
    """
    times: list[tuple[float, float]] = []
    slacks: list[tuple[float, float]] = []
    for demand in traffic.demands:
        weight = demand.share / len(demand.uncached)
        for tokens in demand.uncached:
            taken_s = prefill_s(kind, tokens)
            times.append((taken_s, weight))
            if demand.ttft_s_max is not None and taken_s < demand.ttft_s_max:
                slacks.append((demand.ttft_s_max - taken_s, weight))
    if not slacks:
        return USE_MAX
    mean_s = sum(taken * weight for taken, weight in times)
    square = sum(taken * taken * weight for taken, weight in times)
    slack_s = sum(slack * weight for slack, weight in slacks) / sum(weight for _, weight in slacks)
    if mean_s <= 0.0:
        return USE_MAX
    decay = 2.0 * max(1, engine_count) * slack_s / (mean_s * (square / mean_s**2))
    low, high = USE_MIN, USE_MAX
    for _ in range(40):
        use = (low + high) / 2
        is_late = use * exp(-decay * (1.0 - use)) > LATE_SHARE
        low, high = (low, use) if is_late else (use, high)
    return low


def in_time_share(kind: Kind, demand: Demand, moved_s_per_token: float, fixed_s: float) -> float:
    """Share of a part's calls whose first token comes in time if nothing is in the way, 0..1."""
    if demand.ttft_s_max is None:
        return 1.0
    good = sum(
        prefill_s(kind, tokens) + moved_s_per_token * tokens + fixed_s <= demand.ttft_s_max
        for tokens in demand.uncached
    )
    return good / len(demand.uncached)
