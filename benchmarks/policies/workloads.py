"""The workloads of the benchmark, as documents that `pdcoord simulate` could read too."""

from pathlib import Path
from typing import Any

import yaml

from pdcoord.policy.yamltext import parse_documents, validate
from pdcoord.sim.workload.call import Workload
from pdcoord.sim.workload.compile import compile_workload
from pdcoord.sim.workload.workloadfile import LoadedWorkload, WorkloadSpec

FOLDER = Path(__file__).parent / "workloads"
SUITE = ("shared-prefix", "chat", "agents", "rag", "mooncake", "azure", "mix")
TRACES = {"mooncake": "mooncake_conversation.jsonl", "azure": "azure_2023_conv.csv"}
TRACE_S = 3_400.0
"""Both traces are a little longer than this."""
SEED_SHIFT_S = 173.0
"""A trace is the same for every seed, so each seed has another part of it."""


class MissingTraceError(Exception):
    """A trace is not at hand: leave the workload out and say so."""


def document(name: str, rate: float, seed: int, seconds: float, traces: Path | None) -> LoadedWorkload:
    """A workload of the folder, cut to `seconds` of arrivals; `traces` is where recorded ones lie.

    Raises:
        MissingTraceError: if the trace is not there.
    """
    path = FOLDER / f"{name}.yaml"
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for stage in data.get("load", {}).get("stages", ()):
        stage["duration"] = seconds
    for part in data["parts"]:
        for kind in TRACES:
            if kind in part:
                _place(part[kind], name, (seed, seconds * rate), traces)
    parsed = parse_documents(yaml.safe_dump(data).encode(), str(path))[0]
    return LoadedWorkload(parsed, validate(parsed, WorkloadSpec))


def lasts(name: str, rate: float, seconds: float) -> bool:
    """Whether there is as much of it: a trace, speeded up, ends at some rate before the run does."""
    return name not in TRACES or rate * seconds <= TRACE_S


def _place(trace: dict[str, Any], name: str, window: tuple[int, float], traces: Path | None) -> None:
    """Where the trace lies, and which part of it is wanted: so many seconds, from where the seed says."""
    seed, seconds = window
    file = None if traces is None else traces / trace["file"]
    if file is None or not file.is_file():
        raise MissingTraceError(f"{name}: {trace['file']} is not in --traces {traces}")
    trace["file"] = str(file.resolve())
    trace["from_s"] = seed * SEED_SHIFT_S % max(1.0, TRACE_S - seconds)
    trace["until_s"] = trace["from_s"] + seconds


def traffic(name: str, rate: float, seed: int, seconds: float, traces: Path | None) -> Workload:
    """`rate` is a factor of the document's own."""
    return compile_workload(document(name, rate, seed, seconds, traces), seed=seed, rate_factor=rate)
