"""What policies and endpoints sources declare, as signals: by difference, and nothing that cannot be used."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pdcoord.core.events import ModelsReplaced
from pdcoord.core.fleet import EndpointDraining, EndpointGone, EndpointId, EndpointSeen
from pdcoord.core.ports import Handler
from pdcoord.policy.compile import CompiledPolicy
from pdcoord.policy.endpoints import (
    EndpointPicker,
    EndpointsDocument,
    MatchedEndpoint,
    Matching,
    parse_endpoints,
    static_endpoints,
)
from pdcoord.policy.errors import PolicyError, Problem
from pdcoord.policy.registry import Accepted, Refused, Unchanged
from pdcoord.policy.watch import FileWatch, Reading


class Source(StrEnum):
    """Which source; closed, a label of metrics."""

    POLICY = "policy"
    ENDPOINTS = "endpoints"


class PolicySource(Protocol):
    """Where policies come from: a file, or objects of an API."""

    @property
    def compiled(self) -> CompiledPolicy | None:
        """What is in force; None until there was something sound."""
        ...

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why what is there now is not in force, or not all of it; empty when it is."""
        ...

    def load_first(self) -> CompiledPolicy | None:
        """What a process starts with; None where it is asked for only once the process runs.

        Raises:
            PolicyError: if the process should not start.
        """
        ...

    def poll(self) -> Unchanged | Accepted | Refused:
        """What changed since the last call; called in a thread, one call at a time."""
        ...


class EndpointsSource(Protocol):
    """Where endpoints come from: a file, or pods."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why what is there now is not in force; empty when it is."""
        ...

    def load_first(self) -> EndpointsDocument | None:
        """As of `PolicySource`."""
        ...

    def poll(self) -> EndpointsDocument | None:
        """All endpoints if any changed, else None; called in a thread, one call at a time.

        Raises:
            PolicyError: if there is a change that cannot be used.
        """
        ...

    def judge(self, matching: Matching) -> tuple[Problem, ...]:
        """What of the last document, matched with the policy, may not have been meant.

        Raises:
            PolicyError: if nothing of it is to be used.
        """
        ...


class EndpointsFile:
    """An endpoints file; with any error in it, all of the last good one stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._watch = FileWatch(path)
        self.problems: tuple[Problem, ...] = ()

    def load_first(self) -> EndpointsDocument:
        """The file's content.

        Raises:
            PolicyError: if it cannot be used.
        """
        return self._parse(self._watch.read_now())

    def poll(self) -> EndpointsDocument | None:
        """The file's content when it changed; a change counts when two polls in a row find it.

        Raises:
            PolicyError: if it changed to what cannot be used.
        """
        reading = self._watch.poll()
        return None if reading is None else self._parse(reading)

    def judge(self, matching: Matching) -> tuple[Problem, ...]:
        """The entries that no selector picks.

        Raises:
            PolicyError: if an entry would belong to two pools.
        """
        if matching.problems:
            raise PolicyError(matching.problems)
        return matching.unpicked

    def _parse(self, reading: Reading) -> EndpointsDocument:
        try:
            if isinstance(reading.content, PolicyError):
                raise reading.content
            document = parse_endpoints(reading.content, str(self._path))
        except PolicyError as error:
            self.problems = error.problems
            raise
        self.problems = ()
        return document


@dataclass(frozen=True, slots=True)
class Reload:
    """What became of one source that changed.

    Attributes:
        problems: why the change is not in force; empty when it is.
        warnings: what is in force but may not have been meant.
    """

    source: Source
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()

    @property
    def is_accepted(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Found:
    """What a look at the sources gave, nothing of it applied yet."""

    reloads: tuple[Reload, ...]
    policy: CompiledPolicy | None = None
    endpoints: tuple[MatchedEndpoint, ...] = ()


class DeclaredFeed:
    """Keeps the coordinator's models and endpoints equal to what the sources declare.

    A change that cannot be used changes nothing, and neither does one that is sound by itself but not
    beside the other source; it is looked at again when either changes.
    """

    def __init__(
        self, handler: Handler, policies: PolicySource, endpoints: EndpointsSource | None = None
    ) -> None:
        self._handler = handler
        self._policies = policies
        self._endpoints = endpoints
        self._document: EndpointsDocument | None = None
        self._listed: dict[EndpointId, MatchedEndpoint] = {}
        self.policy: CompiledPolicy | None = None
        """What is in force; None before there was any."""
        self.warnings: tuple[Problem, ...] = ()
        """What of it may not have been meant."""
        self._mismatch: tuple[Problem, ...] = ()
        self._is_looking = asyncio.Lock()
        self._picker: tuple[CompiledPolicy, EndpointPicker] | None = None

    @property
    def problems(self) -> dict[Source, tuple[Problem, ...]]:
        """Why what a source holds now is not in force; only sources of which that is so."""
        own = self._endpoints.problems if self._endpoints is not None else ()
        found = {Source.POLICY: self._policies.problems, Source.ENDPOINTS: own or self._mismatch}
        return {source: problems for source, problems in found.items() if problems}

    def load_first(self) -> None:
        """Put in force what the sources hold before the process runs.

        Raises:
            PolicyError: if either cannot be used; a process should not start so.
        """
        policy = self._policies.load_first()
        if self._endpoints is not None:
            self._document = self._endpoints.load_first()
        if policy is not None:
            endpoints, self.warnings = self._match(policy)
            self._apply(policy, endpoints)

    async def poll(self, sources: Collection[Source] = tuple(Source)) -> tuple[Reload, ...]:
        """Look at the sources again. In a file a change counts when two polls in a row find it.

        Reading is done in a thread: a file of some thousand endpoints takes a second to parse, and
        streams must not stand still for it.
        """
        async with self._is_looking:
            found = await asyncio.to_thread(self._read, sources)
            if found.policy is not None:
                self._apply(found.policy, found.endpoints)
            return found.reloads

    def _read(self, sources: Collection[Source]) -> _Found:
        """The sources' changes, and what follows from them if they can be used together."""
        refused: list[Reload] = []
        changed: list[Source] = []
        if Source.POLICY in sources:
            match self._policies.poll():
                case Accepted(_, problems):
                    changed.append(Source.POLICY)
                    refused += [Reload(Source.POLICY, problems)] if problems else []
                case Refused(problems):
                    refused.append(Reload(Source.POLICY, problems))
                case Unchanged():
                    pass
        if Source.ENDPOINTS in sources and self._endpoints is not None:
            try:
                document = self._endpoints.poll()
                if document is not None:
                    self._document = document
                    changed.append(Source.ENDPOINTS)
            except PolicyError as error:
                refused.append(Reload(Source.ENDPOINTS, error.problems))
        policy = self._policies.compiled
        if not changed or policy is None:
            return _Found(tuple(refused))
        try:
            endpoints, warnings = self._match(policy)
        except PolicyError as error:
            self._mismatch = error.problems
            refused += [Reload(source, error.problems) for source in changed]
            return _Found(tuple(refused))
        self.warnings, self._mismatch = warnings, ()
        accepted = [Reload(source, warnings=warnings) for source in changed]
        return _Found((*refused, *accepted), policy, endpoints)

    def _match(self, policy: CompiledPolicy) -> tuple[tuple[MatchedEndpoint, ...], tuple[Problem, ...]]:
        """Endpoints, and warnings about them and the policy."""
        listed = static_endpoints(policy.bindings)
        if self._document is None or self._endpoints is None:
            return listed, policy.warnings
        if self._picker is None or self._picker[0] is not policy:
            self._picker = policy, EndpointPicker(policy.bindings)
        matching = self._picker[1].pick(self._document)
        warnings = self._endpoints.judge(matching)
        return (*listed, *matching.endpoints), (*policy.warnings, *warnings)

    def _apply(self, policy: CompiledPolicy, endpoints: Sequence[MatchedEndpoint]) -> None:
        handle = self._handler.handle
        if policy is not self.policy:
            handle(ModelsReplaced(policy.models))
            self.policy = policy
        wanted = {matched.endpoint.id: matched for matched in endpoints}
        for endpoint_id in self._listed.keys() - wanted.keys():
            handle(EndpointGone(endpoint_id))
        for endpoint_id, matched in wanted.items():
            known = self._listed.get(endpoint_id)
            if known is matched:
                continue
            is_new = known is None or known.endpoint != matched.endpoint
            if is_new or (known is not None and known.is_draining and not matched.is_draining):
                handle(EndpointSeen(matched.endpoint))
            if matched.is_draining and (is_new or (known is not None and not known.is_draining)):
                handle(EndpointDraining(endpoint_id))
        self._listed = wanted
