"""Fields of a body that no API key may use: they choose adapters, reach what others left, or go first; pure.

Names are those of vLLM 0.32 and SGLang 0.5.23. What steers transfers is refused from every client: see
`intake.check_reserved`.
"""

from pdcoord.protocol.openai import Call

DROPPED = frozenset(
    {
        "priority",
        "data_parallel_rank",
        "routed_dp_rank",
        "disagg_prefill_dp_rank",
        "request_id",
        "rid",
        "session_id",
        "custom_labels",
    }
)
"""Who goes first, on which rank, and under whose name; an answer is the same without them."""

UNCOUNTED = frozenset({"stream_interval"})
"""Has an engine send many tokens in one event, so that those of a stream that is left cannot be counted."""

_REFUSED = {
    "lora_path": "chooses an adapter that 'model' does not name; ask for one of GET /v1/models",
    "session_params": "goes on with a session that an engine keeps, whoever opened it; send all of it",
    "previous_response_id": "names an answer that an engine keeps, whoever it was for; send all of the input",
    "background": "lets an engine go on after its answer, uncounted; leave it out",
    "custom_logit_processor": "is code that runs inside the engine that all API keys share; leave it out",
}


def refused_field(call: Call) -> tuple[str, str] | None:
    """A field that cannot be dropped, since the call would be another one; and why it is refused."""
    for name, why in _REFUSED.items():
        if call.body.get(name) not in (None, False):
            return name, why
    return None
