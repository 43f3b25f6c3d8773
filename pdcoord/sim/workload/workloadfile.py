"""The workload as a person writes it: one Workload document, compiled to calls."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pdcoord.policy.errors import KeyPath, PolicyError
from pdcoord.policy.schema import SloSpec
from pdcoord.policy.values import ApiVersion, Spec
from pdcoord.policy.yamltext import Document, FaultsError, read_documents, validate
from pdcoord.sim.workload.arrivals import ARRIVALS_MAX, LoadSpec
from pdcoord.sim.workload.partschema import PartSpec, PrioritySpec, TenantSpec
from pdcoord.sim.workload.traces import MOONCAKE_BLOCK_TOKENS

KEY_TOKENS = 64


class WorkloadSpec(Spec):
    """Traffic for the simulator."""

    api_version: ApiVersion
    kind: Literal["Workload"] = Field(description="Kind of this document.")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Decides everything that is drawn.")
    key_tokens: Annotated[int, Field(ge=1, le=8192)] | None = Field(
        default=None,
        description=(
            "Tokens that are told apart at once: the grain of shared prefixes. 64, or 512 where all parts "
            "are Mooncake traces, which know no finer; with such a part it divides 512."
        ),
    )
    context_tokens_max: Annotated[int, Field(ge=2, le=10_000_000)] = Field(
        default=131_072,
        description=(
            "Prompt and answer together: a session ends before it has more, and rows of traces that have "
            "more are left out. Set it to the engines' own limit."
        ),
    )
    load: LoadSpec | None = Field(default=None, description="Arrivals, shared among the parts by weight.")
    slo: SloSpec = Field(default_factory=SloSpec, description="Objectives; the run's own where not set.")
    tenants: tuple[TenantSpec, ...] = Field(
        default=(), max_length=1000, description="Who sends the calls, one tenant for each session."
    )
    priorities: tuple[PrioritySpec, ...] = Field(
        default=(), max_length=100, description="Priorities of the calls, one for each session."
    )
    parts: tuple[PartSpec, ...] = Field(min_length=1, max_length=64, description="What the mix is made of.")

    @property
    def key_tokens_used(self) -> int:
        if self.key_tokens is not None:
            return self.key_tokens
        is_all_mooncake = all(part.mooncake is not None for part in self.parts)
        return MOONCAKE_BLOCK_TOKENS if is_all_mooncake else KEY_TOKENS

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = [*_load_faults(self), *_name_faults(self), *_key_faults(self)]
        if faults:
            raise FaultsError(faults)
        return self


def _load_faults(spec: WorkloadSpec) -> list[tuple[KeyPath, str]]:
    takers = [part for part in spec.parts if not part.is_trace and part.load is None]
    if takers and spec.load is None:
        message = f'is missing, which part "{takers[0].name}" needs; set load here or in the part'
        return [(("load",), message)]
    if spec.load is not None and not takers:
        return [(("load",), "is used by no part: all have their own times; remove it")]
    loads = [spec.load, *(part.load for part in spec.parts)]
    count = sum(stage.rate * stage.duration for load in loads if load is not None for stage in load.stages)
    if count > ARRIVALS_MAX:
        return [(("parts",), f"have {count:.0f} arrivals in all, expected at most {ARRIVALS_MAX}")]
    return []


def _name_faults(spec: WorkloadSpec) -> list[tuple[KeyPath, str]]:
    names = [part.name for part in spec.parts]
    faults: list[tuple[KeyPath, str]] = [
        (("parts", index, "name"), f'is "{name}", which parts[{names.index(name)}] has; rename one')
        for index, name in enumerate(names)
        if names.index(name) != index
    ]
    for place, tenants in (
        (("tenants",), spec.tenants),
        *((("parts", index, "tenants"), part.tenants or ()) for index, part in enumerate(spec.parts)),
    ):
        named = [tenant.name for tenant in tenants]
        faults += [
            ((*place, index, "name"), f'is "{name}" a second time; add the shares up')
            for index, name in enumerate(named)
            if named.index(name) != index
        ]
    return faults


def _key_faults(spec: WorkloadSpec) -> list[tuple[KeyPath, str]]:
    used = spec.key_tokens_used
    if MOONCAKE_BLOCK_TOKENS % used and any(part.mooncake is not None for part in spec.parts):
        message = f"is {used}, expected a divisor of 512, the tokens of one hash id of a Mooncake trace"
        return [(("key_tokens",), message)]
    return []


@dataclass(frozen=True, slots=True)
class LoadedWorkload:
    """A workload file that was accepted; files it names are read when it is compiled.

    Attributes:
        document: where its values stand, for problems found later.
    """

    document: Document
    spec: WorkloadSpec

    @property
    def folder(self) -> Path:
        return Path(self.document.file).parent


def load_workload(path: Path) -> LoadedWorkload:
    """Read a workload file.

    Raises:
        PolicyError: with everything wrong with it, by file, line and key path.
    """
    documents = read_documents(path)
    if len(documents) > 1:
        extra = documents[1]
        raise PolicyError([extra.problem((), "is a second document; a workload file holds one")])
    return LoadedWorkload(documents[0], validate(documents[0], WorkloadSpec))
