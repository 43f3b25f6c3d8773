"""What the scheduler's half of the connector tells the workers' half, one StepOrders each engine step."""

from dataclasses import dataclass

from transfer.session.vocabulary import ChunkComputed, LoadAsked, Opened, TransferId


@dataclass(frozen=True, slots=True)
class Settle:
    """Nothing may read this request's blocks any more when the step's forward pass begins.

    They can be given to another request in this very step: it was preempted, or a sliding window moved on.
    """

    request: str
    transfer: TransferId


@dataclass(frozen=True, slots=True)
class StepOrders:
    """One step's orders, the same for every worker.

    Attributes:
        settle: to be done before the forward pass.
        opened: hand-overs that begin.
        chunks: tokens whose KV stands in the blocks once the step's forward pass is done.
        aborted: hand-overs that the engine gives up.
        stillborn: hand-overs whose prefill was given up before it was scheduled: known to their consumers,
            who are to learn of it, and held by nobody.
        held: requests that are over, whose blocks the scheduler holds until `finished_sending` names them.
        loads: KV to be fetched; those of no tokens only release the producer.
        cancelled: requests whose load is wanted no more.
    """

    settle: tuple[Settle, ...] = ()
    opened: tuple[Opened, ...] = ()
    chunks: tuple[ChunkComputed, ...] = ()
    aborted: tuple[TransferId, ...] = ()
    stillborn: tuple[Opened, ...] = ()
    held: tuple[str, ...] = ()
    loads: tuple[LoadAsked, ...] = ()
    cancelled: tuple[str, ...] = ()
