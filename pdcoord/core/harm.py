"""What a request does to others: the time that it costs them, and how many it pushes past their objectives.

Without it everybody flees from a queue to where the prompt must be computed once more, which makes all queues
longer, and to wherever a first token comes soonest, which fills the pools of those: each request helps itself
at the price of several others.
"""

from dataclasses import dataclass

from pdcoord.core.model import Slo

STREAM_WEIGHT = 3.0
"""Streams count so much more than their share of slack says: of prefills one seldom comes alone. Found in the
simulator, where 1 to 3 differ little (docs/policies-benchmark.md)."""
STALL_WEIGHT = 0.1
"""Of a stream's delay beside a wait for a first token: it spreads over the rest of an answer, which is read
more slowly than it is written. Found in the simulator, as STREAM_WEIGHT."""
QUEUE_WEIGHT = 3.0
"""Of those who come behind: more than stand there now, as what makes a queue does not end with it. Found in
the simulator, too."""
SLOWING_WEIGHT = 0.05
"""The same of steps that take longer; it keeps streams away from who is slow at them. Found in the simulator:
with twice as much, streams are kept evenly at the price of their prefixes."""
ROOM_WEIGHT = 30.0
"""Requests that will do without the KV that this one takes of a full pool: those who come for as long as its
prefix stays there, not those who wait now. Found in the simulator; 10 to 100 differ little."""
TYPICAL_S_MIN = 0.001
"""No prefill takes less than its launch, so that nothing is divided by next to zero."""
SLACK_SHARE_MIN = 0.1
"""Least slack of a stream, as a share of the objective, so that nothing is divided by zero."""


@dataclass(slots=True)
class Surroundings:
    """What a prefill meets on an endpoint.

    Attributes:
        queue_s: predicted time of the prefills before it.
        stream_count: answers that are generated there meanwhile.
        step_s: one step of theirs, undisturbed.
    """

    queue_s: float
    stream_count: int
    step_s: float


def others_s(prefill_s: float, at: Surroundings, typical_prefill_s: float) -> float:
    """Time that this prefill costs others, as it is counted beside a request's own.

    - Streams: each stands still for as long as it takes.
    - Queue: those who come behind it wait longer. In a queue of `queue_s` some `queue_s / typical_prefill_s`
      stand before this request, and as many will have come by the time that it is served.

    Grows with `prefill_s` and with everything in `at`.
    """
    behind = QUEUE_WEIGHT * at.queue_s / max(typical_prefill_s, TYPICAL_S_MIN)
    return prefill_s * (STALL_WEIGHT * at.stream_count + behind)


def crowding_s(kv_share: float, kv_usage: float, answer_s: float) -> float:
    """Time that it costs others to have a prompt's KV in an endpoint's pool.

    Where the pool is full, others come in as fast as its content turns over, once in an answer's time. With
    the fourth power of its usage: a pool that is half full hardly ever lacks room.

    Args:
        kv_share: of the pool that the KV takes beside what others hold there, 0..1; what is cached and
            held by nobody is taken as well, from those who would come in.
        kv_usage: share of the pool that is taken already, 0..1.
        answer_s: predicted time of an answer there, from its first token to its last.
    """
    square = kv_usage * kv_usage
    return ROOM_WEIGHT * kv_share * square * square * answer_s


def slowing_s(stream_count: int, added_s: float) -> float:
    """Time that an answer costs others, since each step takes longer with one more in the batch.

    Args:
        stream_count: other answers that are generated there.
        added_s: by which all steps of an answer's time together become longer.
    """
    return SLOWING_WEIGHT * stream_count * added_s


def harm(
    slo: Slo, prefill_s: float, at: Surroundings, typical_prefill_s: float, output_tokens: float
) -> float:
    """Expected number of others' requests that miss an objective because of this prefill.

    - Queue: where the wait nears the TTFT objective, capacity is what the next ones lack. `prefill_s` of it
      would have served `prefill_s / typical_prefill_s` of them; with a shorter queue in proportion fewer.
    - Streams: each can be held up by its slack, (objective - step) times its tokens, before it misses its
      TPOT objective. `prefill_s` takes a share of that.

    Grows with `prefill_s` and with everything in `at`.
    """
    found = 0.0
    ttft_s, tpot_s, queue_s = slo.ttft_s, slo.tpot_s, at.queue_s
    # Asked of every endpoint for every request: where `min` and `max` would have nothing to do, without them.
    if ttft_s is not None and queue_s > 0.0:
        wait = 1.0 if queue_s >= ttft_s else queue_s / ttft_s
        found += prefill_s * wait / max(typical_prefill_s, TYPICAL_S_MIN)
    if tpot_s is not None and at.stream_count and output_tokens > 0.0:
        slack_s = max(tpot_s - at.step_s, SLACK_SHARE_MIN * tpot_s) * output_tokens
        share = 1.0 if prefill_s >= slack_s else prefill_s / slack_s
        found += STREAM_WEIGHT * at.stream_count * share
    return found
