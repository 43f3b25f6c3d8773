"""The policy and endpoints files as signals: what they list, by difference, all of it or nothing."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pdcoord.core.events import ModelsReplaced
from pdcoord.core.fleet import EndpointDraining, EndpointGone, EndpointId, EndpointSeen
from pdcoord.core.ports import Handler
from pdcoord.policy.compile import CompiledPolicy
from pdcoord.policy.endpoints import (
    EndpointsDocument,
    MatchedEndpoint,
    match_endpoints,
    parse_endpoints,
    static_endpoints,
    unmatched_entries,
)
from pdcoord.policy.errors import PolicyError, Problem
from pdcoord.policy.registry import Accepted, PolicyRegistry, Refused
from pdcoord.policy.watch import FileWatch, Reading


class Source(StrEnum):
    """Which file; closed, a label of metrics."""

    POLICY = "policy"
    ENDPOINTS = "endpoints"


@dataclass(frozen=True, slots=True)
class Reload:
    """What became of one file that changed.

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
    """What a look at the files gave, nothing of it applied yet."""

    reloads: tuple[Reload, ...]
    policy: CompiledPolicy | None = None
    endpoints: tuple[MatchedEndpoint, ...] = ()


class StaticFeed:
    """Keeps the coordinator's models and endpoints equal to what the files list.

    A change that cannot be used changes nothing, and neither does one that is sound by itself but not
    beside the other file; it is looked at again when either file changes.
    """

    def __init__(self, handler: Handler, registry: PolicyRegistry, endpoints_path: Path | None) -> None:
        self._handler = handler
        self._registry = registry
        self._endpoints_path = endpoints_path
        self._watch = FileWatch(endpoints_path) if endpoints_path is not None else None
        self._document: EndpointsDocument | None = None
        self._listed: dict[EndpointId, MatchedEndpoint] = {}
        self.policy: CompiledPolicy | None = None
        """What is in force; None before `load_first`."""
        self.warnings: tuple[Problem, ...] = ()
        """What of it may not have been meant."""
        self._unsound: tuple[Problem, ...] = ()
        self._mismatch: tuple[Problem, ...] = ()

    @property
    def problems(self) -> dict[Source, tuple[Problem, ...]]:
        """Why what a file holds now is not in force; only files of which that is so."""
        found = {Source.POLICY: self._registry.problems, Source.ENDPOINTS: self._unsound or self._mismatch}
        return {source: problems for source, problems in found.items() if problems}

    def load_first(self) -> None:
        """Read both files and put them in force.

        Raises:
            PolicyError: if either cannot be used; a process should not start so.
        """
        policy = self._registry.load_first()
        if self._watch is not None:
            self._document = self._parse(self._watch.read_now())
        self.warnings = self._warnings_about(policy)
        self._apply(policy, self._match(policy))

    async def poll(self) -> tuple[Reload, ...]:
        """Look at both files again; a change counts when two polls in a row find it.

        Reading is done in a thread: a file of some thousand endpoints takes a second to parse, and
        streams must not stand still for it.
        """
        found = await asyncio.to_thread(self._read)
        if found.policy is not None:
            self._apply(found.policy, found.endpoints)
        return found.reloads

    def _read(self) -> _Found:
        """Both files' changes, and what follows from them if they can be used together."""
        refused: list[Reload] = []
        changed: list[Source] = []
        match self._registry.poll():
            case Accepted():
                changed.append(Source.POLICY)
            case Refused(problems):
                refused.append(Reload(Source.POLICY, problems))
            case _:
                pass
        reading = self._watch.poll() if self._watch is not None else None
        if reading is not None:
            try:
                self._document, self._unsound = self._parse(reading), ()
                changed.append(Source.ENDPOINTS)
            except PolicyError as error:
                self._unsound = error.problems
                refused.append(Reload(Source.ENDPOINTS, error.problems))
        policy = self._registry.compiled
        if not changed or policy is None:
            return _Found(tuple(refused))
        try:
            endpoints, self._mismatch = self._match(policy), ()
        except PolicyError as error:
            self._mismatch = error.problems
            refused += [Reload(source, error.problems) for source in changed]
            return _Found(tuple(refused))
        self.warnings = warnings = self._warnings_about(policy)
        accepted = [Reload(source, warnings=warnings) for source in changed]
        return _Found((*refused, *accepted), policy, endpoints)

    def _parse(self, reading: Reading) -> EndpointsDocument:
        if isinstance(reading.content, PolicyError):
            raise reading.content
        return parse_endpoints(reading.content, str(self._endpoints_path))

    def _match(self, policy: CompiledPolicy) -> tuple[MatchedEndpoint, ...]:
        listed = static_endpoints(policy.bindings)
        if self._document is None:
            return listed
        return (*listed, *match_endpoints(policy.bindings, self._document))

    def _warnings_about(self, policy: CompiledPolicy) -> tuple[Problem, ...]:
        if self._document is None:
            return policy.warnings
        return (*policy.warnings, *unmatched_entries(policy.bindings, self._document))

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
            is_new = known is None or known.endpoint != matched.endpoint
            if is_new or (known is not None and known.is_draining and not matched.is_draining):
                handle(EndpointSeen(matched.endpoint))
            if matched.is_draining and (is_new or (known is not None and not known.is_draining)):
                handle(EndpointDraining(endpoint_id))
        self._listed = wanted
