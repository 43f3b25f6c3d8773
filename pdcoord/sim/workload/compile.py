"""From a workload file to its traffic: files it names are read, distributions made ready to draw from."""

from collections.abc import Callable
from pathlib import Path

from pdcoord.policy.errors import KeyPath, PolicyError, Problem
from pdcoord.policy.schema import SloSpec
from pdcoord.sim.workload.amounts import Amount, AmountFileError, AmountSpec
from pdcoord.sim.workload.arrivals import DealtTimes, StagedTimes, Times
from pdcoord.sim.workload.draws import Shares, mix
from pdcoord.sim.workload.mixed import Dressing, MixedWorkload
from pdcoord.sim.workload.parts import Documents, Part, Recorded, Sessions, SharedPrefix
from pdcoord.sim.workload.partschema import PartSpec, PrioritySpec, TenantSpec, TraceSpec
from pdcoord.sim.workload.traces import Trace, TraceError, Window, read_azure, read_mooncake
from pdcoord.sim.workload.workloadfile import LoadedWorkload

# What is drawn from the seed besides the parts, beyond every index of one.
_ARRIVALS, _OWN_ARRIVALS, _DEALING = 1 << 42, 1 << 43, 1 << 44


def compile_workload(
    loaded: LoadedWorkload, *, seed: int | None = None, rate_factor: float = 1.0
) -> MixedWorkload:
    """The traffic that a file describes.

    Args:
        loaded: the file.
        seed: in place of the file's.
        rate_factor: of all rates, for runs at several loads; stages keep their length, traces get shorter.

    Raises:
        PolicyError: if a file that it names cannot be used.
    """
    spec = loaded.spec
    compiler = _Compiler(loaded, spec.seed if seed is None else seed, rate_factor)
    parts = [compiler.part(index, part) for index, part in enumerate(spec.parts)]
    if compiler.problems:
        raise PolicyError(compiler.problems)
    return MixedWorkload(
        spec.key_tokens_used,
        [
            (part, _dressing(loaded, part_spec, mix(compiler.seed, index)))
            for index, (part, part_spec) in enumerate(zip(parts, spec.parts, strict=True))
            if part is not None
        ],
        compiler.notes,
    )


def _dressing(loaded: LoadedWorkload, part: PartSpec, seed: int) -> Dressing:
    spec = loaded.spec
    tenants = (part.tenants if part.tenants is not None else spec.tenants) or (TenantSpec(name="default"),)
    priorities = part.priorities if part.priorities is not None else spec.priorities
    priorities = priorities or (PrioritySpec(priority=0),)
    slo = part.slo or SloSpec()
    ttft_ms = slo.ttft_ms if slo.ttft_ms is not None else spec.slo.ttft_ms
    tpot_ms = slo.tpot_ms if slo.tpot_ms is not None else spec.slo.tpot_ms
    is_named = bool(part.tenants or spec.tenants)
    return Dressing(
        kind=part.name,
        seed=seed,
        tenants=tuple(tenant.name for tenant in tenants) if is_named else ("",),
        tenant_shares=Shares([tenant.share for tenant in tenants]),
        priorities=tuple(each.priority for each in priorities),
        priority_shares=Shares([each.share for each in priorities]),
        ttft_s_max=None if ttft_ms is None else ttft_ms / 1e3,
        tpot_s_max=None if tpot_ms is None else tpot_ms / 1e3,
    )


class _Compiler:
    """Makes parts, and gathers what is wrong with the files they name."""

    def __init__(self, loaded: LoadedWorkload, seed: int, rate_factor: float) -> None:
        self._loaded = loaded
        self._rate_factor = rate_factor
        self.seed = mix(seed, 0)
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        spec = loaded.spec
        self._shared = (
            None if spec.load is None else StagedTimes(spec.load, mix(self.seed, _ARRIVALS), rate_factor)
        )
        self._takers = [
            index for index, part in enumerate(spec.parts) if not part.is_trace and part.load is None
        ]
        self._key_tokens = spec.key_tokens_used

    def part(self, index: int, spec: PartSpec) -> Part | None:
        """None where a file it needs cannot be used."""
        part = self._made(index, spec)
        return None if self.problems else part

    def _made(self, index: int, spec: PartSpec) -> Part | None:
        seed = mix(self.seed, index)
        if spec.mooncake is not None:
            return self._recorded(index, "mooncake", spec.mooncake, read_mooncake)
        if spec.azure is not None:
            return self._recorded(index, "azure", spec.azure, read_azure)
        times = self._times(index, spec)
        if spec.shared_prefix is not None:
            return self._shared_prefix(index, spec, times, seed)
        if spec.rag is not None:
            return self._documents(index, spec, times, seed)
        return self._sessions(index, spec, times, seed)

    def _times(self, index: int, spec: PartSpec) -> Times:
        seed = mix(self.seed, _OWN_ARRIVALS + index)
        if spec.load is not None:
            return StagedTimes(spec.load, seed, self._rate_factor)
        assert self._shared is not None, "a part without times was accepted"
        if len(self._takers) == 1:
            return self._shared
        weights = [self._loaded.spec.parts[taker].weight or 1.0 for taker in self._takers]
        return DealtTimes(self._shared, weights, self._takers.index(index), mix(self.seed, _DEALING))

    def _amount(self, place: KeyPath, spec: AmountSpec) -> Amount:
        try:
            return spec.compiled(self._loaded.folder)
        except AmountFileError as error:
            self._blame((*place, "file"), str(error))
            return AmountSpec(type="fixed", value=1.0).compiled(Path())

    def _blame(self, place: KeyPath, message: str) -> None:
        problem = self._loaded.document.problem(place, message)
        if problem not in self.problems:  # A chat's questions are drawn from one file twice.
            self.problems.append(problem)

    def _shared_prefix(self, index: int, spec: PartSpec, times: Times, seed: int) -> SharedPrefix:
        prefix = spec.shared_prefix
        assert prefix is not None, "called for another kind"
        place = ("parts", index, "shared_prefix")
        question = prefix.question_distribution or prefix.question_len
        output = prefix.output_distribution or prefix.output_len
        return SharedPrefix(
            times=times,
            seed=seed,
            key_tokens=self._key_tokens,
            groups=prefix.num_groups,
            prompts_per_group=prefix.num_prompts_per_group,
            system_len=self._amount((*place, "system_prompt_len"), prefix.system_prompt_len),
            question_len=self._amount((*place, "question_len"), question),
            output_len=self._amount((*place, "output_len"), output),
            is_multi_turn=prefix.enable_multi_turn_chat,
            context_tokens_max=self._loaded.spec.context_tokens_max,
        )

    def _documents(self, index: int, spec: PartSpec, times: Times, seed: int) -> Documents:
        rag = spec.rag
        assert rag is not None, "called for another kind"
        place = ("parts", index, "rag")
        return Documents(
            times=times,
            seed=seed,
            key_tokens=self._key_tokens,
            document_count=rag.documents,
            popularity=rag.zipf,
            per_question=rag.documents_per_question,
            system_tokens=rag.system_prompt_len,
            document_len=self._amount((*place, "document_len"), rag.document_len),
            question_len=self._amount((*place, "question_len"), rag.question_len),
            output_len=self._amount((*place, "output_len"), rag.output_len),
        )

    def _sessions(self, index: int, spec: PartSpec, times: Times, seed: int) -> Sessions:
        chat, agents = spec.chat, spec.agents
        if chat is not None:
            kind, opening_count = "chat", chat.system_prompts
            keys = ("system_prompt_len", "question_len", "question_len", "output_len", "turns", "think_s")
        else:
            assert agents is not None, "called for another kind"
            kind, opening_count = "agents", agents.instructions
            keys = ("instructions_len", "task_len", "tool_result_len", "thought_len", "turns", "tool_s")
        made = [self._amount(("parts", index, kind, key), getattr(chat or agents, key)) for key in keys]
        return Sessions(
            times=times,
            seed=seed,
            key_tokens=self._key_tokens,
            openings=Shares([1.0] * opening_count),
            opening_count=opening_count,
            opening_len=made[0],
            first_len=made[1],
            next_len=made[2],
            output_len=made[3],
            turn_count=made[4],
            pause_s=made[5],
            context_tokens_max=self._loaded.spec.context_tokens_max,
        )

    def _recorded(
        self, index: int, kind: str, spec: TraceSpec, read: Callable[[Path, Window], Trace]
    ) -> Recorded | None:
        path = self._loaded.folder / spec.file
        window = Window(
            rows_max=spec.first_rows,
            from_s=spec.from_s,
            until_s=spec.until_s,
            context_tokens_max=self._loaded.spec.context_tokens_max,
        )
        try:
            trace = read(path, window)
        except TraceError as error:
            self._blame(("parts", index, kind, "file"), str(error))
            return None
        self.notes += trace.notes(path.name)
        return Recorded(
            rows=trace.rows,
            seed=mix(self.seed, index),
            key_tokens=self._key_tokens,
            rate_factor=spec.rate_factor * self._rate_factor,
        )
