"""The reference of the sidecar, drawn from the code: flags, headers, transitions, metrics.

`python -m sidecar.describe FILE...` draws the marked sections of Markdown files anew.
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pdcoord.protocol.headers import (
    DATA_PARALLEL_HOST_PORT,
    DESTINATION_ENDPOINT,
    ENCODER_HOSTS_PORTS,
    KV_CACHE_SOURCE_HOST_PORT,
    PLAN,
    PREFILLER_HOST_PORT,
    PREFIX,
    REASON,
    REQUEST_ID,
    REQUEST_ID_BYTES_MAX,
    SERVED,
)
from pdcoord.protocol.signing import PLAN_SIGNATURE
from sidecar import handoff
from sidecar.guard import LEG, PREFILLS_MAX
from sidecar.observe import METRICS, bound_of
from sidecar.settings import FLAGS
from sidecar.vocabulary import STATE_MEANINGS, State

_HEADERS: tuple[tuple[bytes, str, str], ...] = (
    (PLAN, "router to sidecar", "the plan of pdcoord's gateway as JSON; goes before every other header"),
    (
        PREFILLER_HOST_PORT,
        "router to sidecar",
        f"a foreign router's prefill targets, listed or repeated; the first {PREFILLS_MAX} count, in order",
    ),
    (
        REQUEST_ID,
        "both ways",
        f"kept up to {REQUEST_ID_BYTES_MAX} visible characters, else made; on both legs and the response",
    ),
    (
        PLAN_SIGNATURE,
        "router to sidecar",
        "over plan, targets, leg and request id; with --plan-keys-file only pages are served without",
    ),
    (SERVED, "sidecar to router", "what was done, as JSON: mode, prefill, rungs, times, cached tokens"),
    (REASON, "sidecar to router", "why the sidecar refused, beside an OpenAI error body"),
    (LEG, "sidecar to engine", "`prefill` on a prefill leg: a sidecar in front of that engine lets it ask"),
    (PREFIX + b"*", "never forwarded", "whatever else begins so is dropped on the way to an engine"),
    *(
        (name, "never forwarded", "llm-d's and the endpoint picker's; no engine sees them")
        for name in (
            ENCODER_HOSTS_PORTS,
            DATA_PARALLEL_HOST_PORT,
            KV_CACHE_SOURCE_HOST_PORT,
            DESTINATION_ENDPOINT,
        )
    ),
    (b"x-override-bootstrap-*", "never forwarded", "SGLang's rendezvous is set in the body, by the sidecar"),
)


def _flags() -> Iterator[str]:
    yield "| flag | variable | default | meaning |"
    yield "|---|---|---|---|"
    for flag in FLAGS:
        name = f"{flag.name} {flag.metavar}".strip().replace("|", "\\|")
        yield f"| `{name}` | `{flag.variable}` | {_code(flag.default)} | {flag.meaning} |"


def _headers() -> Iterator[str]:
    yield "| header | direction | meaning |"
    yield "|---|---|---|"
    for name, direction, meaning in _HEADERS:
        yield f"| `{name.decode('ascii')}` | {direction} | {meaning} |"


def _states() -> Iterator[str]:
    yield "| state | meaning |"
    yield "|---|---|"
    for state in State:
        yield f"| {state} | {STATE_MEANINGS[state]} |"


def _transitions() -> Iterator[str]:
    yield "| state | event | what is done | leads to |"
    yield "|---|---|---|---|"
    for row in handoff.TRANSITIONS.values():
        leads_to = ", ".join(state for state in State if state in row.leads_to)
        yield f"| {row.state} | {row.event.__name__} | {handoff.meaning(row)} | {leads_to} |"


def _rules() -> Iterator[str]:
    text = handoff.__doc__ or ""
    yield from (line for line in text.splitlines() if re.match(r"\d+\. |    \S", line))


def _metrics() -> Iterator[str]:
    """The metrics as lines of a Markdown table."""
    yield "| name | type | labels | meaning | what to do when it moves |"
    yield "|---|---|---|---|---|"
    for each in METRICS:
        labels = ", ".join(f"`{label}`" for label in each.labels) or "-"
        yield f"| `{each.full_name}` | {each.kind} | {labels} | {each.meaning} | {each.action} |"


def _labels() -> Iterator[str]:
    """What bounds the labels, as lines of a Markdown table."""
    yield "| label | values |"
    yield "|---|---|"
    for label in sorted({label for each in METRICS for label in each.labels}):
        yield f"| `{label}` | {bound_of(label)} |"


def _code(text: str) -> str:
    return f"`{text}`" if text else "none"


SECTIONS: dict[str, Callable[[], Iterator[str]]] = {
    "flags": _flags,
    "headers": _headers,
    "states": _states,
    "rules": _rules,
    "transitions": _transitions,
    "metrics": _metrics,
    "labels": _labels,
}
_MARKED = re.compile(r"(<!-- drawn: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def section(name: str) -> str:
    """One section as Markdown."""
    return "\n".join(SECTIONS[name]()) + "\n"


def redraw(text: str, draw: Callable[[str], str] = section) -> str:
    """A Markdown text with its sections, from `<!-- drawn: NAME -->` to `<!-- end -->`, drawn anew.

    Args:
        draw: the lines of the section of that name.
    """
    return _MARKED.sub(lambda match: f"{match[1]}{draw(match[2])}{match[3]}", text)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(redraw(path.read_text(encoding="utf-8")), encoding="utf-8")
