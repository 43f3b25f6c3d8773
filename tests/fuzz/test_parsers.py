"""Every parser of bytes from outside, fed with noise, mutated examples and what once failed.

A parser either reads what it is given or raises the error that its callers expect. An input that once failed
is a file in corpus/PARSER/; any name will do. PDCOORD_FUZZ_EXAMPLES is how many inputs each parser gets.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdcoord.core.fleet import EndpointId
from pdcoord.extproc import codec as envoy
from pdcoord.feeds.kvdecode import BatchError, decode_batch
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.load import parse_policies
from pdcoord.protocol import control_codec
from pdcoord.protocol.control import ControlError
from pdcoord.protocol.errors import RefusedError
from pdcoord.protocol.headers import parse_host_port
from pdcoord.protocol.openai import APIS, parse_call
from pdcoord.protocol.plans import PlanHeaderError, decode_plan, decode_served
from pdcoord.protocol.signing import KeysError, read_keys
from pdcoord.protocol.tickets import decode_pairing, decode_prefill_answer
from pdcoord.protocol.trace import read_trace
from pdcoord.resume.continuation import Continuation, continue_stream, count_request
from pdcoord.resume.errors import TornError, UnreadableError
from pdcoord.resume.opening import Opening
from pdcoord.resume.passed import read_passed
from pdcoord.resume.tape import Shelf, Tape
from pdcoord.sim.faults import FaultsBodyError, parse_faults
from pdcoord.wire.heads import request_fault
from transfer.errors import FrameError
from transfer.session.frames import FrameReader
from transfer.session.frames import decode as decode_message

EXAMPLES = int(os.environ.get("PDCOORD_FUZZ_EXAMPLES", "60"))
CORPUS = Path(__file__).with_name("corpus")

CHAT = b'{"model":"m","messages":[{"role":"user","content":"Hi"}],"stream":true,"max_tokens":9,"stop":["x"]}'
COMPLETION = (
    b'{"model":"m","prompt":[1,2,3],"stream":true,"max_tokens":9,"return_token_ids":true,"logprobs":1}'
)
CHAT_EVENTS = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"content":" baba"},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":3,'
    b'"total_tokens":4,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
)
EVENTS = (
    b'data: {"id":"c","object":"text_completion","created":1,"model":"m","choices":[{"index":0,'
    b'"text":" baba","logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":[256],'
    b'"prompt_token_ids":[1,2,3]}]}\n\n'
    b": ping\r\n\r\n"
    b'event: e\ndata: {"error":{"message":"m","type":"t","param":null,"code":500}}\n\ndata: [DONE]\n\n'
)
PLAN = (
    b'{"v":1,"mode":"split","attempt":0,"prefills":[{"address":"10.0.0.1:8000"}],"dialect":"nixlv2",'
    b'"is_colocated_allowed":true,"resumes":["10.0.0.2:8000"],"prefill_deadline_ms":100}'
)
POLICY = b"""apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: m}
model: {name: m}
pools:
- {name: a, role: both, vendor: v, engine: vllm, connector: none, layout: {block_tokens: 16},
   kv_bytes_per_token: 1024, speed: {step_base_ms: 1}, endpoints: [{name: x, address: "10.0.0.1:80"}]}
"""
BATCH = msgspec.msgpack.encode(
    [1.5, [{"type": "BlockStored", "block_hashes": [b"a" * 32], "parent_block_hash": None,
            "token_ids": [1, 2], "block_size": 2, "lora_id": None, "medium": "GPU"},
           ["BlockRemoved", [7], "GPU"], {"type": "AllBlocksCleared"}], 0]
)  # fmt: skip
LIFE_OF_A_FRAME = b"\x00\x00\x00\x03abc\x00\x00\x00\x01z"


@dataclass(frozen=True)
class Parser:
    """One way in.

    Attributes:
        errors: what it may raise.
        examples: well-formed inputs to start from.
    """

    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = ()
    examples: tuple[bytes, ...] = (b"",)


def heads(raw: bytes) -> None:
    """A request's version, method, target and headers, a line each."""
    version, method, target, *lines = [*raw.split(b"\n"), b"", b""][: max(3, raw.count(b"\n") + 1)]
    pairs = [(name, value) for name, _, value in (line.partition(b":") for line in lines)]
    request_fault(version.decode("latin-1"), method, target, pairs)
    read_trace(pairs)


def calls(raw: bytes) -> None:
    """A body as every API's."""
    for api in APIS.values():
        try:
            parse_call(api, raw)
        except RefusedError as error:
            assert error.refusal.message


def opening(raw: bytes) -> None:
    for size in (1, 7, 4096):
        reader = Opening(b"text/event-stream")
        for at in range(0, len(raw), size):
            reader.feed(raw[at : at + size])
        reader.end()
        assert bytes(reader.held) == raw


def tape(raw: bytes) -> None:
    """Whatever comes is passed on in order, but for an error event and what follows it; bounds are kept."""
    shelf = Shelf(2_000, 1_000)
    kept = Tape(shelf, b"{}")
    out = b""
    try:
        for at in range(0, len(raw), 11):
            out += kept(raw[at : at + 11])
    except TornError as error:
        assert raw.startswith(out + kept.pending + error.error_event)
    else:
        assert out + kept.pending == raw
    assert shelf.bytes_held <= 2_000
    kept.close()
    assert shelf.bytes_held == 0


def continuation(raw: bytes) -> None:
    """A stream that broke off here, of either API; what goes on takes the same bytes without a crash."""
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        count_request(path, body, raw)
        found = continue_stream(path, body, raw, counted_tokens=3, context_tokens_max=1_000)
        if isinstance(found, Continuation):
            msgspec.json.decode(found.body)
            try:
                found.splice(raw)
            except (UnreadableError, TornError):
                continue


def continued_call(raw: bytes) -> None:
    """A call that was let through, whose stream breaks off."""
    for path, passed in (("/v1/chat/completions", CHAT_EVENTS), ("/v1/completions", EVENTS)):
        count_request(path, raw, passed)
        continue_stream(path, raw, passed, counted_tokens=3, context_tokens_max=1_000)


def frames(raw: bytes) -> None:
    reader = FrameReader(1_000)
    for at in range(0, len(raw), 5):
        for body in reader.feed(raw[at : at + 5]):
            assert 0 < len(body) <= 1_000
    assert reader.held_bytes <= 1_004
    reader.close()


def host_port(raw: bytes) -> None:
    parse_host_port(raw.decode("latin-1"))


def keys(raw: bytes) -> None:
    read_keys(raw.decode("utf-8", "replace"))


PARSERS: dict[str, Parser] = {
    "heads": Parser(
        heads, (), (b"1.1\nPOST\n/v1/completions\nhost: a\ncontent-length: 3\ntraceparent: 00-1-2-01",)
    ),
    "calls": Parser(calls, (), (CHAT, COMPLETION, b'{"model":"m","input":["a",[1,2]]}')),
    "opening": Parser(opening, (), (CHAT_EVENTS, EVENTS)),
    "tape": Parser(tape, (), (CHAT_EVENTS, EVENTS)),
    "passed": Parser(read_passed, (UnreadableError,), (CHAT_EVENTS, EVENTS)),
    "continuation": Parser(continuation, (), (CHAT_EVENTS, EVENTS)),
    "continued-call": Parser(continued_call, (), (CHAT, COMPLETION)),
    "plan": Parser(decode_plan, (PlanHeaderError,), (PLAN,)),
    "served": Parser(decode_served, (), (b'{"v":1,"mode":"split","attempt":0,"rungs":[],"prefill_ms":3}',)),
    "pairing": Parser(decode_pairing, (), (b'{"pdcoord":{"version":1,"transfer":"' + b"0" * 32 + b'"}}',)),
    "prefill-answer": Parser(
        decode_prefill_answer,
        (ValueError,),
        (b'{"kv_transfer_params":{"remote_host":"h"},"usage":{"prompt_tokens":3}}',),
    ),
    "report": Parser(control_codec.decode_report, (ControlError,), (b"\x0a\x02\x08\x01",)),
    "notice": Parser(control_codec.decode_notice, (ControlError,), (b"\x0a\x02\x08\x01",)),
    "plan-keys": Parser(keys, (KeysError,), (b"# c\nnew:" + b"k" * 40 + b"\nold:" + b"j" * 40,)),
    "kv-events": Parser(lambda raw: decode_batch(raw, EndpointId("e")), (BatchError,), (BATCH,)),
    "frames": Parser(frames, (FrameError,), (LIFE_OF_A_FRAME,)),
    "messages": Parser(decode_message, (FrameError,), (msgspec.msgpack.encode({"type": "hello", "v": 1}),)),
    "policy": Parser(lambda raw: parse_policies(raw, "p.yaml"), (PolicyError,), (POLICY,)),
    "faults": Parser(parse_faults, (FaultsBodyError,), (b'{"faults":[{"kind":"slow","factor":0.5}]}',)),
    "envoy": Parser(envoy.decode, (ValueError,), (b"\x12\x02\x0a\x00",)),
    "host-port": Parser(host_port, (ValueError,), (b"10.0.0.1:80", b"[::1]:443")),
}


def attempt(name: str, raw: bytes) -> None:
    """Let a parser read; what it may raise is its answer."""
    parser = PARSERS[name]
    try:
        parser.read(raw)
    except parser.errors:
        return


@st.composite
def mutated(draw: st.DrawFn, examples: tuple[bytes, ...]) -> bytes:
    """An example with a few places cut out, doubled, written over or grown."""
    raw = draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(raw)))
        end = min(len(raw), begin + draw(st.integers(0, 40)))
        how = draw(st.sampled_from(["cut", "double", "write", "take"]))
        if how == "cut":
            raw = raw[:begin] + raw[end:]
        elif how == "double":
            raw = raw[:end] + raw[begin:]
        elif how == "write":
            raw = raw[:begin] + draw(st.binary(max_size=12)) + raw[end:]
        else:
            other = draw(st.sampled_from(examples))
            raw = raw[:begin] + other[begin:end] + raw[begin:]
    return raw


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_parser_reads_or_refuses(name: str, data: st.DataObject) -> None:
    inputs = st.one_of(
        mutated(PARSERS[name].examples), mutated(PARSERS[name].examples), st.binary(max_size=400)
    )
    attempt(name, data.draw(inputs))


@pytest.mark.parametrize(
    "path", sorted(CORPUS.rglob("*.bin")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_what_once_failed_does_so_no_more(path: Path) -> None:
    attempt(path.parent.name, path.read_bytes())


def test_every_corpus_has_its_parser() -> None:
    assert {each.name for each in CORPUS.iterdir()} <= set(PARSERS)
