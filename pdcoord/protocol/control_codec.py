"""Messages of the control stream to and from protobuf; its types are named here and nowhere else."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from pdcoord.protocol import control_pb2 as pb
from pdcoord.protocol.control import (
    EVENTS_MAX,
    PART_BYTES,
    REQUESTS_MAX,
    TARGETS_MAX,
    ControlError,
    ControlLegKind,
    CoordinatorHello,
    CoordinatorMessage,
    Events,
    LegBegan,
    LegEnded,
    LoadEvent,
    OutputBegan,
    PathFacts,
    RequestBegan,
    RequestEnded,
    SidecarHello,
    SidecarMessage,
    SidecarProof,
    Snapshot,
    Target,
    Targets,
)
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PATHS_MAX, PathReport
from pdcoord.protocol.plans import Mode, PlannedLoad, RungKind, RungTaken, ServedHeader

TEXT_MAX = 256
"""Characters of any text that is sent or taken in."""
RUNGS_MAX = 64
"""Rungs of one request that are sent or taken in."""
WHOLE_MAX = 1 << 53
_US = 1e6

_Message = TypeVar("_Message", bound=Message)
_Read = TypeVar("_Read")
_Entry = TypeVar("_Entry")
_ENTRY_BYTES = 5
"""Of an entry's own key and length in a list."""


def encode_report(message: SidecarMessage) -> list[bytes]:
    """A sidecar's message as it travels, in parts that follow each other."""
    match message:
        case SidecarHello():
            hello = pb.SidecarHello(
                version=message.version,
                name=message.name,
                address=message.address,
                epoch=message.epoch,
                nonce=message.nonce,
            )
            report = pb.SidecarReport(hello=hello)
        case SidecarProof(proof):
            report = pb.SidecarReport(proof=pb.SidecarProof(proof=proof))
        case Snapshot(requests, has_more):
            snapshot = pb.Snapshot(requests=map(_request, requests), has_more=has_more)
            report = pb.SidecarReport(snapshot=snapshot)
        case Events(events):
            report = pb.SidecarReport(events=pb.Events(events=map(_event, events)))
        case PathFacts():
            facts = pb.PathFacts(
                interval_s=message.interval_s,
                is_agent_up=message.is_agent_up,
                paths=map(_path, message.paths),
            )
            report = pb.SidecarReport(paths=facts)
    raw = report.SerializeToString()
    return [raw] if len(raw) <= PART_BYTES else [part.SerializeToString() for part in _report_parts(report)]


def decode_report(raw: bytes) -> SidecarMessage:
    """Read a sidecar's message.

    Raises:
        ControlError: if it is none, or has a figure that none can have.
    """
    report = _parsed(pb.SidecarReport(), raw)
    return _read(report, _REPORTS)


def encode_notice(message: CoordinatorMessage) -> list[bytes]:
    """A coordinator's message as it travels, in parts that follow each other."""
    match message:
        case CoordinatorHello():
            hello = pb.CoordinatorHello(
                version=message.version, replica=message.replica, nonce=message.nonce, proof=message.proof
            )
            notice = pb.CoordinatorNotice(hello=hello)
        case Targets(changed, removed, is_whole, has_more):
            targets = pb.Targets(
                is_whole=is_whole,
                changed=map(_target, changed),
                removed=map(_text, removed),
                has_more=has_more,
                decodes=map(_text, message.decodes),
                decodes_removed=map(_text, message.decodes_removed),
            )
            notice = pb.CoordinatorNotice(targets=targets)
    raw = notice.SerializeToString()
    return [raw] if len(raw) <= PART_BYTES else [part.SerializeToString() for part in _notice_parts(notice)]


def decode_notice(raw: bytes) -> CoordinatorMessage:
    """Read a coordinator's message.

    Raises:
        ControlError: if it is none.
    """
    notice = _parsed(pb.CoordinatorNotice(), raw)
    return _read(notice, _NOTICES)


# Writing.


def _report_parts(report: pb.SidecarReport) -> Iterator[pb.SidecarReport]:
    """One message as several; what is not a list stays whole, its texts are short."""
    match report.WhichOneof("body"):
        case "snapshot":
            groups = _grouped(report.snapshot.requests, pb.RequestBegan.ByteSize)
            for number, requests in enumerate(groups, 1):
                has_more = report.snapshot.has_more or number < len(groups)
                yield pb.SidecarReport(snapshot=pb.Snapshot(requests=requests, has_more=has_more))
        case "events":
            for events in _grouped(report.events.events, pb.Event.ByteSize):
                yield pb.SidecarReport(events=pb.Events(events=events))
        case "paths":
            told = report.paths
            for paths in _grouped(told.paths, pb.PathFact.ByteSize):
                facts = pb.PathFacts(interval_s=told.interval_s, is_agent_up=told.is_agent_up, paths=paths)
                yield pb.SidecarReport(paths=facts)
        case _:
            yield report


def _notice_parts(notice: pb.CoordinatorNotice) -> Iterator[pb.CoordinatorNotice]:
    if notice.WhichOneof("body") != "targets":
        yield notice
        return
    told = notice.targets
    lists = [pb.Targets(changed=each) for each in _grouped(told.changed, pb.Target.ByteSize)]
    lists += [pb.Targets(removed=each) for each in _grouped(told.removed, _text_bytes)]
    lists += [pb.Targets(decodes=each) for each in _grouped(told.decodes, _text_bytes)]
    lists += [pb.Targets(decodes_removed=each) for each in _grouped(told.decodes_removed, _text_bytes)]
    for number, part in enumerate(lists, 1):
        part.is_whole = told.is_whole
        part.has_more = told.has_more or number < len(lists)
        yield pb.CoordinatorNotice(targets=part)


def _text_bytes(text: str) -> int:
    return len(text.encode()) + 4


def _grouped(entries: Iterable[_Entry], size: Callable[[_Entry], int]) -> list[Sequence[_Entry]]:
    """As many lists as keep each shorter than PART_BYTES and one entry."""
    groups: list[Sequence[_Entry]] = []
    group: list[_Entry] = []
    byte_count = 0
    for entry in entries:
        group.append(entry)
        byte_count += size(entry) + _ENTRY_BYTES
        if byte_count >= PART_BYTES:
            groups.append(group)
            group, byte_count = [], 0
    return [*groups, group] if group else groups


def _request(told: RequestBegan) -> pb.RequestBegan:
    load = told.load
    return pb.RequestBegan(
        ordinal=told.ordinal,
        age_us=round(told.age_s * _US),
        replica=_text(load.replica),
        model=_text(load.model),
        prefill=_text(told.prefill or ""),
        prefill_us=load.prefill_us,
        prompt_tokens=load.prompt_tokens,
        landing_tokens=load.landing_tokens,
        transfer_bytes=load.transfer_bytes,
        is_streamed=told.is_streamed,
        is_sequential=told.is_sequential,
        has_output=told.has_output,
    )


def _event(told: LoadEvent) -> pb.Event:
    match told:
        case RequestBegan():
            return pb.Event(request_began=_request(told))
        case LegBegan(ordinal, leg, kind, prefill):
            began = pb.LegBegan(ordinal=ordinal, leg=leg, kind=kind, prefill=_text(prefill or ""))
            return pb.Event(leg_began=began)
        case LegEnded(ordinal, leg, kind, prefill, outcome, took_s):
            ended = pb.LegEnded(
                ordinal=ordinal,
                leg=leg,
                kind=kind,
                prefill=_text(prefill or ""),
                outcome=_text(outcome),
                took_us=round(took_s * _US),
            )
            return pb.Event(leg_ended=ended)
        case OutputBegan(ordinal, served):
            return pb.Event(output_began=pb.OutputBegan(ordinal=ordinal, served=_served(served)))
        case RequestEnded(ordinal, outcome, served):
            over = pb.RequestEnded(
                ordinal=ordinal, outcome=_text(outcome), served=None if served is None else _served(served)
            )
            return pb.Event(request_ended=over)


def _served(told: ServedHeader) -> pb.Served:
    rungs = [
        pb.Rung(rung=each.rung, reason=each.reason, target=_text(each.target))
        for each in told.rungs[:RUNGS_MAX]
    ]
    return pb.Served(
        mode=told.mode,
        prefill=_text(told.prefill or ""),
        rungs=rungs,
        prefill_ms=told.prefill_ms,
        transfer_ms=told.transfer_ms,
        cached_tokens=told.cached_tokens,
    )


def _path(told: PathReport) -> pb.PathFact:
    return pb.PathFact(
        target=_text(told.target),
        kv_address=_text(told.kv_address),
        probe_count=told.probe_count,
        age_us=round(told.age_s * _US),
        failure=_text(told.failure),
        detail=_text(told.detail),
        verdict=_text(told.verdict),
        verdict_reason=_text(told.verdict_reason),
        backend=_text(told.backend),
        transport=_text(told.transport),
        is_degraded=told.is_degraded,
        latency_s=told.latency_s,
        bandwidth_bytes_per_s=told.bandwidth_bytes_per_s,
    )


def _target(told: Target) -> pb.Target:
    return pb.Target(
        address=_text(told.address),
        bootstrap_port=told.bootstrap_port,
        kv_port=told.kv_port,
        verdict=_text(told.verdict),
        verdict_reason=_text(told.verdict_reason),
        breaker=_text(told.breaker),
    )


# Reading.


def _parsed(message: _Message, raw: bytes) -> _Message:
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise ControlError(f"a message of {len(raw)} bytes cannot be read: {error}") from error
    return message


def _read(message: Any, readers: dict[str, Callable[[Any], _Read]]) -> _Read:
    kind = message.WhichOneof("body")
    if kind not in readers:
        raise ControlError("a message has no body that this version knows")
    return readers[kind](getattr(message, kind))


def _read_hello(told: pb.SidecarHello) -> SidecarHello:
    name, address, epoch = map(_text, (told.name, told.address, told.epoch))
    return SidecarHello(told.version, name, HostPort(address), epoch, told.nonce[:64])


def _read_request(told: pb.RequestBegan) -> RequestBegan:
    load = PlannedLoad(
        replica=_text(told.replica),
        model=_text(told.model),
        prefill_us=_whole(told.prefill_us),
        prompt_tokens=_whole(told.prompt_tokens),
        landing_tokens=_whole(told.landing_tokens),
        transfer_bytes=_whole(told.transfer_bytes),
    )
    return RequestBegan(
        ordinal=_whole(told.ordinal),
        load=load,
        prefill=_address(told.prefill),
        is_streamed=told.is_streamed,
        is_sequential=told.is_sequential,
        has_output=told.has_output,
        age_s=_whole(told.age_us) / _US,
    )


def _read_leg_began(told: pb.LegBegan) -> LegBegan:
    kind, prefill = _leg_kind(told.kind), _address(told.prefill)
    return LegBegan(_whole(told.ordinal), told.leg, kind, prefill)


def _read_leg_ended(told: pb.LegEnded) -> LegEnded:
    kind, prefill = _leg_kind(told.kind), _address(told.prefill)
    took_s = _whole(told.took_us) / _US
    return LegEnded(_whole(told.ordinal), told.leg, kind, prefill, _text(told.outcome), took_s)


def _read_output(told: pb.OutputBegan) -> OutputBegan:
    return OutputBegan(_whole(told.ordinal), _read_served(told.served))


def _read_ended(told: pb.RequestEnded) -> RequestEnded:
    served = _read_served(told.served) if told.HasField("served") else None
    return RequestEnded(_whole(told.ordinal), _text(told.outcome), served)


def _read_served(told: pb.Served) -> ServedHeader:
    try:
        mode = Mode(told.mode)
    except ValueError as error:
        raise ControlError(f"mode is {_text(told.mode)!r}, expected one of {', '.join(Mode)}") from error
    rungs = [_read_rung(each) for each in told.rungs[:RUNGS_MAX]]
    return ServedHeader(
        mode=mode,
        prefill=_address(told.prefill),
        rungs=tuple(rung for rung in rungs if rung is not None),
        prefill_ms=_figure(told.prefill_ms) if told.HasField("prefill_ms") else None,
        transfer_ms=_figure(told.transfer_ms) if told.HasField("transfer_ms") else None,
        cached_tokens=_whole(told.cached_tokens) if told.HasField("cached_tokens") else None,
    )


def _read_rung(told: pb.Rung) -> RungTaken | None:
    """None where a sidecar of a later release has a rung or a reason that is not known here."""
    try:
        return RungTaken(
            rung=RungKind(told.rung), reason=RungReason(told.reason), target=HostPort(_text(told.target))
        )
    except ValueError:
        return None


def _read_path(told: pb.PathFact) -> PathReport:
    has = told.HasField
    return PathReport(
        target=HostPort(_text(told.target)),
        kv_address=HostPort(_text(told.kv_address)),
        probe_count=_whole(told.probe_count),
        age_s=_whole(told.age_us) / _US,
        failure=_text(told.failure),
        detail=_text(told.detail),
        verdict=_text(told.verdict),
        verdict_reason=_text(told.verdict_reason),
        backend=_text(told.backend),
        transport=_text(told.transport),
        is_degraded=told.is_degraded,
        latency_s=_figure(told.latency_s) if has("latency_s") else None,
        bandwidth_bytes_per_s=_figure(told.bandwidth_bytes_per_s) if has("bandwidth_bytes_per_s") else None,
    )


def _read_paths(told: pb.PathFacts) -> PathFacts:
    interval_s = _figure(told.interval_s)
    if not interval_s:
        raise ControlError("interval_s is 0, expected more")
    _bound("paths", told.paths, PATHS_MAX)
    return PathFacts(interval_s, told.is_agent_up, tuple(map(_read_path, told.paths)))


def _read_snapshot(told: pb.Snapshot) -> Snapshot:
    _bound("requests", told.requests, REQUESTS_MAX)
    return Snapshot(tuple(map(_read_request, told.requests)), told.has_more)


def _read_events(told: pb.Events) -> Events:
    _bound("events", told.events, EVENTS_MAX)
    return Events(tuple(map(_read_event, told.events)))


def _read_event(told: pb.Event) -> LoadEvent:
    return _read(told, _EVENTS)


def _read_answer(told: pb.CoordinatorHello) -> CoordinatorHello:
    return CoordinatorHello(told.version, _text(told.replica), told.nonce[:64], told.proof[:64])


def _read_target(told: pb.Target) -> Target:
    return Target(
        address=HostPort(_text(told.address)),
        verdict=_text(told.verdict),
        verdict_reason=_text(told.verdict_reason),
        breaker=_text(told.breaker),
        bootstrap_port=_port(told.bootstrap_port) if told.HasField("bootstrap_port") else None,
        kv_port=_port(told.kv_port) if told.HasField("kv_port") else None,
    )


def _read_targets(told: pb.Targets) -> Targets:
    _bound("changed", told.changed, TARGETS_MAX)
    _bound("removed", told.removed, TARGETS_MAX)
    _bound("decodes", told.decodes, TARGETS_MAX)
    _bound("decodes_removed", told.decodes_removed, TARGETS_MAX)
    removed, decodes, decodes_removed = (
        tuple(HostPort(_text(each)) for each in addresses)
        for addresses in (told.removed, told.decodes, told.decodes_removed)
    )
    return Targets(
        tuple(map(_read_target, told.changed)),
        removed,
        is_whole=told.is_whole,
        has_more=told.has_more,
        decodes=decodes,
        decodes_removed=decodes_removed,
    )


_EVENTS: dict[str, Callable[[Any], LoadEvent]] = {
    "request_began": _read_request,
    "leg_began": _read_leg_began,
    "leg_ended": _read_leg_ended,
    "output_began": _read_output,
    "request_ended": _read_ended,
}
_REPORTS: dict[str, Callable[[Any], SidecarMessage]] = {
    "hello": _read_hello,
    "proof": lambda told: SidecarProof(told.proof[:64]),
    "snapshot": _read_snapshot,
    "events": _read_events,
    "paths": _read_paths,
}
_NOTICES: dict[str, Callable[[Any], CoordinatorMessage]] = {"hello": _read_answer, "targets": _read_targets}


def _text(told: str) -> str:
    return told[:TEXT_MAX]


def _bound(name: str, told: Sized, count_max: int) -> None:
    if len(told) > count_max:
        raise ControlError(f"{name} are {len(told)}, expected at most {count_max}")


def _address(told: str) -> HostPort | None:
    return HostPort(_text(told)) if told else None


def _whole(told: int) -> int:
    if told > WHOLE_MAX:
        raise ControlError(f"a figure is {told}, expected at most {WHOLE_MAX}")
    return told


def _figure(told: float) -> float:
    if not math.isfinite(told) or told < 0.0:
        raise ControlError(f"a figure is {told}, expected a number of at least 0")
    return told


def _port(told: int) -> int:
    if not 0 < told <= 65_535:
        raise ControlError(f"a port is {told}, expected 1..65535")
    return told


def _leg_kind(told: str) -> ControlLegKind:
    try:
        return ControlLegKind(told)
    except ValueError as error:
        raise ControlError(f"a leg is {_text(told)!r}, expected prefill or decode") from error
