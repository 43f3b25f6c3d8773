"""The parts of a workload as a person writes them."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from pdcoord.policy.errors import KeyPath
from pdcoord.policy.schema import SloSpec
from pdcoord.policy.values import Name, Spec
from pdcoord.policy.yamltext import FaultsError
from pdcoord.sim.workload.amounts import SecondsSpec, TokensOrNoneSpec, TokensSpec
from pdcoord.sim.workload.arrivals import LoadSpec
from pdcoord.sim.workload.traces import ROWS_MAX

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Weight = Annotated[float, Field(gt=0, le=1_000_000)]
FilePath = Annotated[str, Field(min_length=1, max_length=4096)]

_NEWER_NAMES = {
    "num_unique_system_prompts": "num_groups",
    "num_users_per_system_prompt": "num_prompts_per_group",
}


class SharedPrefixSpec(Spec):
    """Groups of prompts that begin alike, with the keys of inference-perf and llm-d-benchmark.

    The newer names num_unique_system_prompts and num_users_per_system_prompt are understood too. There is
    a pool of num_groups x num_prompts_per_group prompts, asked round and round in one shuffled order.
    """

    num_groups: Count = Field(default=10, description="Different system prompts.")
    num_prompts_per_group: Count = Field(default=10, description="Questions, or users, of each of them.")
    system_prompt_len: TokensOrNoneSpec = Field(
        default=TokensOrNoneSpec(type="fixed", value=100), description="Tokens of a system prompt."
    )
    question_len: TokensSpec = Field(
        default=TokensSpec(type="fixed", value=50), description="Tokens of a question."
    )
    output_len: TokensSpec = Field(
        default=TokensSpec(type="fixed", value=50), description="Tokens of an answer."
    )
    question_distribution: TokensSpec | None = Field(
        default=None, description="Older way to give question_len a distribution; stands in for it."
    )
    output_distribution: TokensSpec | None = Field(
        default=None, description="Older way to give output_len a distribution; stands in for it."
    )
    enable_multi_turn_chat: bool = Field(
        default=False,
        description=(
            "Each prompt of the pool is a user, whose next question is sent with the whole conversation "
            "before it, at its time or when the answer before it has ended."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        faults: list[tuple[KeyPath, str]] = [
            ((newer,), f"is {older} under its newer name; keep one of them")
            for newer, older in _NEWER_NAMES.items()
            if newer in data and older in data
        ]
        if faults:
            raise FaultsError(faults)
        return {_NEWER_NAMES.get(key, key): value for key, value in data.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = self.num_groups * self.num_prompts_per_group
        if count > 1_000_000:
            message = (
                f"is {self.num_prompts_per_group}, which makes {count} prompts, expected at most 1000000"
            )
            raise FaultsError([(("num_prompts_per_group",), message)])
        return self


class ChatSpec(Spec):
    """People who talk with the model: each turn sends the whole conversation again."""

    system_prompts: Count = Field(default=1, description="Different system prompts, equally often.")
    system_prompt_len: TokensOrNoneSpec = Field(
        default=TokensOrNoneSpec(type="fixed", value=500), description="Tokens of a system prompt."
    )
    turns: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=5, std_dev=4, max=50), description="Questions of a session."
    )
    question_len: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=100, std_dev=150, max=4000),
        description="Tokens of a question.",
    )
    output_len: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=250, std_dev=250, max=2000),
        description="Tokens of an answer.",
    )
    think_s: SecondsSpec = Field(
        default=SecondsSpec(type="lognormal", mean=30, std_dev=40, max=600),
        description="From the end of an answer to the next question, in seconds.",
    )


class AgentsSpec(Spec):
    """Agent loops: short thoughts, each followed by a tool's result, behind large instructions."""

    instructions: Count = Field(default=1, description="Different agents, equally often.")
    instructions_len: TokensOrNoneSpec = Field(
        default=TokensOrNoneSpec(type="fixed", value=6000),
        description="Tokens of system prompt and tool descriptions.",
    )
    task_len: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=800, std_dev=800, max=8000), description="Tokens of a task."
    )
    turns: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=15, std_dev=10, max=100), description="Calls of one task."
    )
    thought_len: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=120, std_dev=100, max=2000),
        description="Tokens of an answer: a thought and a tool call.",
    )
    tool_result_len: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=600, std_dev=1200, max=16000),
        description="Tokens that a tool's result adds to the prompt.",
    )
    tool_s: SecondsSpec = Field(
        default=SecondsSpec(type="lognormal", mean=1.5, std_dev=3, max=60),
        description="How long a tool runs, in seconds.",
    )


class RagSpec(Spec):
    """Questions about long documents, some of which are asked about more often than others."""

    documents: Annotated[int, Field(ge=1, le=100_000)] = Field(default=100, description="How many there are.")
    zipf: float = Field(
        default=1.0,
        ge=0,
        le=10,
        description="Popularity is 1 / rank to this power; 0 makes all equally popular.",
    )
    documents_per_question: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Documents in one prompt, in the order they were found in."
    )
    system_prompt_len: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=200, description="Tokens before the documents, the same in every prompt."
    )
    document_len: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=12_000, std_dev=8_000, min=1_000, max=60_000),
        description="Tokens of a document; each keeps its length.",
    )
    question_len: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=60, std_dev=60, max=1000),
        description="Tokens of a question.",
    )
    output_len: TokensSpec = Field(
        default=TokensSpec(type="lognormal", mean=300, std_dev=200, max=2000),
        description="Tokens of an answer.",
    )


class TraceSpec(Spec):
    """A recorded trace, replayed at its own times."""

    file: FilePath = Field(description="The trace; a relative path starts at this file's folder.")
    rate_factor: float = Field(
        default=1.0, gt=0, le=10_000, description="2 replays it at twice the rate, in half the time."
    )
    first_rows: Annotated[int, Field(ge=1, le=ROWS_MAX)] | None = Field(
        default=None, description="Only the first so many rows of the window."
    )
    from_s: float = Field(default=0.0, ge=0, le=1e9, description="Leave out what comes before.")
    until_s: float | None = Field(
        default=None, gt=0, le=1e9, description="Leave out what comes at or after; from the first row's time."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.until_s is not None and self.until_s <= self.from_s:
            message = f"is {self.until_s:g}, expected more than from_s ({self.from_s:g})"
            raise FaultsError([(("until_s",), message)])
        return self


class TenantSpec(Spec):
    """A tenant and its part of the traffic."""

    name: Name = Field(description="Unique in the list.")
    share: Weight = Field(default=1.0, description="Against the other tenants' shares.")


class PrioritySpec(Spec):
    """A priority and its part of the traffic."""

    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = Field(
        description="Higher is served first; below 0 may be shed."
    )
    share: Weight = Field(default=1.0, description="Against the other priorities' shares.")


KINDS = ("shared_prefix", "chat", "agents", "rag", "mooncake", "azure")


class PartSpec(Spec):
    """One kind of traffic in the mix: exactly one of the keys that say which, and how much of it."""

    name: Name = Field(description="Label of its calls in results; unique in the file.")
    weight: Weight | None = Field(
        default=None, description="Its part of the arrivals of the file's load; 1 if not set."
    )
    load: LoadSpec | None = Field(default=None, description="Arrivals of its own instead.")
    shared_prefix: SharedPrefixSpec | None = Field(default=None, description="Groups that begin alike.")
    chat: ChatSpec | None = Field(default=None, description="Sessions of several turns.")
    agents: AgentsSpec | None = Field(default=None, description="Agent loops.")
    rag: RagSpec | None = Field(default=None, description="Questions about long documents.")
    mooncake: TraceSpec | None = Field(default=None, description="A trace of Mooncake, JSON lines.")
    azure: TraceSpec | None = Field(default=None, description="A trace of AzurePublicDataset, CSV.")
    slo: SloSpec | None = Field(default=None, description="Objectives in place of the file's.")
    tenants: tuple[TenantSpec, ...] | None = Field(
        default=None, min_length=1, max_length=1000, description="In place of the file's."
    )
    priorities: tuple[PrioritySpec, ...] | None = Field(
        default=None, min_length=1, max_length=100, description="In place of the file's."
    )

    @property
    def is_trace(self) -> bool:
        return self.mooncake is not None or self.azure is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        written = [kind for kind in KINDS if getattr(self, kind) is not None]
        faults: list[tuple[KeyPath, str]] = []
        if not written:
            faults.append(((), f"has no kind of traffic; set one of {', '.join(KINDS)}"))
        faults += [
            ((kind,), f"is set beside {written[0]}; make it a part of its own") for kind in written[1:]
        ]
        if self.is_trace:
            for key in ("weight", "load"):
                if getattr(self, key) is not None:
                    faults.append(((key,), "is set on a trace, which has its own times; use rate_factor"))
        elif self.load is not None and self.weight is not None:
            faults.append((("weight",), "is set beside load; keep one of them"))
        if faults:
            raise FaultsError(faults)
        return self
