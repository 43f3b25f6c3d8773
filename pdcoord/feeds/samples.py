"""Reads the few numbers of an engine's /metrics text that routing needs.

Text format: Prometheus exposition 0.0.4. Names: vLLM 0.32 (`gpu_cache_usage_perc` is the name that
0.10 and earlier used) and SGLang 0.5.23. One compiled expression over the whole text costs 0.2 ms
where a general parser costs 7 ms for the 47 kB that vLLM answers.
"""

import math
import re

from pdcoord.core.fleet import Sample

_RUNNING = (b"vllm:num_requests_running", b"sglang:num_running_reqs")
_WAITING = (b"vllm:num_requests_waiting", b"sglang:num_queue_reqs")
_BY_REASON = b"vllm:num_requests_waiting_by_reason"
_KV_USAGE = (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc", b"sglang:token_usage")
_NAMES = (*_RUNNING, *_WAITING, _BY_REASON, *_KV_USAGE)

# A label value may hold any character, escaped where it is a quote, so braces alone do not end a set.
_LINE = re.compile(
    rb"^(" + b"|".join(_NAMES) + rb')(?:\{((?:[^"}\n]|"(?:[^"\\\n]|\\.)*")*)\})?[ \t]+(\S+)',
    re.MULTILINE,
)
_DEFERRED = re.compile(rb'(?:^|,)\s*reason="deferred"')
_COUNT_MAX = 1 << 31


def parse_sample(text: bytes, *, at_s: float) -> Sample | None:
    """One reading, or None if the text names no running or no waiting requests.

    A server with several data-parallel ranks reports each under labels of its own: counts are summed
    over them, and KV usage is their mean. KV usage is 0.0 where an engine has no KV cache to report.
    Requests that vLLM defers while their KV is on its way are not queued for compute, so they are
    taken out of `waiting`; a pod that waits for a transfer would count it twice otherwise.
    """
    values: dict[bytes, list[float]] = {}
    deferred = 0.0
    for name, labels, number in _LINE.findall(text):
        value = _number(number)
        if value is None:
            continue
        if name != _BY_REASON:
            values.setdefault(name, []).append(value)
        elif _DEFERRED.search(labels):
            deferred += value
    running, waiting = _first(values, _RUNNING), _first(values, _WAITING)
    if running is None or waiting is None:
        return None
    usage = _first(values, _KV_USAGE) or [0.0]
    return Sample(
        running=int(min(sum(running), _COUNT_MAX)),
        waiting=int(min(max(sum(waiting) - deferred, 0.0), _COUNT_MAX)),
        kv_usage=min(sum(usage) / len(usage), 1.0),
        at_s=at_s,
    )


def _first(values: dict[bytes, list[float]], names: tuple[bytes, ...]) -> list[float] | None:
    return next((values[name] for name in names if name in values), None)


def _number(text: bytes) -> float | None:
    """A finite value of at least 0, else None: NaN is how a gauge says that it has no value yet."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0.0 else None
