"""deploy/images/Dockerfile as data, and a stand-in for a build: its stages run in folders of their own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_S_MAX = 300


@dataclass(frozen=True)
class Step:
    """One instruction, its continuation lines joined."""

    word: str
    rest: str

    def items(self) -> list[str]:
        """The words of an instruction in the JSON form."""
        items: list[str] = json.loads(self.rest)
        return items

    def copied(self) -> tuple[str | None, list[str], str]:
        """Stage, sources and destination of a COPY."""
        words = self.rest.split()
        stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
        return stage, words[:-1], words[-1]


@dataclass
class Stage:
    name: str
    base: str
    steps: list[Step] = field(default_factory=list)

    def all(self, word: str) -> list[Step]:
        return [step for step in self.steps if step.word == word]

    def last(self, word: str) -> Step:
        return self.all(word)[-1]


@dataclass
class Dockerfile:
    """Stages by name, in order; ARGs before the first stage are defaults of the base images."""

    stages: dict[str, Stage] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)

    def chain(self, stage: Stage) -> list[Stage]:
        """What a stage builds upon, the first one first."""
        parent = self.stages.get(stage.base)
        return [*self.chain(parent), stage] if parent else [stage]

    def base_image(self, stage: Stage) -> str:
        base = self.chain(stage)[0].base
        return re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], base)


def parse(path: Path) -> Dockerfile:
    file = Dockerfile()
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stage: Stage | None = None
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            assert name, f"{line}: a stage without a name"
            stage = file.stages[name] = Stage(name, base)
        elif stage is None:
            assert word == "ARG", f"{line}: before the first stage"
            name, _, value = rest.partition("=")
            file.arguments[name] = value
        else:
            stage.steps.append(Step(word, rest.strip()))
    return file


def is_in_context(path: str) -> bool:
    """Whether .dockerignore lets a path of the repository into the build; the last line that fits decides."""
    is_in = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        name = pattern.removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        prefixes = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        candidates = list(parts) if "**/" in pattern else prefixes
        if any(fnmatch(each, name) for each in candidates):
            is_in = pattern.startswith("!")
    return is_in


class Build:
    """Runs stages as a builder would, each in a folder that stands for its root.

    An absolute path in a RUN means the parent's folder if it is there, else the stage's own. Packages come
    from the index and the cache that pip has here.
    """

    def __init__(self, file: Dockerfile, folder: Path) -> None:
        self.file = file
        self._folder = folder
        self._done: set[str] = set()
        tools = folder / "bin"
        tools.mkdir()
        (tools / "python").symlink_to(Path(sys.base_prefix, "bin", "python3"))
        self._path = f"{tools}:/usr/bin:/bin"

    def root(self, stage: str) -> Path:
        return self._folder / "stages" / stage

    def run(self, name: str) -> Path:
        """The root of a stage, made if it was not."""
        for stage in self.file.chain(self.file.stages[name]):
            if stage.name not in self._done:
                self._done.add(stage.name)
                self._build(stage)
        return self.root(name)

    def run_all(self, names: list[str]) -> None:
        """Several stages upon one, side by side."""
        for name in names:
            for stage in self.file.chain(self.file.stages[name])[:-1]:
                self.run(stage.name)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(self.run, names))

    def _build(self, stage: Stage) -> None:
        chain = self.file.chain(stage)
        environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        environment |= {"PATH": self._path, "HOME": os.environ.get("HOME", "/root")}
        for word, rest in (
            (s.word, s.rest) for each in chain for s in each.steps if s.word in {"ENV", "ARG"}
        ):
            pairs = shlex.split(rest) if word == "ENV" else [shlex.split(rest)[0]]
            environment |= dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        # An image keeps no cache and has its bytecode; here that costs more than all the rest.
        del environment["PIP_NO_CACHE_DIR"]
        environment["PIP_NO_COMPILE"] = "1"
        for step in stage.steps:
            if step.word == "COPY":
                self._copy(step, stage)
            elif step.word == "RUN":
                self._execute(self.located(step.rest, stage), chain, environment)

    def located(self, text: str, stage: Stage) -> str:
        """A command with its absolute paths put where the stage's root stands."""

        def place(match: re.Match[str]) -> str:
            for each in self.file.chain(stage):
                path = self.root(each.name) / match[0].lstrip("/")
                if path.exists():
                    return str(path)
            return str(self.root(stage.name) / match[0].lstrip("/"))

        return re.sub(r"(?<![\w.}/])/(?:opt/\w+|build)", place, text)

    def _copy(self, step: Step, stage: Stage) -> None:
        source, names, destination = step.copied()
        base = self.run(source) if source else ROOT
        target = Path(destination)
        into = self.root(stage.name) / str(target if target.is_absolute() else Path("build", target)).lstrip(
            "/"
        )
        for name in names:
            path = base / name.lstrip("/")
            goal = into / path.name if path.is_file() and destination.endswith("/") else into
            goal.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(
                    path, goal, dirs_exist_ok=True, symlinks=True, ignore=_ignored if not source else None
                )
            else:
                shutil.copy2(path, goal)

    def _execute(self, command: str, chain: list[Stage], environment: dict[str, str]) -> None:
        for each in chain:
            (self.root(each.name) / "opt").mkdir(parents=True, exist_ok=True)
        folder = self.root(chain[0].name) / "build"
        done = subprocess.run(
            ["sh", "-e", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_S_MAX,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _ignored(folder: str, names: list[str]) -> list[str]:
    relative = Path(folder).relative_to(ROOT)
    return [name for name in names if not is_in_context(str(relative / name))]


@pytest.fixture(scope="session")
def dockerfile() -> Dockerfile:
    return parse(ROOT / "deploy" / "images" / "Dockerfile")


@pytest.fixture(scope="session")
def build(dockerfile: Dockerfile, tmp_path_factory: pytest.TempPathFactory) -> Build:
    build = Build(dockerfile, tmp_path_factory.mktemp("images"))
    build.run_all([name for name in dockerfile.stages if name.endswith(("-packages", "-files"))])
    return build


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def in_context() -> Callable[[str], bool]:
    return is_in_context
