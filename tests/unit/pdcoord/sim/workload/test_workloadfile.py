"""The workload file: how it is refused, with field, value and remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pdcoord.policy.errors import PolicyError, format_key_path
from pdcoord.sim.workload.workloadfile import load_workload

Write = Callable[[str], Path]
LOAD = "load: {stages: [{rate: 1, duration: 10}]}\n"
CHAT = "parts: [{name: a, chat: {}}]\n"


def problems(path: Path) -> list[tuple[str, str]]:
    with pytest.raises(PolicyError) as caught:
        load_workload(path)
    return [(format_key_path(problem.key_path), problem.message) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (CHAT, "load", 'is missing, which part "a" needs; set load here or in the part'),
        (LOAD + "parts: [{name: a}]", "parts[0]", "has no kind of traffic; set one of shared_prefix, chat"),
        (
            LOAD + "parts: [{name: a, chat: {}, rag: {}}]",
            "parts[0].rag",
            "is set beside chat; make it a part",
        ),
        (LOAD + "parts: [{name: a, chat: {turn: 3}}]", "parts[0].chat.turn", "did you mean turns?"),
        (
            LOAD + "parts: [{name: a, chat: {turns: many}}]",
            "parts[0].chat.turns",
            'is "many", expected a number, or a mapping with type, mean',
        ),
        (
            LOAD + "parts: [{name: a, chat: {output_len: {type: uniform, min: 9, max: 3}}}]",
            "parts[0].chat.output_len.max",
            "is 3, expected at least min (9)",
        ),
        (
            LOAD + "parts: [{name: a, chat: {}}, {name: a, rag: {}}]",
            "parts[1].name",
            'is "a", which parts[0] has; rename one',
        ),
        (LOAD + CHAT + "tenants: [{name: t}, {name: t}]", "tenants[1].name", 'is "t" a second time'),
        (
            LOAD + "parts: [{name: a, mooncake: {file: x}}]",
            "load",
            "is used by no part: all have their own times; remove it",
        ),
        (
            "parts: [{name: a, azure: {file: x}, weight: 2}]",
            "parts[0].weight",
            "is set on a trace, which has its own times; use rate_factor",
        ),
        (
            "parts: [{name: a, azure: {file: x, from_s: 9, until_s: 9}}]",
            "parts[0].azure.until_s",
            "is 9, expected more than from_s (9)",
        ),
        (
            "key_tokens: 100\nparts: [{name: a, mooncake: {file: x}}]",
            "key_tokens",
            "is 100, expected a divisor of 512",
        ),
        (
            LOAD + "parts: [{name: a, shared_prefix: {num_groups: 2, num_unique_system_prompts: 3}}]",
            "parts[0].shared_prefix.num_unique_system_prompts",
            "is num_groups under its newer name; keep one of them",
        ),
        (
            LOAD + "parts: [{name: a, shared_prefix: {num_groups: 10000, num_prompts_per_group: 1000}}]",
            "parts[0].shared_prefix.num_prompts_per_group",
            "is 1000, which makes 10000000 prompts, expected at most 1000000",
        ),
        ("load: {stages: [{rate: -1, duration: 5}]}\n" + CHAT, "load.stages[0].rate", "is -1, expected"),
        ("load: {stages: [{rate: 1e6, duration: 1e6}]}\n" + CHAT, "load", "expected at most 10000000"),
        (
            "parts:\n"
            + "".join(
                f"- {{name: p{n}, chat: {{}}, load: {{stages: [{{rate: 1e6, duration: 9}}]}}}}\n"
                for n in range(2)
            ),
            "parts",
            "have 18000000 arrivals in all, expected at most 10000000",
        ),
    ],
)
def test_a_fault_is_named_with_its_place_and_remedy(
    write: Write, text: str, place: str, message: str
) -> None:
    found = problems(write(text))
    assert [where for where, _ in found] == [place]
    assert message in found[0][1]


def test_another_kind_of_document_is_said_to_be_that(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("apiVersion: pdcoord.io/v1alpha1\nkind: EmulatedFleet\nengines: []\n")
    assert problems(path) == [("kind", 'is "EmulatedFleet", expected Workload')]


def test_a_second_document_is_refused(write: Write) -> None:
    assert problems(write(LOAD + CHAT + "---\na: 1\n")) == [
        ("", "is a second document; a workload file holds one")
    ]


@pytest.mark.parametrize(
    ("text", "key_tokens"),
    [
        ("parts: [{name: a, mooncake: {file: x}}]", 512),
        ("key_tokens: 128\nparts: [{name: a, mooncake: {file: x}}]", 128),
        (LOAD + "parts: [{name: a, mooncake: {file: x}}, {name: b, chat: {}}]", 64),
        (LOAD + CHAT, 64),
    ],
)
def test_one_grain_of_prefixes_serves_all_parts(write: Write, text: str, key_tokens: int) -> None:
    assert load_workload(write(text)).spec.key_tokens_used == key_tokens
