"""Envoy's external processing messages to plain data and back.

Source: envoy.service.ext_proc.v3 (Envoy 1.37) in xds-protos 1.85, and the endpoint-picker protocol 1.0.0.
"""

from collections.abc import Callable, Iterable
from typing import Any

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from pdcoord.extproc.vocabulary import (
    Answer,
    AnswerBody,
    AnswerHead,
    AnswerTrailers,
    BodyMode,
    FromEnvoy,
    Immediate,
    Modes,
    RequestBody,
    RequestHead,
    RequestTrailers,
    ResponseBody,
    ResponseHead,
    ResponseTrailers,
    Route,
)
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.headers import DESTINATION_ENDPOINT

SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
LB_NAMESPACE = "envoy.lb"
DESTINATION_KEY = DESTINATION_ENDPOINT.decode()
SERVED_KEY = "x-gateway-destination-endpoint-served"
ATTRIBUTES_NAMESPACE = "envoy.filters.http.ext_proc"
CODE_DETAILS = "response.code_details"
DROPPED_REASON = b"x-llm-d-request-dropped-reason"

_OVERWRITE = 2  # HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_BUFFERED = int(BodyMode.BUFFERED)
_MODES = frozenset(BodyMode)

_DROPPED: dict[RefuseReason, bytes] = {
    RefuseReason.SATURATED: b"rejected-saturated",
    RefuseReason.QUEUE_FULL: b"rejected-saturated",
    RefuseReason.NO_ENDPOINTS: b"rejected-no-endpoints",
    RefuseReason.LADDER_EXHAUSTED: b"rejected-no-endpoints",
    RefuseReason.WAITED_TOO_LONG: b"rejected-ttl-expired",
    RefuseReason.DEADLINE: b"rejected-ttl-expired",
    RefuseReason.SHED: b"evicted-priority",
    RefuseReason.DRAINING: b"rejected-shutting-down",
}
"""llm-d's words (llm-d-router ebab6879) for a request that was dropped for lack of capacity."""


class UnknownMessageError(ValueError):
    """The message is none of those that Envoy 1.37 sends."""


def decode(raw: bytes) -> FromEnvoy:
    """Read a ProcessingRequest.

    Raises:
        UnknownMessageError: if it is no such message, or one of a kind that is not known.
    """
    try:
        message = pb.ProcessingRequest.FromString(raw)
    except Exception as error:
        # upb raises google.protobuf.message.DecodeError, other implementations more than that.
        raise UnknownMessageError("the message is no ProcessingRequest") from error
    kind = message.WhichOneof("request")
    reader = _READERS.get(kind)
    if reader is None:
        raise UnknownMessageError("the message is neither headers, nor body, nor trailers")
    return reader(message)


def encode(answer: Answer, path: str = "") -> bytes:
    """Write a ProcessingResponse; an error of ours in the form of the API at `path`."""
    response = pb.ProcessingResponse()
    match answer:
        case AnswerBody():
            _write_body(response, answer)
        case AnswerHead():
            _write_head(response, answer)
        case AnswerTrailers(is_request):
            (response.request_trailers if is_request else response.response_trailers).SetInParent()
        case Immediate(refusal):
            _write_immediate(response, refusal, path)
    return bytes(response.SerializeToString())


def dropped_reason(reason: RefuseReason) -> bytes | None:
    """llm-d's word for a refusal; None where the request was not dropped for lack of capacity."""
    return _DROPPED.get(reason)


def _headers(fields: Any) -> list[tuple[bytes, bytes]]:
    return [(h.key.encode("latin-1", "replace"), h.raw_value or h.value.encode()) for h in fields.headers]


def _read_request_head(message: Any) -> RequestHead:
    head = message.request_headers
    return RequestHead(
        headers=_headers(head.headers),
        is_end=head.end_of_stream,
        subset=_subset(message) if message.HasField("metadata_context") else None,
        modes=_modes(message),
        is_watched=message.observability_mode,
    )


def _modes(message: Any) -> Modes | None:
    if not message.HasField("protocol_config"):
        return None
    config = message.protocol_config
    return Modes(
        _mode(config.request_body_mode),
        _mode(config.response_body_mode),
        config.send_body_without_waiting_for_header_response,
    )


def _mode(value: int) -> BodyMode:
    return BodyMode(value) if value in _MODES else BodyMode.GRPC


def _subset(message: Any) -> frozenset[str] | None:
    """The addresses that may be picked: a list of them, or one string with commas; None where unsaid."""
    hints = message.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in hints or SUBSET_KEY not in hints[SUBSET_NAMESPACE].fields:
        return None
    value = hints[SUBSET_NAMESPACE].fields[SUBSET_KEY]
    listed = [item.string_value for item in value.list_value.values]
    parts = (part.strip() for text in [*listed, value.string_value] for part in text.split(","))
    return frozenset(part for part in parts if part)


def _read_response_head(message: Any) -> ResponseHead:
    head = message.response_headers
    return ResponseHead(
        headers=_headers(head.headers),
        is_end=head.end_of_stream,
        served_by=_served_by(message),
        details=_details(message),
        modes=_modes(message),
    )


def _served_by(message: Any) -> str | None:
    metadata = message.metadata_context.filter_metadata
    if LB_NAMESPACE not in metadata or SERVED_KEY not in metadata[LB_NAMESPACE].fields:
        return None
    return metadata[LB_NAMESPACE].fields[SERVED_KEY].string_value or None


def _details(message: Any) -> str:
    attributes = message.attributes
    if ATTRIBUTES_NAMESPACE not in attributes or CODE_DETAILS not in attributes[ATTRIBUTES_NAMESPACE].fields:
        return ""
    return str(attributes[ATTRIBUTES_NAMESPACE].fields[CODE_DETAILS].string_value)


def _read_request_body(message: Any) -> RequestBody:
    body = message.request_body
    return RequestBody(body.body, body.end_of_stream)


def _read_response_body(message: Any) -> ResponseBody:
    body = message.response_body
    return ResponseBody(body.body, body.end_of_stream)


_READERS: dict[str | None, Callable[[Any], FromEnvoy]] = {
    "request_headers": _read_request_head,
    "request_body": _read_request_body,
    "request_trailers": lambda _message: RequestTrailers(),
    "response_headers": _read_response_head,
    "response_body": _read_response_body,
    "response_trailers": lambda _message: ResponseTrailers(),
}


def _write_body(response: Any, answer: AnswerBody) -> None:
    common = (response.request_body if answer.is_request else response.response_body).response
    if answer.is_streamed:
        streamed = common.body_mutation.streamed_response
        if answer.data:
            streamed.body = bytes(answer.data)
        streamed.end_of_stream = answer.is_end
        return
    common.SetInParent()
    if answer.data:
        common.body_mutation.body = bytes(answer.data)
    elif answer.data is not None:
        common.body_mutation.clear_body = True
    if answer.route is not None:
        _write_route(response, common, answer.route)


def _write_head(response: Any, answer: AnswerHead) -> None:
    common = (response.request_headers if answer.is_request else response.response_headers).response
    common.SetInParent()
    if answer.is_buffering:
        response.mode_override.request_body_mode = _BUFFERED
    if answer.route is not None:
        _write_route(response, common, answer.route)
        return
    if answer.headers or answer.removed:
        _mutate(common.header_mutation, answer.headers, answer.removed)


def _write_route(response: Any, common: Any, route: Route) -> None:
    """The destination goes out twice, as the protocol asks: in a header and in dynamic metadata."""
    common.clear_route_cache = True
    destination = (DESTINATION_ENDPOINT, route.destination.encode())
    _mutate(common.header_mutation, [destination, *route.headers], route.removed)
    balancing = response.dynamic_metadata.fields[LB_NAMESPACE].struct_value
    balancing.fields[DESTINATION_KEY].string_value = route.destination


def _mutate(mutation: Any, headers: Iterable[tuple[bytes, bytes]], removed: Iterable[bytes]) -> None:
    add = mutation.set_headers.add
    for name, value in headers:
        option = add()
        option.header.key = name.decode("latin-1")
        option.header.raw_value = value
        option.append_action = _OVERWRITE
    mutation.remove_headers.extend(name.decode("latin-1") for name in removed)


def _write_immediate(response: Any, refusal: Refusal, path: str) -> None:
    immediate = response.immediate_response
    immediate.status.code = refusal.status
    immediate.body = refusal.body(path)
    immediate.details = f"pdcoord_refused_{refusal.reason.value.replace('-', '_')}"
    headers = refusal.headers()
    dropped = dropped_reason(refusal.reason)
    if dropped is not None:
        headers.append((DROPPED_REASON, dropped))
    _mutate(immediate.headers, headers, ())
