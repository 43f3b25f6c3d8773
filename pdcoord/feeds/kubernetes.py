"""Pods as an endpoints source: those of a label selector or of an InferencePool, followed by watches."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pdcoord.feeds.kubeapi import Collection
from pdcoord.feeds.kubefollow import Api, Follower, FollowHooks
from pdcoord.feeds.kubewatch import KubeObject, WatchLimits
from pdcoord.feeds.podspec import (
    PoolTerms,
    Skipped,
    SkipReason,
    keep_of_pod,
    read_inference_pool,
    read_pod,
)
from pdcoord.policy.endpoints import EndpointEntrySpec, EndpointsDocument, Matching
from pdcoord.policy.errors import KeyPath, Problem

ENTRIES_MAX = 16_384
"""As in an endpoints file."""
WARNINGS_MAX = 20
"""More say nothing new; the metrics have the count."""


@dataclass(frozen=True, slots=True)
class PodsWanted:
    """Which pods.

    Attributes:
        selector: label selector, where there is no InferencePool.
        inference_pool: name of the InferencePool whose selector and ports are used; None for none.
    """

    namespace: str
    selector: str
    inference_pool: str | None = None


@dataclass(frozen=True, slots=True)
class PodOrigin:
    """A pod, for problems with what it says."""

    namespace: str
    name: str

    def problem(self, _key_path: KeyPath, message: str) -> Problem:
        """A problem with the pod as a whole."""
        return Problem(f"pod {self.namespace}/{self.name}", None, (), message)


@dataclass(frozen=True, slots=True)
class _Known:
    """What was read of a pod, while it is the same object."""

    pod: KubeObject
    ports: tuple[int, ...]
    uid: object
    found: tuple[EndpointEntrySpec, ...] | Skipped


class PodsSource:
    """Pods to endpoints. One pod that is wrong is left out, named and counted; the others stay.

    `run` keeps the copy of the pods; `poll` reads it, in a thread of its own if need be.

    Attributes:
        followers: of the pods and, where one is used, of the InferencePool.
        left_out: pods and ranks without an endpoint, by reason, as of the last `judge`.
    """

    def __init__(
        self,
        api: Api,
        wanted: PodsWanted,
        *,
        hooks: FollowHooks,
        clock: Callable[[], float],
        rng: random.Random,
        limits: WatchLimits | None = None,
    ) -> None:
        self._wanted = wanted
        self._hooks = hooks
        of = Collection("", "v1", "pods", wanted.namespace, labels=wanted.selector)
        self._pods = Follower(api, of, hooks=hooks, clock=clock, rng=rng, limits=limits, keep=keep_of_pod)
        self._pool: Follower | None = None
        if wanted.inference_pool is not None:
            of = Collection(
                "inference.networking.k8s.io",
                "v1",
                "inferencepools",
                wanted.namespace,
                fields=f"metadata.name={wanted.inference_pool}",
            )
            told = FollowHooks(self._pool_changed, hooks.troubled)
            self._pool = Follower(api, of, hooks=told, clock=clock, rng=rng, limits=limits)
        self.followers: Sequence[Follower] = [self._pods, *([self._pool] if self._pool else [])]
        self.left_out: Counter[SkipReason] = Counter()
        self._terms: dict[Collection, PoolTerms] = {}
        self._has_terms = asyncio.Event()
        self._pool_problem: Problem | None = None
        self._known: dict[str, _Known] = {}
        self._read_last: tuple[Mapping[str, KubeObject], tuple[int, ...]] | None = None
        self._skipped: list[tuple[str, Skipped]] = []

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why the InferencePool as it is now is not in force; empty when it is."""
        return (self._pool_problem,) if self._pool_problem is not None else ()

    def load_first(self) -> EndpointsDocument | None:
        """None: nothing is known before `run` has asked."""
        return None

    def poll(self) -> EndpointsDocument | None:
        """All sound pods if any changed, else None. Not to be called twice at a time."""
        pods, listed = self._pods.objects, self._pods.listed
        if listed is None:
            return None
        terms = self._terms.get(listed)
        ports = terms.ports if terms is not None else ()
        last = self._read_last
        if last is not None and last[0] is pods and last[1] == ports:
            return None
        self._read_last = pods, ports
        self._known = {name: self._read(name, pod, ports) for name, pod in pods.items()}
        return self._document()

    def judge(self, matching: Matching) -> tuple[Problem, ...]:
        """Count what is left out; what somebody should change, the first `WARNINGS_MAX` of each kind."""
        counts = Counter(skipped.reason for _, skipped in self._skipped)
        counts[SkipReason.AMBIGUOUS] += len(matching.problems)
        counts[SkipReason.UNPICKED] += len(matching.unpicked)
        self.left_out = counts
        faults = [
            self._origin(name).problem((), skipped.message)
            for name, skipped in self._skipped
            if skipped.reason.is_fault
        ]
        kinds = (faults, matching.problems, matching.unpicked)
        return tuple(problem for kind in kinds for problem in _first(kind, self._wanted.namespace))

    async def run(self) -> None:
        """Follow the pods until cancelled."""
        async with asyncio.TaskGroup() as group:
            if self._pool is not None:
                group.create_task(self._pool.run())
                await self._has_terms.wait()
            await self._pods.run()

    def _read(self, name: str, pod: KubeObject, ports: tuple[int, ...]) -> _Known:
        known = self._known.get(name)
        if known is not None and known.pod is pod and known.ports == ports:
            return known
        metadata = pod.get("metadata")
        uid = metadata.get("uid") if isinstance(metadata, Mapping) else None
        was_ready = known is not None and known.uid == uid and not isinstance(known.found, Skipped)
        return _Known(pod, ports, uid, read_pod(pod, ports, was_ready=was_ready))

    def _document(self) -> EndpointsDocument:
        entries: list[EndpointEntrySpec] = []
        sources: list[tuple[PodOrigin, int]] = []
        skipped: list[tuple[str, Skipped]] = []
        holders: dict[str, str] = {}
        # An address that a terminating pod still shows may be another's already.
        ordered = sorted(self._known.items(), key=lambda item: (_is_draining(item[1]), item[0]))
        for name, known in ordered:
            if isinstance(known.found, Skipped):
                skipped.append((name, known.found))
                continue
            for index, entry in enumerate(known.found):
                holder = holders.setdefault(entry.address, name)
                if holder != name or len(entries) >= ENTRIES_MAX:
                    skipped.append((name, _surplus(entry, holder, name)))
                    continue
                entries.append(entry)
                sources.append((self._origin(name), index))
        self._skipped = skipped
        return EndpointsDocument(tuple(entries), tuple(sources))

    def _origin(self, name: str) -> PodOrigin:
        return PodOrigin(self._wanted.namespace, name)

    def _pool_changed(self) -> None:
        """Take over what the InferencePool says now; if that cannot be used, what it said last stays."""
        name, namespace = self._wanted.inference_pool or "", self._wanted.namespace
        pool = self._pool.objects.get(name) if self._pool is not None else None
        found = read_inference_pool(pool) if pool is not None else "does not exist"
        if isinstance(found, str):
            remedy = "; its last terms stay in force" if self._has_terms.is_set() else ""
            place = f"InferencePool {namespace}/{name}"
            self._pool_problem = Problem(place, None, (), found + remedy)
        else:
            self._pool_problem = None
            of = Collection("", "v1", "pods", namespace, labels=found.selector)
            # New ports hold for the pods of a new selector only once these are listed.
            self._terms = {key: terms for key, terms in self._terms.items() if key == self._pods.listed}
            self._terms[of] = found
            self._pods.follow(of)
            self._has_terms.set()
        self._hooks.changed()


def _is_draining(known: _Known) -> bool:
    return not isinstance(known.found, Skipped) and all(entry.is_draining for entry in known.found)


def _surplus(entry: EndpointEntrySpec, holder: str, name: str) -> Skipped:
    if holder != name:
        return Skipped(SkipReason.REPEATED, f"has address {entry.address}, which pod {holder} has")
    return Skipped(SkipReason.TOO_MANY, f"is beyond the {ENTRIES_MAX} endpoints that one process takes")


def _first(problems: Iterable[Problem], namespace: str) -> Iterable[Problem]:
    listed = list(problems)
    yield from listed[:WARNINGS_MAX]
    if len(listed) > WARNINGS_MAX:
        message = f"and {len(listed) - WARNINGS_MAX} more pods like these"
        yield Problem(f"pods in {namespace}", None, (), message)
