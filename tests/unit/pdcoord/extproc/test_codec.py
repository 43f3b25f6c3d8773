"""Envoy's messages to plain data and back."""

from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.extproc.codec import UnknownMessageError, decode, dropped_reason, encode
from pdcoord.extproc.vocabulary import (
    Answer,
    AnswerBody,
    AnswerHead,
    AnswerTrailers,
    BodyMode,
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

VALUE = st.binary(min_size=1, max_size=20).filter(lambda value: b"\0" not in value)


def answered(answer: Answer) -> Any:
    return pb.ProcessingResponse.FromString(encode(answer))


def mutations(mutation: Any) -> dict[str, bytes]:
    assert all(option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD for option in mutation.set_headers)
    return {option.header.key: option.header.raw_value for option in mutation.set_headers}


def head_message(headers: list[tuple[str, bytes]], *, is_raw: bool = True) -> Any:
    message = pb.ProcessingRequest()
    message.request_headers.SetInParent()
    for name, value in headers:
        header = message.request_headers.headers.headers.add(key=name)
        if is_raw:
            header.raw_value = value
        else:
            header.value = value.decode()
    return message


@given(st.lists(VALUE, max_size=5), st.booleans())
def test_headers_keep_their_bytes_and_order(values: list[bytes], is_end: bool) -> None:
    message = head_message([(f"x-{index}", value) for index, value in enumerate(values)])
    message.request_headers.end_of_stream = is_end
    expected = [(f"x-{index}".encode(), value) for index, value in enumerate(values)]
    assert decode(message.SerializeToString()) == RequestHead(expected, is_end)


def test_an_older_envoy_sends_values_as_text() -> None:
    message = head_message([(":path", b"/v1/models")], is_raw=False)
    assert decode(message.SerializeToString()) == RequestHead([(b":path", b"/v1/models")])


def test_the_first_message_tells_the_modes() -> None:
    message = head_message([])
    message.protocol_config.request_body_mode = 2
    message.protocol_config.response_body_mode = 0
    message.protocol_config.send_body_without_waiting_for_header_response = True
    found = decode(message.SerializeToString())
    assert isinstance(found, RequestHead)
    assert found.modes == Modes(BodyMode.BUFFERED, BodyMode.NONE, is_body_early=True)
    message.protocol_config.request_body_mode = 99
    found = decode(message.SerializeToString())
    assert isinstance(found, RequestHead)
    assert found.modes is not None
    assert found.modes.request_body is BodyMode.GRPC


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (None, None),
        ([], frozenset()),
        ("", frozenset()),
        (["10.0.0.1:80", "10.0.0.2:80"], {"10.0.0.1:80", "10.0.0.2:80"}),
        ("10.0.0.1:80, 10.0.0.2", {"10.0.0.1:80", "10.0.0.2"}),
    ],
)
def test_a_subset_is_a_list_or_one_text(hint: list[str] | str | None, expected: set[str] | None) -> None:
    message = head_message([])
    metadata = message.metadata_context.filter_metadata
    metadata["somebody.else"].update({"x": 1})
    if hint is not None:
        metadata["envoy.lb.subset_hint"].update({"x-gateway-destination-endpoint-subset": hint})
    found = decode(message.SerializeToString())
    assert isinstance(found, RequestHead)
    assert found.subset == expected


def test_a_response_tells_who_answered_and_envoys_own_details() -> None:
    message = pb.ProcessingRequest()
    message.response_headers.headers.headers.add(key=":status", raw_value=b"200")
    assert decode(message.SerializeToString()) == ResponseHead([(b":status", b"200")])
    metadata = message.metadata_context.filter_metadata["envoy.lb"]
    metadata.update({"x-gateway-destination-endpoint-served": "10.0.0.2:80"})
    message.attributes["envoy.filters.http.ext_proc"].update({"response.code_details": "via_upstream"})
    found = decode(message.SerializeToString())
    assert found == ResponseHead([(b":status", b"200")], served_by="10.0.0.2:80", details="via_upstream")


def test_bodies_and_trailers() -> None:
    for kind, made in (("request_body", RequestBody), ("response_body", ResponseBody)):
        message = pb.ProcessingRequest()
        getattr(message, kind).body = b"\x00abc"
        getattr(message, kind).end_of_stream = True
        assert decode(message.SerializeToString()) == made(b"\x00abc", is_end=True)
    for kind, trailers in (
        ("request_trailers", RequestTrailers()),
        ("response_trailers", ResponseTrailers()),
    ):
        message = pb.ProcessingRequest()
        getattr(message, kind).SetInParent()
        assert decode(message.SerializeToString()) == trailers


@pytest.mark.parametrize("raw", [b"", b"\xff\xff", b"\x0a"])
def test_what_is_no_message_is_said_so(raw: bytes) -> None:
    with pytest.raises(UnknownMessageError):
        decode(raw)


def test_a_route_goes_out_in_a_header_and_in_metadata_with_one_value() -> None:
    route = Route("10.0.0.1:80,10.0.0.2:80", [(b"x-a", b"\xe4")], [b"x-b"])
    for answer in (AnswerHead(is_request=True, route=route), AnswerBody(is_request=True, route=route)):
        response = answered(answer)
        part = response.request_headers if isinstance(answer, AnswerHead) else response.request_body
        assert part.response.clear_route_cache
        found = mutations(part.response.header_mutation)
        assert found == {"x-gateway-destination-endpoint": b"10.0.0.1:80,10.0.0.2:80", "x-a": b"\xe4"}
        assert list(part.response.header_mutation.remove_headers) == ["x-b"]
        in_metadata = response.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"]
        assert in_metadata == "10.0.0.1:80,10.0.0.2:80"


def test_heads_without_a_route() -> None:
    response = answered(AnswerHead(is_request=True, is_buffering=True))
    assert response.WhichOneof("response") == "request_headers"
    assert response.mode_override.request_body_mode == BodyMode.BUFFERED
    response = answered(AnswerHead(is_request=False, headers=[(b"x-a", b"1")], removed=[b"x-b"]))
    assert mutations(response.response_headers.response.header_mutation) == {"x-a": b"1"}
    assert list(response.response_headers.response.header_mutation.remove_headers) == ["x-b"]


def test_parts_of_bodies() -> None:
    response = answered(
        AnswerBody(is_request=False, data=memoryview(b"abc")[1:], is_end=True, is_streamed=True)
    )
    streamed = response.response_body.response.body_mutation.streamed_response
    assert (streamed.body, streamed.end_of_stream) == (b"bc", True)
    response = answered(AnswerBody(is_request=True))
    assert response.WhichOneof("response") == "request_body"
    assert not response.request_body.response.HasField("body_mutation")
    response = answered(AnswerBody(is_request=True, data=b"all"))
    assert response.request_body.response.body_mutation.body == b"all"
    response = answered(AnswerBody(is_request=True, data=b""))
    assert response.request_body.response.body_mutation.clear_body


@pytest.mark.parametrize("is_request", [True, False])
def test_trailers_are_answered(is_request: bool) -> None:
    kind = "request_trailers" if is_request else "response_trailers"
    assert answered(AnswerTrailers(is_request)).WhichOneof("response") == kind


@pytest.mark.parametrize("reason", list(RefuseReason))
def test_a_refusal_is_an_openai_error_with_its_status(reason: RefuseReason) -> None:
    refusal = Refusal(reason, "Why.", retry_after_s=3)
    immediate = answered(Immediate(refusal)).immediate_response
    assert immediate.status.code == refusal.status
    assert immediate.body == refusal.body()
    found = mutations(immediate.headers)
    assert found["retry-after"] == b"3"
    assert found["x-pdcoord-reason"] == reason.value.encode()
    assert found.get("x-llm-d-request-dropped-reason") == dropped_reason(reason)
    is_for_capacity = (refusal.status == 429 and reason is not RefuseReason.RATE_LIMITED) or reason in {
        RefuseReason.NO_ENDPOINTS,
        RefuseReason.LADDER_EXHAUSTED,
        RefuseReason.DRAINING,
    }
    assert (dropped_reason(reason) is not None) is is_for_capacity
