from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SidecarReport(_message.Message):
    __slots__ = ("hello", "proof", "snapshot", "events", "paths")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    hello: SidecarHello
    proof: SidecarProof
    snapshot: Snapshot
    events: Events
    paths: PathFacts
    def __init__(self, hello: _Optional[_Union[SidecarHello, _Mapping]] = ..., proof: _Optional[_Union[SidecarProof, _Mapping]] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., events: _Optional[_Union[Events, _Mapping]] = ..., paths: _Optional[_Union[PathFacts, _Mapping]] = ...) -> None: ...

class SidecarHello(_message.Message):
    __slots__ = ("version", "name", "address", "epoch", "nonce")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    version: int
    name: str
    address: str
    epoch: str
    nonce: bytes
    def __init__(self, version: _Optional[int] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[str] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class SidecarProof(_message.Message):
    __slots__ = ("proof",)
    PROOF_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    def __init__(self, proof: _Optional[bytes] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("requests", "has_more")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RequestBegan]
    has_more: bool
    def __init__(self, requests: _Optional[_Iterable[_Union[RequestBegan, _Mapping]]] = ..., has_more: _Optional[bool] = ...) -> None: ...

class Events(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("request_began", "leg_began", "leg_ended", "output_began", "request_ended")
    REQUEST_BEGAN_FIELD_NUMBER: _ClassVar[int]
    LEG_BEGAN_FIELD_NUMBER: _ClassVar[int]
    LEG_ENDED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BEGAN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ENDED_FIELD_NUMBER: _ClassVar[int]
    request_began: RequestBegan
    leg_began: LegBegan
    leg_ended: LegEnded
    output_began: OutputBegan
    request_ended: RequestEnded
    def __init__(self, request_began: _Optional[_Union[RequestBegan, _Mapping]] = ..., leg_began: _Optional[_Union[LegBegan, _Mapping]] = ..., leg_ended: _Optional[_Union[LegEnded, _Mapping]] = ..., output_began: _Optional[_Union[OutputBegan, _Mapping]] = ..., request_ended: _Optional[_Union[RequestEnded, _Mapping]] = ...) -> None: ...

class RequestBegan(_message.Message):
    __slots__ = ("ordinal", "age_us", "replica", "model", "prefill", "prefill_us", "prompt_tokens", "landing_tokens", "transfer_bytes", "is_streamed", "is_sequential", "has_output")
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    IS_STREAMED_FIELD_NUMBER: _ClassVar[int]
    IS_SEQUENTIAL_FIELD_NUMBER: _ClassVar[int]
    HAS_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    ordinal: int
    age_us: int
    replica: str
    model: str
    prefill: str
    prefill_us: int
    prompt_tokens: int
    landing_tokens: int
    transfer_bytes: int
    is_streamed: bool
    is_sequential: bool
    has_output: bool
    def __init__(self, ordinal: _Optional[int] = ..., age_us: _Optional[int] = ..., replica: _Optional[str] = ..., model: _Optional[str] = ..., prefill: _Optional[str] = ..., prefill_us: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., landing_tokens: _Optional[int] = ..., transfer_bytes: _Optional[int] = ..., is_streamed: _Optional[bool] = ..., is_sequential: _Optional[bool] = ..., has_output: _Optional[bool] = ...) -> None: ...

class LegBegan(_message.Message):
    __slots__ = ("ordinal", "leg", "kind", "prefill")
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    LEG_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    ordinal: int
    leg: int
    kind: str
    prefill: str
    def __init__(self, ordinal: _Optional[int] = ..., leg: _Optional[int] = ..., kind: _Optional[str] = ..., prefill: _Optional[str] = ...) -> None: ...

class LegEnded(_message.Message):
    __slots__ = ("ordinal", "leg", "kind", "prefill", "outcome", "took_us")
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    LEG_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TOOK_US_FIELD_NUMBER: _ClassVar[int]
    ordinal: int
    leg: int
    kind: str
    prefill: str
    outcome: str
    took_us: int
    def __init__(self, ordinal: _Optional[int] = ..., leg: _Optional[int] = ..., kind: _Optional[str] = ..., prefill: _Optional[str] = ..., outcome: _Optional[str] = ..., took_us: _Optional[int] = ...) -> None: ...

class OutputBegan(_message.Message):
    __slots__ = ("ordinal", "served")
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    ordinal: int
    served: Served
    def __init__(self, ordinal: _Optional[int] = ..., served: _Optional[_Union[Served, _Mapping]] = ...) -> None: ...

class RequestEnded(_message.Message):
    __slots__ = ("ordinal", "outcome", "served")
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    ordinal: int
    outcome: str
    served: Served
    def __init__(self, ordinal: _Optional[int] = ..., outcome: _Optional[str] = ..., served: _Optional[_Union[Served, _Mapping]] = ...) -> None: ...

class Served(_message.Message):
    __slots__ = ("mode", "prefill", "rungs", "prefill_ms", "transfer_ms", "cached_tokens")
    MODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    RUNGS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    mode: str
    prefill: str
    rungs: _containers.RepeatedCompositeFieldContainer[Rung]
    prefill_ms: float
    transfer_ms: float
    cached_tokens: int
    def __init__(self, mode: _Optional[str] = ..., prefill: _Optional[str] = ..., rungs: _Optional[_Iterable[_Union[Rung, _Mapping]]] = ..., prefill_ms: _Optional[float] = ..., transfer_ms: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Rung(_message.Message):
    __slots__ = ("rung", "reason", "target")
    RUNG_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    rung: str
    reason: str
    target: str
    def __init__(self, rung: _Optional[str] = ..., reason: _Optional[str] = ..., target: _Optional[str] = ...) -> None: ...

class PathFacts(_message.Message):
    __slots__ = ("interval_s", "is_agent_up", "paths")
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    IS_AGENT_UP_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    is_agent_up: bool
    paths: _containers.RepeatedCompositeFieldContainer[PathFact]
    def __init__(self, interval_s: _Optional[float] = ..., is_agent_up: _Optional[bool] = ..., paths: _Optional[_Iterable[_Union[PathFact, _Mapping]]] = ...) -> None: ...

class PathFact(_message.Message):
    __slots__ = ("target", "kv_address", "probe_count", "age_us", "failure", "detail", "verdict", "verdict_reason", "backend", "transport", "is_degraded", "latency_s", "bandwidth_bytes_per_s")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROBE_COUNT_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_REASON_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    IS_DEGRADED_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    target: str
    kv_address: str
    probe_count: int
    age_us: int
    failure: str
    detail: str
    verdict: str
    verdict_reason: str
    backend: str
    transport: str
    is_degraded: bool
    latency_s: float
    bandwidth_bytes_per_s: float
    def __init__(self, target: _Optional[str] = ..., kv_address: _Optional[str] = ..., probe_count: _Optional[int] = ..., age_us: _Optional[int] = ..., failure: _Optional[str] = ..., detail: _Optional[str] = ..., verdict: _Optional[str] = ..., verdict_reason: _Optional[str] = ..., backend: _Optional[str] = ..., transport: _Optional[str] = ..., is_degraded: _Optional[bool] = ..., latency_s: _Optional[float] = ..., bandwidth_bytes_per_s: _Optional[float] = ...) -> None: ...

class CoordinatorNotice(_message.Message):
    __slots__ = ("hello", "targets")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    hello: CoordinatorHello
    targets: Targets
    def __init__(self, hello: _Optional[_Union[CoordinatorHello, _Mapping]] = ..., targets: _Optional[_Union[Targets, _Mapping]] = ...) -> None: ...

class CoordinatorHello(_message.Message):
    __slots__ = ("version", "replica", "nonce", "proof")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    version: int
    replica: str
    nonce: bytes
    proof: bytes
    def __init__(self, version: _Optional[int] = ..., replica: _Optional[str] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Targets(_message.Message):
    __slots__ = ("is_whole", "changed", "removed", "has_more", "decodes", "decodes_removed")
    IS_WHOLE_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    DECODES_REMOVED_FIELD_NUMBER: _ClassVar[int]
    is_whole: bool
    changed: _containers.RepeatedCompositeFieldContainer[Target]
    removed: _containers.RepeatedScalarFieldContainer[str]
    has_more: bool
    decodes: _containers.RepeatedScalarFieldContainer[str]
    decodes_removed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, is_whole: _Optional[bool] = ..., changed: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., removed: _Optional[_Iterable[str]] = ..., has_more: _Optional[bool] = ..., decodes: _Optional[_Iterable[str]] = ..., decodes_removed: _Optional[_Iterable[str]] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("address", "bootstrap_port", "kv_port", "verdict", "verdict_reason", "breaker")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_PORT_FIELD_NUMBER: _ClassVar[int]
    KV_PORT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_REASON_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    address: str
    bootstrap_port: int
    kv_port: int
    verdict: str
    verdict_reason: str
    breaker: str
    def __init__(self, address: _Optional[str] = ..., bootstrap_port: _Optional[int] = ..., kv_port: _Optional[int] = ..., verdict: _Optional[str] = ..., verdict_reason: _Optional[str] = ..., breaker: _Optional[str] = ...) -> None: ...
