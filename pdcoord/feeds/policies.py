"""PoolPolicy objects as a source of the policy in force, in place of a file."""

from collections.abc import Callable, Mapping

from pdcoord.feeds.kubeapi import Collection
from pdcoord.feeds.kubewatch import KubeObject
from pdcoord.policy.compile import CompiledPolicy
from pdcoord.policy.crd import GROUP, PLURAL, VERSION
from pdcoord.policy.errors import Problem
from pdcoord.policy.objects import Judgement, ObjectJudge, Verdict
from pdcoord.policy.registry import Accepted, Refused, Unchanged

POLICIES_MAX = 256
"""Objects of a namespace that count, as many as a file has documents."""


def policies_of(namespace: str) -> Collection:
    """The PoolPolicy objects of a namespace."""
    return Collection(GROUP, VERSION, PLURAL, namespace)


class KubePolicies:
    """What the objects of one namespace say, each object one model; as PolicyRegistry for a file.

    An object that is refused keeps its own last good content in force and touches no other. None at all
    is a policy too: one without models.

    Attributes:
        compiled: what is in force; None before the objects were first listed.
        problems: why objects are not in force as they are now; empty when all are.
        judgement: what the last look gave; replaced as a whole, so another thread may read it.
    """

    def __init__(self, objects: Callable[[], Mapping[str, KubeObject] | None]) -> None:
        """`objects` gives those known by name, as a mapping that never changes: a new one for new objects.

        None until they were listed: no policy is known then, which is not the same as one without models.
        """
        self._objects = objects
        self._looked_at: Mapping[str, KubeObject] | None = None
        self._judge = ObjectJudge()
        self.compiled: CompiledPolicy | None = None
        self.problems: tuple[Problem, ...] = ()
        self.judgement: Judgement | None = None

    def load_first(self) -> CompiledPolicy | None:
        """What is in force of the objects that are known; None while they were not listed yet."""
        self.poll()
        return self.compiled

    def poll(self) -> Unchanged | Accepted | Refused:
        """Look at the objects again; each change is answered once."""
        objects = self._objects()
        if objects is None or objects is self._looked_at:
            return Unchanged()
        old = self.compiled
        refused = self._look(objects)
        assert self.compiled is not None
        if self.compiled is not old:
            return Accepted(self.compiled, refused)
        return Refused(refused) if refused else Unchanged()

    def _look(self, objects: Mapping[str, KubeObject]) -> tuple[Problem, ...]:
        """Judge all objects; the problems that are new."""
        verdicts: Mapping[str, Verdict] = {} if self.judgement is None else self.judgement.verdicts
        self.judgement = judged = self._judge.judge(objects)
        self._looked_at, self.compiled = objects, judged.compiled
        self.problems = tuple(problem for each in judged.verdicts.values() for problem in each.problems)
        return tuple(
            problem
            for name, verdict in judged.verdicts.items()
            if verdict != verdicts.get(name)
            for problem in verdict.problems
        )
