"""Tests of reading files and of checking documents against a model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pdcoord.policy.errors import PolicyError
from pdcoord.policy.yamltext import (
    FILE_BYTES_MAX,
    Document,
    FaultsError,
    parse_documents,
    read_documents,
    show,
    validate,
)


def problems_of(text: str, model_class: type[BaseModel] | None = None) -> list[str]:
    try:
        documents = parse_documents(text.encode(), "f.yaml")
        if model_class is not None:
            validate(documents[0], model_class)
    except PolicyError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_a_file_is_read_with_the_name_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("---\n# nothing\n---\na: 1\n---\nb:\n  c: 2\n")
    first, second = read_documents(path)
    assert (first.file, first.data) == (str(path), {"a": 1})
    assert second.position_of(("b", "c")) == 7
    assert second.position_of(("b", "missing", 3)) == 6
    assert second.position_of(("missing",)) == 6


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    (document,) = parse_documents("\ufeffa: 1".encode(), "f")
    assert document.data == {"a": 1}


def test_what_is_no_readable_file_is_said_plainly(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    for path, message in [
        (tmp_path, "is a directory; name one YAML file"),
        (tmp_path / "none", "cannot be read: No such file or directory"),
        (large, f"is larger than {FILE_BYTES_MAX} bytes; split it"),
    ]:
        with pytest.raises(PolicyError) as caught:
            read_documents(path)
        assert str(caught.value) == f"{path}: {message}"


def test_a_file_without_a_document_is_refused() -> None:
    assert problems_of("") == ["f.yaml: holds no document"]
    assert problems_of("---\n---\n# only this\n") == ["f.yaml: holds no document"]


def test_bytes_that_are_no_text_are_refused_with_their_line() -> None:
    with pytest.raises(PolicyError) as caught:
        parse_documents(b"a: 1\nb: \xff\n", "f")
    assert str(caught.value) == "f:2: is not UTF-8 text; save it as UTF-8"


def test_problems_of_all_documents_are_said_at_once() -> None:
    first, second, third = problems_of("a: 1\na: 2\n---\nb: 1\nb: 2\n---\nc: [\n")
    assert first == 'f.yaml:2: key "a" is already set on line 1; keep one'
    assert second == 'f.yaml:5: key "b" is already set on line 4; keep one'
    assert third.startswith("f.yaml:7: is not YAML: ")


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    count: Annotated[int, Field(ge=1)]
    weight: float = 1.0
    colour: Colour = Colour.RED

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.count == 13:
            raise FaultsError([(("count",), "is 13, which is unlucky"), ((), "is cursed")])
        if self.count == 14:
            raise ValueError("is 14")
        return self


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["Whole"]
    parts: Annotated[tuple[Part, ...], Field(min_length=1, max_length=3)]


def load(text: str) -> Whole:
    (document,) = parse_documents(text.encode(), "f.yaml")
    return validate(document, Whole)


def test_a_sound_document_becomes_an_instance() -> None:
    whole = load("kind: Whole\nparts:\n- {count: 2, weight: 3, colour: blue}\n")
    assert whole == Whole(kind="Whole", parts=(Part(count=2, weight=3.0, colour=Colour.BLUE),))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("{count: 0}", "parts[0].count: is 0, expected a whole number of at least 1"),
        ('{count: "2"}', 'parts[0].count: is "2", expected a whole number of at least 1'),
        ("{count: 2.5}", "parts[0].count: is 2.5, expected a whole number of at least 1"),
        ("{count: true}", "parts[0].count: is true, expected a whole number of at least 1"),
        ("{count: null}", "parts[0].count: is empty, expected a whole number of at least 1"),
        ("{count: [1]}", "parts[0].count: is a list of 1, expected a whole number of at least 1"),
        ("{count: {}}", "parts[0].count: is a mapping, expected a whole number of at least 1"),
        ("{}", "parts[0].count: is missing, expected a whole number of at least 1"),
        ("{count: 1, weight: .nan}", "parts[0].weight: is nan, expected a number"),
        ("{count: 1, weight: -.inf}", "parts[0].weight: is -inf, expected a number"),
        ("{count: 1, colour: green}", 'parts[0].colour: is "green", expected one of red, blue'),
        ("{count: 1, color: red}", "parts[0].color: is not a known key; did you mean colour?"),
        ("7", "parts[0]: is 7, expected a mapping"),
        ("{count: 14}", "parts[0]: is 14"),
    ],
)
def test_each_problem_has_its_line_its_key_and_what_was_expected(part: str, expected: str) -> None:
    assert problems_of(f"kind: Whole\nparts:\n- {part}\n", Whole) == [f"f.yaml:3: {expected}"]


def test_a_validator_can_blame_several_values_beneath_its_own() -> None:
    assert problems_of("kind: Whole\nparts:\n- count: 1\n- weight: 1\n  count: 13\n", Whole) == [
        "f.yaml:4: parts[1]: is cursed",
        "f.yaml:5: parts[1].count: is 13, which is unlucky",
    ]


def test_a_missing_key_is_on_the_line_of_what_lacks_it() -> None:
    assert problems_of("kind: Whole\nparts:\n- weight: 1\n\n- count: 1\n", Whole) == [
        "f.yaml:3: parts[0].count: is missing, expected a whole number of at least 1"
    ]
    assert problems_of("kind: Whole\n", Whole) == [
        "f.yaml:1: parts: is missing, expected a list of 1 to 3 entries"
    ]


def test_a_list_is_too_short_only_if_it_is() -> None:
    assert problems_of("kind: Whole\nparts: []\n", Whole) == [
        "f.yaml:2: parts: is a list of 0, expected a list of 1 to 3 entries"
    ]
    assert problems_of("kind: Whole\nparts: [3]\n", Whole) == ["f.yaml:2: parts[0]: is 3, expected a mapping"]


def test_another_kind_is_said_alone() -> None:
    assert problems_of("kind: Other\nspec: {a: 1}\n", Whole) == ['f.yaml:1: kind: is "Other", expected Whole']
    assert len(problems_of("spec: {a: 1}\n", Whole)) == 3


@pytest.mark.parametrize("text", ["7", "[1]", "text", "- a: 1"])
def test_a_document_that_is_no_mapping_is_refused(text: str) -> None:
    (line,) = problems_of(text, Whole)
    assert line.endswith("expected a mapping")


def test_numbers_of_any_size_are_answered() -> None:
    (line,) = problems_of(f"kind: Whole\nparts:\n- count: -{'9' * 60}\n", Whole)
    assert line.startswith("f.yaml:3: parts[0].count: is -999")


def test_values_are_shown_on_one_line() -> None:
    assert show("a\nb") == '"a\\u000ab"'
    assert show([1, 2]) == "a list of 2"
    assert show(()) == "a value"


def test_a_problem_is_made_on_its_line() -> None:
    document = Document("f", {"a": 1}, {(): 1, ("a",): 4})
    assert str(document.problem(("a",), "is odd")) == "f:4: a: is odd"
