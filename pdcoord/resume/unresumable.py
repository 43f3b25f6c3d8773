"""The closed list of why a stream that broke off cannot go on elsewhere."""

from enum import StrEnum


class Unresumable(StrEnum):
    """Why a stream cannot be continued faithfully; a label of a metric, and part of the client's message."""

    API = "api"
    """Neither /v1/completions nor /v1/chat/completions, or not streamed."""
    UNREADABLE = "unreadable"
    """The request or what was passed on is not what the API says."""
    TAPE_FULL = "tape-full"
    """More was passed on than may be kept; for the edge to say, of a tape that is not whole."""
    MANY_CHOICES = "many-choices"
    """n, best_of or several prompts: more than one answer in one stream."""
    BEAM_SEARCH = "beam-search"
    ECHO = "echo"
    """The prompt is part of the answer: echo, prompt_logprobs."""
    SUFFIX = "suffix"
    GUIDED_DECODING = "guided-decoding"
    """The grammar's state is where the engine was, and another's would begin at its start."""
    TOOL_CALLS = "tool-calls"
    REASONING = "reasoning"
    """What was reasoned is not in the prompt that a chat template makes of the partial answer.

    Told by the stream's own fields, by what switches reasoning on in the request, and by tags in its text. A
    template that opens reasoning unasked, before an engine without a reasoning parser, shows none of them
    until the closing tag: such a stream that breaks off earlier is one for TEMPLATE, since what it opened is
    not in what it makes of the partial answer.
    """
    PENALTIES = "penalties"
    """frequency_penalty and presence_penalty count output tokens, and what was output becomes prompt.

    repetition_penalty counts both (vLLM 0.32, SGLang 0.5.23), so that it does not mind.
    """
    OUTPUT_HISTORY = "output-history"
    """Something else that looks at the output so far: bad_words, repetition_detection, stop_regex."""
    LOGITS_PROCESSORS = "logits-processors"
    TRUNCATED_PROMPT = "truncated-prompt"
    PROMPT_EMBEDS = "prompt-embeds"
    TOKEN_PROMPT = "token-prompt"  # noqa: S105  # a reason, no password
    """The prompt is token ids, and the engine returned none to append."""
    LOSSY_TEXT = "lossy-text"
    """The text does not say all tokens and there are no ids: other tokens would be made of it.

    It has bytes that are no character, or some tokens have no text, as may be with ignore_eos.
    """
    HELD_BACK = "held-back"
    """The client has tokens past the last point at which an engine could take over, and they are drawn."""
    TEMPLATE = "template"
    """The chat is rendered in a way in which a partial answer cannot be appended, or that nobody can tell.

    A chat template may never look at continue_final_message, or trim what it is given; the engine that would
    go on is asked at its /tokenize what it makes of the partial answer (resume/proof.py). Token ids
    (return_token_ids) need no template.
    """
    UNKNOWN_FIELD = "unknown-field"
    """The request or the stream has a member of which it is not known that it may be continued."""
