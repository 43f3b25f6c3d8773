"""Reads a client's own call as far as continuing its stream needs it, and says what of it forbids that.

Fields: OpenAI API reference (2026-11), vLLM 0.32 ChatCompletionRequest and CompletionRequest, SGLang 0.5.23.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from pdcoord.resume.errors import UnreadableError
from pdcoord.resume.passed import Fields
from pdcoord.resume.unresumable import Unresumable

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
COMPLETION_TOKENS = 16
"""What a completion without max_tokens is limited to; a chat is by its context alone."""

# Members that change nothing in how tokens follow from a prompt and what was output, or that the continuing
# call repeats with the same effect. A seed draws other tokens of the same distribution.
_HARMLESS = frozenset(
    """
    model messages prompt stream stream_options max_tokens max_completion_tokens min_tokens temperature top_p
    top_k min_p top_a typical_p repetition_penalty length_penalty seed stop stop_token_ids ignore_eos
    include_stop_str_in_output no_stop_trim skip_special_tokens spaces_between_special_tokens logit_bias
    allowed_token_ids logprobs top_logprobs logprob_token_ids return_tokens_as_token_ids return_token_ids
    return_prompt_text return_token_offsets add_special_tokens add_generation_prompt continue_final_message
    documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs mm_payload
    return_mm_kwargs routed_experts_prompt_start stream_interval priority request_id rid session_id cache_salt
    extra_key kv_transfer_params ec_transfer_params bootstrap_host bootstrap_port bootstrap_room lora_path
    user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention verbosity
    modalities tools tool_choice parallel_tool_calls functions function_call response_format include_reasoning
    separate_reasoning stream_reasoning n best_of return_cached_tokens_details
    """.split()  # noqa: SIM905  # as a literal it is a page
)
# Members that forbid it when they say anything but null, false, zero or nothing.
_FORBIDDING = {
    "use_beam_search": Unresumable.BEAM_SEARCH,
    "echo": Unresumable.ECHO,
    "prompt_logprobs": Unresumable.ECHO,
    "suffix": Unresumable.SUFFIX,
    "prompt_embeds": Unresumable.PROMPT_EMBEDS,
    "input_embeds": Unresumable.PROMPT_EMBEDS,
    "frequency_penalty": Unresumable.PENALTIES,
    "presence_penalty": Unresumable.PENALTIES,
    "bad_words": Unresumable.OUTPUT_HISTORY,
    "repetition_detection": Unresumable.OUTPUT_HISTORY,
    "no_repeat_ngram_size": Unresumable.OUTPUT_HISTORY,
    "stop_regex": Unresumable.OUTPUT_HISTORY,
    "watermarking": Unresumable.OUTPUT_HISTORY,
    "logits_processors": Unresumable.LOGITS_PROCESSORS,
    "custom_logit_processor": Unresumable.LOGITS_PROCESSORS,
    "custom_params": Unresumable.LOGITS_PROCESSORS,
    "vllm_xargs": Unresumable.LOGITS_PROCESSORS,
    "truncate_prompt_tokens": Unresumable.TRUNCATED_PROMPT,
    "structured_outputs": Unresumable.GUIDED_DECODING,
    "json_schema": Unresumable.GUIDED_DECODING,
    "regex": Unresumable.GUIDED_DECODING,
    "ebnf": Unresumable.GUIDED_DECODING,
    "grammar": Unresumable.GUIDED_DECODING,
    "reasoning": Unresumable.REASONING,
    "reasoning_effort": Unresumable.REASONING,
    "thinking": Unresumable.REASONING,
    "thinking_token_budget": Unresumable.REASONING,
    "thinking_budget": Unresumable.REASONING,
}
_GUIDED_PREFIX = "guided_"
# What chat templates take in chat_template_kwargs so that a model thinks, and the words that switch it off.
_THINKING = frozenset(
    """
    enable_thinking thinking think thinking_mode thinking_budget enable_reasoning reasoning reasoning_effort
    reasoning_mode reasoning_budget
    """.split()  # noqa: SIM905  # as the lists above
)
_OFF = frozenset({"none", "off", "no", "false", "disabled", "no_think", "nothink", "chat"})
# What a completion would not take, or would take for something else, of a chat's members.
CHAT_ONLY = frozenset(
    """
    messages tools tool_choice parallel_tool_calls functions function_call logprobs top_logprobs
    max_completion_tokens add_generation_prompt continue_final_message documents chat_template
    chat_template_kwargs media_io_kwargs mm_processor_kwargs reasoning_effort include_reasoning
    separate_reasoning stream_reasoning return_prompt_text response_format modalities verbosity
    """.split()  # noqa: SIM905  # as a literal it is a page
)

_fields_decoder = msgspec.json.Decoder(Fields)
_messages_decoder = msgspec.json.Decoder(list[Fields])
NULL = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class Call:
    """A client's call.

    Attributes:
        raw: the body as it went upstream.
        limit: output tokens it may have; None for as many as the context holds.
        stops: stop strings.
        held_chars: the newest characters that vLLM 0.32 keeps from the client, lest they begin a stop string.
        prompt_ids: the prompt of a completion that gave token ids.
        wants_usage: as the last event of the stream.
    """

    path: str
    raw: bytes
    fields: Fields
    limit: int | None
    stops: tuple[str, ...]
    held_chars: int
    prompt_ids: list[int] | None
    wants_usage: bool

    @property
    def is_chat(self) -> bool:
        return self.path == CHAT

    @property
    def is_greedy(self) -> bool:
        """Whether what it generates is decided by the prompt."""
        return "temperature" in self.fields and self.value("temperature") == 0

    @property
    def hides_tokens(self) -> bool:
        """Whether its output may go on behind a token that ends it, of which the text has nothing."""
        return self.is_set("ignore_eos") and self.value("skip_special_tokens") is not False

    @property
    def has_many_answers(self) -> bool:
        if any(self.value(name) not in (None, 1) for name in ("n", "best_of") if name in self.fields):
            return True
        prompt = None if self.is_chat else self.value("prompt")
        return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)

    @property
    def may_call_tools(self) -> bool:
        is_off = self.value("tool_choice") == "none"
        return not is_off and (self.is_set("tools") or self.is_set("functions"))

    def value(self, name: str) -> Any:
        """What a member holds; None if there is none."""
        return _decoded(self.fields.get(name, NULL))

    def is_set(self, name: str) -> bool:
        """Whether a member says anything but null, false, zero or nothing."""
        return bool(self.value(name))

    def messages(self) -> list[Fields]:
        """The messages of a chat, each with raw members."""
        try:
            return _messages_decoder.decode(self.fields.get("messages", b"[]"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UnreadableError("messages is not a list of objects") from error

    def rendered_texts(self) -> Iterator[str]:
        """What of a chat may itself open reasoning: a template of its own, and the answer that it begins."""
        messages = self.messages() if self.is_set("continue_final_message") else []
        begun = _decoded(messages[-1].get("content", NULL)) if messages else None
        yield from (text for text in (self.value("chat_template"), begun) if isinstance(text, str))

    def has_media(self) -> bool:
        """Whether a message of a chat may hold more than text."""
        contents = [_decoded(message.get("content", NULL)) for message in self.messages()]
        return not all(content is None or isinstance(content, str) for content in contents)


def read_call(path: str, body: bytes) -> Call:
    """Read a body that an engine has taken.

    Raises:
        UnreadableError: if it is not what the API says.
    """
    try:
        fields = _fields_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableError("the request is not a JSON object") from error
    stop = _decoded(fields.get("stop", NULL))
    stops = tuple(stop if isinstance(stop, list) else [stop] if stop else [])
    if not all(isinstance(each, str) for each in stops):
        raise UnreadableError("stop is not a string or a list of them")
    keeps_stop = bool(_decoded(fields.get("include_stop_str_in_output", NULL)))
    options = _decoded(fields.get("stream_options", NULL))
    return Call(
        path=path,
        raw=body,
        fields=fields,
        limit=_limit(path, fields),
        stops=stops,
        held_chars=0 if keeps_stop or not stops else max(0, *(len(each) - 1 for each in stops)),
        prompt_ids=_prompt_ids(fields),
        wants_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def why_not(call: Call) -> Unresumable | None:
    """What of a call forbids that its stream goes on elsewhere once it has output."""
    for name, raw in call.fields.items():
        if name in _HARMLESS or bytes(raw) in {b"null", b"false"}:
            continue
        if not call.is_set(name):
            continue
        if name.startswith(_GUIDED_PREFIX):
            return Unresumable.GUIDED_DECODING
        return _FORBIDDING.get(name, Unresumable.UNKNOWN_FIELD)
    return _guided(call) or _reasons(call)


def _guided(call: Call) -> Unresumable | None:
    wanted = call.value("response_format")
    is_text = wanted is None or (isinstance(wanted, dict) and wanted.get("type") == "text")
    is_free = call.value("tool_choice") in (None, "none", "auto")
    is_free = is_free and call.value("function_call") in (None, "none", "auto")
    return None if is_text and is_free else Unresumable.GUIDED_DECODING


def _reasons(call: Call) -> Unresumable | None:
    options = call.value("chat_template_kwargs")
    is_thinking = isinstance(options, dict) and any(_is_on(options.get(name)) for name in _THINKING)
    # Without include_reasoning an engine keeps the tokens of the reasoning to itself.
    is_hidden = any(
        call.value(name) is False for name in ("include_reasoning", "separate_reasoning", "stream_reasoning")
    )
    return Unresumable.REASONING if is_thinking or is_hidden else None


def _is_on(option: Any) -> bool:
    if isinstance(option, dict):
        option = option.get("type", True)
    return option.lower() not in _OFF if isinstance(option, str) and option else bool(option)


def _decoded(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableError("a member of the request cannot be read") from error


def _limit(path: str, fields: Fields) -> int | None:
    limit = _whole(fields, "max_completion_tokens") if path == CHAT else None
    if limit is None:
        limit = _whole(fields, "max_tokens")
    return COMPLETION_TOKENS if limit is None and path == COMPLETIONS else limit


def _whole(fields: Fields, name: str) -> int | None:
    value = _decoded(fields.get(name, NULL))
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise UnreadableError(f"{name} is not a whole number")


def _prompt_ids(fields: Fields) -> list[int] | None:
    raw = bytes(fields.get("prompt", NULL))
    if not raw.startswith(b"["):
        return None
    prompt = _decoded(msgspec.Raw(raw))
    if len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    return prompt if prompt and all(isinstance(item, int) for item in prompt) else None
