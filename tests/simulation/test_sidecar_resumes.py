"""Sidecars that continue streams themselves, in virtual time, while engines die and come back at random."""

from collections import Counter
from functools import partial
from random import Random

import pytest

from pdcoord.core.plan import Candidate, Figures, Plan, Why
from pdcoord.core.request import RequestId
from pdcoord.protocol.plans import DialectName
from pdcoord.sim import messages as m
from pdcoord.sim.loop import VirtualLoop
from pdcoord.sim.scenario import MODEL_SEED, Scenario, draw
from pdcoord.sim.tokens import answer_ids
from pdcoord.sim.virtual_engines import VirtualEngines
from pdcoord.sim.virtual_sidecar import Began, Ended, Reply, Turned, VirtualHandoff
from sidecar.vocabulary import Resume

FIGURES = Figures(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, uncached_tokens=9, cached_tokens=0)
CALLS = 12
KILLS = 10


class World:
    """Colocated streams at decode endpoints whose engines are killed again and again."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.loop = VirtualLoop()
        self.engines = VirtualEngines(self.loop, Random(seed))
        self.scenario: Scenario = draw(seed)
        self.decodes = [
            end for end in self.scenario.endpoints if end.pool.can_decode and end.pool.engine == "vllm"
        ]
        self.ends: Counter[str] = Counter()
        self.begins: Counter[str] = Counter()
        for end in self.decodes:
            self.engines.add(end.address, self.scenario.settings[end.id])
        for number in range(CALLS):
            self.loop.at(self.rng.uniform(0.0, 4.0), partial(self.begin, f"r{number}"))
        for _ in range(KILLS):
            self.loop.at(self.rng.uniform(0.2, 8.0), self.kill)

    def kill(self) -> None:
        address = self.rng.choice(self.decodes).address
        if self.engines.is_alive(address):
            self.engines.kill(address)
            self.loop.after(self.rng.uniform(0.1, 2.0), lambda: self.engines.start(address))

    def begin(self, name: str) -> None:
        decode, *others = self.rng.sample(self.decodes, len(self.decodes))
        count = self.rng.randint(20, 200)
        prompt = tuple(self.rng.randrange(256) for _ in range(self.rng.randint(8, 60)))
        request = m.EngineRequest(id=name, prompt=prompt, output_tokens_max=count)
        plan = Plan(
            request_id=RequestId(name),
            chosen=Candidate(decode, None, None, FIGURES),
            why=Why.COLOCATED_FASTER,
            dialect=DialectName.NIXLV2,
        )
        resume = Resume(tuple(each.address for each in others), tries_max=12, stall_s=10.0)
        wanted = answer_ids(MODEL_SEED, prompt, count)
        VirtualHandoff(
            self.loop,
            self.engines,
            plan,
            request,
            lambda reply: self.hear(name, reply, wanted),
            resume=resume,
        ).begin()

    def hear(self, name: str, reply: Reply, wanted: tuple[int, ...]) -> None:
        match reply:
            case Began():
                self.begins[name] += 1
            case Turned():
                self.ends[name] += 1
                assert not self.begins[name], f"{name} was refused behind its head"
            case Ended(tokens, is_whole):
                self.ends[name] += 1
                assert is_whole, f"{name} was broken off with {len(tokens)} of {len(wanted)} tokens"
                assert tokens == wanted, f"{name} lost or doubled a token"


@pytest.mark.parametrize("block", range(4))
def test_no_stream_that_has_begun_loses_or_doubles_a_token(block: int) -> None:
    begun = 0
    for seed in range(block * 15, block * 15 + 15):
        world = World(seed)
        if not world.decodes:
            continue
        world.loop.run()
        assert world.ends == Counter([f"r{number}" for number in range(CALLS)]), f"seed {seed}"
        assert max(world.begins.values(), default=0) <= 1, f"seed {seed}"
        begun += len(world.begins)
    assert begun > 4 * CALLS, "hardly a stream had begun, so that nothing was shown"
