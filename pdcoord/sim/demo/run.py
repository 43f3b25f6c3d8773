"""The demo: three emulated vendors as processes, traffic through them, a killed pod, and a comparison."""

import asyncio
import itertools
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from rich.console import Console

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.demo.canary import prove, settled
from pdcoord.sim.demo.deployment import Canary, Deployment, lay_out
from pdcoord.sim.demo.processes import DemoError, Processes
from pdcoord.sim.demo.report import Progressed, comparison_table, served_table
from pdcoord.sim.demo.traffic import Answer, Prompt, mixed, replay, send, text
from pdcoord.wire.client import Client

RATE_PER_S = 5.0
RUN_S = 12.0
INTERRUPTED = 130


def run(*, keep: bool, seed: int) -> int:
    """Run the demo; 0 if everything that it claims to show was seen."""
    console = Console(width=None if Console().is_terminal else 110)
    folder = Path(tempfile.mkdtemp(prefix="pdcoord-demo-"))
    seen = _Seen()
    try:
        uvloop.run(_demo(console, folder, seen, keep=keep, seed=seed))
        failures = seen.failures
    except DemoError as error:
        failures = [str(error)]
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped")
        if not seen.is_complete:
            shutil.rmtree(folder)
            return INTERRUPTED
        failures = seen.failures
    for failure in failures:
        console.print("not as it should be:", failure, markup=False, soft_wrap=True)
    if failures:
        console.print(f"The logs of every process are in {folder}.", soft_wrap=True)
        return 1
    shutil.rmtree(folder)
    return 0


@dataclass(slots=True)
class _Seen:
    """What the demo has found so far, whoever stops it.

    Attributes:
        is_complete: every scene and run was played to its end.
    """

    failures: list[str] = field(default_factory=list)
    is_complete: bool = False


async def _demo(console: Console, folder: Path, seen: _Seen, *, keep: bool, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - the traffic is to be the same for the same seed
    deployment = lay_out(folder, seed)
    task = asyncio.current_task()
    assert task is not None, "runs in a task"
    # Ctrl-C cancels the task already; being terminated must end the started processes just as well.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with Client() as client, Processes(folder) as processes:
        console.print(deployment.table())
        await _start(console, deployment, processes, client)
        stage = _Stage(console, deployment, processes, client)
        seen.failures += await stage.scenes(rng)
        seen.failures += await stage.runs(rng)
        seen.is_complete = True
        if not seen.failures:
            console.print("[green]Every request was answered, and everything above was checked.[/]")
        if keep:
            await _keep(console, deployment)


async def _start(console: Console, deployment: Deployment, processes: Processes, client: Client) -> None:
    with console.status(f"starting {len(deployment.commands)} processes"):
        for name, command in deployment.commands.items():
            await processes.start(name, command)
        for name, (address, path) in deployment.ready_checks.items():
            await processes.wait_ready(name, address, path, client)
        # Unlike vendors carry nothing before that.
        await settled(client, deployment.admin)


async def _keep(console: Console, deployment: Deployment) -> None:
    url = f"http://{deployment.gateway}"
    console.print(f"\nThe fleet stays up until Ctrl-C. Try:\n  curl {url}/v1/models")
    console.print(
        f"  curl -i {url}/v1/chat/completions -H 'content-type: application/json' "
        f"""-d '{{"model": "{deployment.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'""",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"  {sys.argv[0]} explain --admin-url http://{deployment.admin}", soft_wrap=True)
    await asyncio.Event().wait()


@dataclass(frozen=True, slots=True)
class _Stage:
    console: Console
    deployment: Deployment
    processes: Processes
    client: Client

    async def scenes(self, rng: random.Random) -> list[str]:
        """One request for each thing there is to show, with what must be true of it."""
        shared = text(rng, 16_000)
        split = await self._ask("a long prompt", shared + "\nSummarise this.")
        short = await self._ask("a short prompt", "What is a lease?")
        again = await self._ask("the same prefix again", shared + "\nTranslate this.")
        failures = [f"{a.prompt.kind}: {a.error}" for a in (split, short, again) if a.error]
        for canary in self.deployment.canaries:
            failures += await self._prove(canary)
        if not split.decision.startswith("split"):
            failures.append(f"a long prompt was served '{split.decision}', not split")
        if not short.decision.startswith("colocated"):
            failures.append(f"a short prompt was served '{short.decision}', not colocated")
        if not again.cached_tokens:
            failures.append("a shared prefix was not found in any cache")
        return failures

    async def _prove(self, canary: Canary) -> list[str]:
        """A fixed prompt split over a pair, its KV compared with what the decode engine computes alone."""
        proof = await prove(self.client, self.deployment.model, canary)
        pair = f"{canary.prefill_name} -> {canary.decode_name}"
        self.console.print(f"  canary {pair}: {proof}", soft_wrap=True)
        return [] if proof.is_right else [f"canary {pair}: {proof}"]

    async def _ask(self, kind: str, content: str) -> Answer:
        prompt = Prompt(0.0, kind, content, 24)
        answer = await send(self.client, self.deployment.gateway, self.deployment.model, prompt, "scenes")
        self.console.print(
            f"  {kind:<22} {answer.decision or answer.error:<34} "
            f"first token after {answer.ttft_s * 1e3:4.0f} ms, {answer.cached_tokens:4d} tokens from cache"
        )
        return answer

    async def runs(self, rng: random.Random) -> list[str]:
        """The same traffic by pdcoord, by round robin, and by pdcoord with a pod killed half-way."""
        prompts = mixed(rng, rate_per_s=RATE_PER_S, duration_s=RUN_S)
        pods = itertools.cycle(self.deployment.pods)
        with Progressed(self.console) as progress:
            by_pdcoord = await self._replay(progress, "pdcoord", prompts, self._through_gateway("pdcoord"))
            by_turns = await self._replay(
                progress, "round robin", prompts, lambda prompt: self._send(next(pods), prompt, "turns")
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(self._kill_half_way(progress))
                with_kill = group.create_task(
                    self._replay(progress, "pod killed", prompts, self._through_gateway("kill"))
                )
        self.console.print(served_table([*by_pdcoord, *with_kill.result()]))
        self.console.print(
            comparison_table(
                {"pdcoord": by_pdcoord, "round robin": by_turns, "pdcoord, pod killed": with_kill.result()}
            )
        )
        return _problems({"pdcoord": by_pdcoord, "round robin": by_turns, "pod killed": with_kill.result()})

    async def _kill_half_way(self, progress: Progressed) -> None:
        await asyncio.sleep(RUN_S / 2)
        name = self.deployment.victim
        self.processes[name].kill()
        progress.say(f"killed {name} (SIGKILL) half-way")

    async def _replay(
        self,
        progress: Progressed,
        name: str,
        prompts: list[Prompt],
        send_one: Callable[[Prompt], Awaitable[Answer]],
    ) -> list[Answer]:
        task = progress.begin(name, len(prompts))
        return await replay(prompts, send_one, lambda answer: progress.note(task, answer))

    def _through_gateway(self, cache_salt: str) -> Callable[[Prompt], Awaitable[Answer]]:
        return lambda prompt: self._send(self.deployment.gateway, prompt, cache_salt)

    async def _send(self, address: HostPort, prompt: Prompt, cache_salt: str) -> Answer:
        # A salt for each run: what one run cached must not help the next.
        return await send(self.client, address, self.deployment.model, prompt, cache_salt)


def _problems(runs: dict[str, list[Answer]]) -> list[str]:
    problems = [
        f"{name}: a {answer.prompt.kind} failed: {answer.error}"
        for name, answers in runs.items()
        for answer in answers
        if answer.error
    ]
    texts = zip(*([answer.text for answer in answers] for answers in runs.values()), strict=True)
    different = sum(len(set(same)) > 1 for same in texts)
    if different and not problems:
        problems.append(f"{different} prompts were answered differently depending on who served them")
    for name in ("pdcoord", "pod killed"):
        served = {answer.decision.split(";")[0] for answer in runs[name]}
        missing = {"split", "colocated"} - served
        if missing:
            problems.append(f"{name}: no request was {' or '.join(sorted(missing))}")
    return problems
