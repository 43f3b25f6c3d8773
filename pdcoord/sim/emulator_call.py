"""What a client asks of an emulated engine: read as vLLM 0.32 and SGLang 0.5.23 read it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.protocol.errors import RefusedError, RefuseReason
from pdcoord.protocol.headers import HostPort, format_host_port, parse_host_port
from pdcoord.protocol.openai import APIS, TOKEN_ID_MAX, Api, Body, Call, parse_call
from pdcoord.protocol.tickets import ROOM_MAX, TICKET_FIELD
from pdcoord.sim import text
from pdcoord.sim.messages import KvTicket, RemoteTicket, RoomCall
from pdcoord.sim.settings import EngineSettings
from transfer.verdict import Connector

STOP_STRINGS_MAX = 16
COMPLETION_TOKENS = 16
"""What a completion ends after that names no limit (vLLM 0.32)."""
REAL_KV = "emulated_kv"
"""A body field of the emulator's own: move real KV. It takes the time of this machine, not the vendor's."""
_HEX_ID = re.compile("[0-9a-f]{32}")


class CallError(Exception):
    """A call that an engine answers with an error of its own.

    Attributes:
        kind: the engine's word for it, as in `BadRequestError`.
    """

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param


def bad_request(message: str, param: str | None = None) -> CallError:
    return CallError(400, "BadRequestError", message, param)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a call, with where its KV comes from."""

    ids: tuple[int, ...]
    room: RoomCall | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A generating call, ready to be run.

    Attributes:
        choices_each: answers wanted for each prompt.
        is_prefill_leg, ticket, kv: of the first choice of the first prompt; the others compute alone.
        shows_stop: include_stop_str_in_output.
        wants_bytes: move real KV as well, if this engine holds any.
        wants_ids: return_token_ids.
        wants_usage: a last chunk with the usage; wants_usage_always: usage in every chunk.
    """

    call: Call
    prompts: tuple[Prompt, ...]
    choices_each: int
    output_tokens_max: int | None
    ignores_eos: bool
    stops: tuple[str, ...]
    shows_stop: bool
    is_prefill_leg: bool
    ticket: RemoteTicket | None
    kv: KvTicket | None
    wants_bytes: bool
    wants_ids: bool
    wants_usage: bool
    wants_usage_always: bool


def read_call(path: str, raw: bytes, settings: EngineSettings) -> Call:
    """Read a body; a call that names no model is for the one there is.

    Raises:
        CallError: 400, or 404 for another model.
    """
    api = APIS[path]
    try:
        call = _parse(api, raw, settings.model)
    except RefusedError as error:
        refusal = error.refusal
        raise CallError(refusal.status, "BadRequestError", refusal.message, refusal.param) from error
    if call.model != settings.model:
        raise CallError(404, "NotFoundError", f"The model `{call.model}` does not exist.", "model")
    return call


def _parse(api: Api, raw: bytes, model: str) -> Call:
    try:
        return parse_call(api, raw)
    except RefusedError as error:
        if error.refusal.reason is not RefuseReason.INVALID_FIELD or error.refusal.param != "model":
            raise
        body = msgspec.json.decode(raw)
        if body.get("model") is not None:
            raise
        return parse_call(api, msgspec.json.encode({**body, "model": model}))


def read_generation(
    call: Call, headers: Sequence[tuple[bytes, bytes]], settings: EngineSettings
) -> Generation:
    """Make prompts of a generating call.

    Raises:
        CallError: 400.
    """
    body = call.body
    params = body.get(TICKET_FIELD)
    params = params if isinstance(params, dict) and settings.connector is not Connector.NONE else {}
    if settings.connector is not Connector.PDCOORD:
        params = {name: value for name, value in params.items() if name != "pdcoord"}
    prompts = _prompts(call, params, settings)
    rooms = _rooms(body, dict(headers), len(prompts), settings)
    limit = _limit(call)
    for ids in prompts:
        _check_length(ids, limit, settings)
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    return Generation(
        call=call,
        prompts=tuple(Prompt(tuple(ids), room) for ids, room in zip(prompts, rooms, strict=True)),
        choices_each=call.choice_count // len(prompts),
        output_tokens_max=limit,
        ignores_eos=body.get("ignore_eos") is True,
        stops=_stops(body),
        shows_stop=body.get("include_stop_str_in_output") is True,
        is_prefill_leg=settings.engine is EngineKind.VLLM and params.get("do_remote_decode") is True,
        ticket=read_ticket(params) if settings.engine is EngineKind.VLLM else None,
        kv=read_kv(params),
        wants_bytes=settings.moves_bytes_always or body.get(REAL_KV) is True,
        wants_ids=body.get("return_token_ids") is True,
        wants_usage=options.get("include_usage") is True,
        wants_usage_always=options.get("continuous_usage_stats") is True,
    )


def _prompts(call: Call, params: dict[str, Any], settings: EngineSettings) -> list[list[int]]:
    """Token ids of every prompt; vLLM takes those of a ticket in place of a chat's text."""
    if call.api.path == "/v1/completions":
        return _completion_prompts(call.body.get("prompt"))
    ids = params.get("prompt_token_ids")
    if isinstance(ids, list) and ids and _are_counts(ids):
        return [ids]
    return [text.encode(render(call, is_deaf=settings.is_template_deaf))]


def _completion_prompts(prompt: Any) -> list[list[int]]:
    if prompt is None:
        raise bad_request("'prompt_embeds' is not supported by an emulated engine; send 'prompt'.", "prompt")
    items = prompt if isinstance(prompt, list) else [prompt]
    if items and isinstance(items[0], int):
        items = [items]
    prompts = [list(item) if isinstance(item, list) else text.encode(item) for item in items]
    if not prompts or not all(prompts):
        raise bad_request("The decoder prompt cannot be empty", "prompt")
    return prompts


def render(call: Call, *, is_deaf: bool = False) -> str:
    """A chat as the model's template writes it, with the beginning of the answer if it is to be continued.

    Args:
        is_deaf: the template has never heard of that, and ends what is to be continued.

    Raises:
        CallError: 400 if it is said to be continued and begun at once, as vLLM's default is to begin one.
    """
    body = call.body
    heads = [name for name in ("tools", "system", "instructions") if body.get(name) is not None]
    parts = [f"<|{name}|>\n{_content(body[name])}\n" for name in heads]
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list):
        parts.extend(_message(message) for message in messages)
    else:
        parts.append(f"<|user|>\n{_content(messages)}\n")
    begins = body.get("add_generation_prompt", True) is True
    if body.get("continue_final_message") is not True:
        return "".join(parts) + ("<|assistant|>\n" if begins else "")
    if begins:
        raise bad_request("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    return "".join(parts) if is_deaf else "".join(parts).removesuffix("\n")


def _message(message: Any) -> str:
    if not isinstance(message, dict):
        return f"<|user|>\n{_content(message)}\n"
    rest = {k: v for k, v in message.items() if k not in {"role", "content"} and v is not None}
    extra = _content(rest) if rest else ""
    return f"<|{message.get('role', 'user')}|>\n{_content(message.get('content', ''))}{extra}\n"


def _content(content: Any) -> str:
    """Text as it is, text parts joined, anything else as JSON."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(
            part["text"]
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else msgspec.json.encode(part).decode()
            for part in content
        )
    return msgspec.json.encode(content).decode()


def _limit(call: Call) -> int | None:
    limit = call.output_tokens_max
    if limit is None and call.api.path == "/v1/completions":
        return COMPLETION_TOKENS
    if limit is not None and limit < 1:
        raise bad_request(f"max_tokens must be at least 1, got {limit}.", "max_tokens")
    return limit


def _check_length(ids: Sequence[int], limit: int | None, settings: EngineSettings) -> None:
    context = settings.context_tokens_max
    wanted = len(ids) + (1 if limit is None else limit)
    if wanted > context:
        asked = f"{len(ids)} in the messages" + ("" if limit is None else f", {limit} in the completion")
        raise bad_request(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{wanted if limit is not None else len(ids)} tokens ({asked}). Please reduce the length of "
            "the messages or completion."
        )


def _stops(body: Body) -> tuple[str, ...]:
    stop = body.get("stop", body.get("stop_sequences"))
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise bad_request("'stop' is not a string or a list of strings.", "stop")
    if len(stops) > STOP_STRINGS_MAX:
        raise bad_request(f"'stop' has {len(stops)} strings, expected at most {STOP_STRINGS_MAX}.", "stop")
    return tuple(each for each in stops if each)


def read_ticket(params: dict[str, Any]) -> RemoteTicket | None:
    """A decode leg's ticket; None without one, and for one that vLLM would not use.

    vLLM 0.32 warns of a ticket that lacks a field and computes the prompt itself.
    """
    if params.get("do_remote_prefill") is not True:
        return None
    blocks, count = params.get("remote_block_ids"), params.get("remote_num_tokens")
    engine_id, request_id = params.get("remote_engine_id"), params.get("remote_request_id")
    address = _address(params.get("remote_host"), params.get("remote_port"))
    kv = read_kv(params)
    if address is not None and kv is not None and engine_id is None:
        return RemoteTicket("", kv.transfer, (), address, kv=kv)
    if address is None or not isinstance(engine_id, str) or not isinstance(request_id, str):
        return None
    if not isinstance(blocks, list) or not blocks:
        return None
    # Before hybrid models the ids were one flat list.
    groups = blocks if isinstance(blocks[0], list) else [blocks]
    if not all(isinstance(group, list) and _are_counts(group) for group in groups):
        return None
    return RemoteTicket(
        engine_id=engine_id,
        request_id=request_id,
        block_ids=tuple(tuple(group) for group in groups),
        address=address,
        token_count=count if isinstance(count, int) and count > 0 else None,
        kv=kv,
    )


def read_kv(params: dict[str, Any]) -> KvTicket | None:
    """The transfer that a leg of connector pdcoord names; None if it names none, or wrongly."""
    ours = params.get("pdcoord")
    if not isinstance(ours, dict):
        return None
    texts = [ours.get(name, "") for name in ("transfer", "nonce", "address", "epoch")]
    if not all(isinstance(text, str) for text in texts) or not all(map(_HEX_ID.fullmatch, texts[:2])):
        return None
    return KvTicket(*texts)


def _address(host: Any, port: Any) -> HostPort | None:
    """Where a peer is; None if it can be nowhere."""
    if not isinstance(host, str) or not isinstance(port, int):
        return None
    address = format_host_port(host, port)
    try:
        parse_host_port(address.encode("ascii").decode())
    except ValueError:
        return None
    return address


def _are_counts(values: list[Any]) -> bool:
    """Whether these are whole numbers as token and block ids are."""
    return all(
        isinstance(each, int) and not isinstance(each, bool) and 0 <= each <= TOKEN_ID_MAX for each in values
    )


_ROOM_FIELDS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


def _rooms(
    body: Body, headers: dict[bytes, bytes], count: int, settings: EngineSettings
) -> list[RoomCall | None]:
    """SGLang's rendezvous for each prompt, from the body or the override headers."""
    if settings.engine is not EngineKind.SGLANG or settings.role is Role.BOTH:
        return [None] * count
    values: list[list[Any]] = []
    for name in _ROOM_FIELDS:
        override = headers.get(f"x-override-{name.replace('_', '-')}".encode())
        given: Any = body.get(name) if override is None else override.decode("ascii", "replace")
        values.append(given if isinstance(given, list) else [given] * count)
    if any(len(each) != count for each in values):
        raise bad_request(f"bootstrap fields are lists of another length than the {count} prompts.")
    return [_room(*each) for each in zip(*values, strict=True)]


def _room(host: Any, port: Any, room: Any) -> RoomCall:
    numbers = [int(each) if isinstance(each, str) and each.isdigit() else each for each in (port, room)]
    port, room = numbers
    if room is None:
        raise bad_request("Disaggregated request received without bootstrap room id.", "bootstrap_room")
    if not isinstance(room, int) or isinstance(room, bool) or not 0 <= room <= ROOM_MAX:
        raise bad_request(f"'bootstrap_room' is not a whole number in 0..{ROOM_MAX}.", "bootstrap_room")
    address = _address(host, 8_998 if port is None else port)
    if address is None:
        raise bad_request(
            "'bootstrap_host' and 'bootstrap_port' are not a host and a port.", "bootstrap_host"
        )
    return RoomCall(address, room)
