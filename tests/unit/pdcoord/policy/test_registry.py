"""Transcripts of the policy in force while its file is changed in every way."""

from pathlib import Path

import pytest

from pdcoord.policy.errors import PolicyError
from pdcoord.policy.registry import Accepted, PolicyRegistry, Refused, Unchanged


class Story:
    """A registry over a file; `look` polls until the content has settled and says what came of it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path = folder / "p.yaml"
        self.path.write_text(text)
        self.registry = PolicyRegistry(self.path)

    def write(self, text: str) -> "Story":
        self.path.write_text(text)
        return self

    def look(self) -> str:
        results = [self.registry.poll() for _ in range(4)]
        told = [result for result in results if not isinstance(result, Unchanged)]
        assert len(told) <= 1, "a change is told once"
        match told:
            case [Accepted(compiled)]:
                assert self.registry.compiled is compiled
                assert self.registry.problems == ()
                return f"accepted {compiled.models[0].name}"
            case [Refused(problems)]:
                assert self.registry.problems == problems
                return f"refused {problems[0].message}"
            case _:
                return "unchanged"

    @property
    def in_force(self) -> str | None:
        compiled = self.registry.compiled
        return None if compiled is None else compiled.models[0].name


@pytest.fixture
def story(tmp_path: Path, good: str) -> Story:
    made = Story(tmp_path, good)
    assert made.registry.load_first().models[0].name == "meta/llama"
    return made


def test_good_bad_good(story: Story, good: str) -> None:
    bad = good.replace("role: decode", "role: decod")
    assert story.look() == "unchanged"
    assert story.write(good.replace("meta/llama", "second")).look() == "accepted second"
    assert story.write(bad).look() == 'refused is "decod", expected one of prefill, decode, both'
    assert story.in_force == "second"
    assert story.look() == "unchanged"
    assert story.write(bad + "# still bad\n").look().startswith("refused")
    assert story.write(good.replace("meta/llama", "third")).look() == "accepted third"
    assert story.in_force == "third"


def test_back_to_what_is_in_force_is_no_change_but_no_problem_either(story: Story, good: str) -> None:
    assert story.write("kind: [").look().startswith("refused is not YAML")
    assert len(story.registry.problems) == 1
    assert story.write(good).look() == "unchanged"
    assert not story.registry.problems
    assert story.write("kind: [").look().startswith("refused is not YAML")


def test_a_file_that_vanishes_leaves_the_policy_in_force(story: Story, good: str) -> None:
    story.path.unlink()
    assert story.look() == "refused cannot be read: No such file or directory"
    assert story.look() == "unchanged"
    assert story.in_force == "meta/llama"
    assert story.write(good).look() == "unchanged"
    assert story.registry.problems == ()
    story.path.unlink()
    story.path.mkdir()
    assert story.look() == "refused is a directory; name one YAML file"
    story.path.rmdir()
    assert story.write(good.replace("meta/llama", "second")).look() == "accepted second"


def test_a_half_written_file_is_not_judged(story: Story, good: str) -> None:
    """Each look finds a longer file; some of them would be sound policies with pools missing."""
    new = good.replace("meta/llama", "second")
    for length in range(0, len(new), len(new) // 20):
        story.path.write_text(new[:length])
        assert isinstance(story.registry.poll(), Unchanged)
    assert story.in_force == "meta/llama"
    assert story.registry.problems == ()
    assert story.write(new).look() == "accepted second"


def test_an_emptied_file_is_refused_once_it_stays_empty(story: Story) -> None:
    assert story.write("").look() == "refused holds no document"
    assert story.in_force == "meta/llama"


def test_a_config_map_changes_by_its_link(tmp_path: Path, good: str) -> None:
    for number, text in enumerate([good, good.replace("meta/llama", "second"), "nonsense"]):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "p.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("..0")
    path = tmp_path / "mounted.yaml"
    path.symlink_to(Path("..data") / "p.yaml")
    story = Story.__new__(Story)
    story.path, story.registry = path, PolicyRegistry(path)
    story.registry.load_first()

    def swap(number: int) -> str:
        (tmp_path / "..tmp").symlink_to(f"..{number}")
        (tmp_path / "..tmp").rename(tmp_path / "..data")
        return story.look()

    assert swap(1) == "accepted second"
    assert swap(2) == 'refused is "nonsense", expected a mapping'
    assert story.registry.problems[0].file == str(path)
    assert swap(1) == "unchanged"
    assert swap(0) == "accepted meta/llama"


def test_a_first_policy_that_is_wrong_is_raised_and_a_later_one_taken(tmp_path: Path, good: str) -> None:
    story = Story(tmp_path, good.replace("role: decode", "role: prefill"))
    with pytest.raises(PolicyError, match="no pool decodes"):
        story.registry.load_first()
    assert story.in_force is None
    assert len(story.registry.problems) == 1
    assert story.look() == "unchanged"
    assert story.write(good).look() == "accepted meta/llama"


def test_polling_alone_finds_the_first_policy(tmp_path: Path, good: str) -> None:
    assert Story(tmp_path, good).look() == "accepted meta/llama"
