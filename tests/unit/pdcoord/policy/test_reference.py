"""Tests that the generated files are as the classes say, and that the page's examples are true."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from pdcoord.policy.commands import check, schema
from pdcoord.policy.endpoints import load_endpoints
from pdcoord.policy.forms import OUTSIDE
from pdcoord.policy.reference import (
    BEGIN,
    DOCS_FILE,
    END,
    SCHEMA_FILE,
    json_schema_text,
    main,
    reference_text,
    with_reference,
)
from transfer.presets import PRESETS

ROOT = Path(__file__).resolve().parents[4]
HOW = "run python -m pdcoord.policy.reference at the top of the repository"


def test_the_schema_file_is_fresh() -> None:
    assert (ROOT / SCHEMA_FILE).read_text(encoding="utf-8") == json_schema_text() + "\n", HOW
    assert schema() == json_schema_text()


@pytest.mark.parametrize("is_object", [False, True])
def test_the_schema_knows_both_forms(good: str, *, is_object: bool) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    document = yaml.safe_load(good)
    place = document
    if is_object:
        place = {key: document.pop(key) for key in [*document] if key not in OUTSIDE}
        document |= {"spec": place, "status": {"conditions": []}}
        document["metadata"] |= {"namespace": "prod", "labels": {"a": "b"}}
    assert list(validator.iter_errors(document)) == []
    place["sol"] = {}
    assert "sol" in str(next(validator.iter_errors(document)))
    del place["sol"], place["model"]
    assert "model" in str(next(validator.iter_errors(document)))
    place["model"], document["metadata"]["nmae"] = {"name": "a"}, "b"
    assert "nmae" in str(next(validator.iter_errors(document)))


def test_the_page_is_fresh() -> None:
    page = (ROOT / DOCS_FILE).read_text(encoding="utf-8")
    assert page == with_reference(page), HOW


def test_the_page_has_every_key_with_type_default_and_meaning() -> None:
    rows = [line for line in reference_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)[1:-1]
        assert len(cells) == 4
        assert all(cell.strip() for cell in cells), row
    assert "| `block_tokens` | a whole number of at least 1 | required without a preset |" in reference_text()
    assert "### pools[].layout" in reference_text()


def test_a_page_without_markers_is_not_written_over() -> None:
    assert with_reference(f"a\n{BEGIN}\nold\n{END}\nb") == f"a\n{reference_text()}\nb"
    for page in ("", BEGIN, END, f"{END} {BEGIN}"):
        with pytest.raises(ValueError, match="the page lacks"):
            with_reference(page)


def test_both_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (SCHEMA_FILE, DOCS_FILE):
        path.parent.mkdir(parents=True)
    DOCS_FILE.write_text(f"{BEGIN}{END}", encoding="utf-8")
    main()
    assert DOCS_FILE.read_text(encoding="utf-8") == reference_text()
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json_schema_text() + "\n"


def test_what_the_page_shows_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worked example, its summary, and the problems of its broken twin."""
    page = (ROOT / DOCS_FILE).read_text(encoding="utf-8")
    example, layout, endpoints = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    summary, problems = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("llama.yaml").write_text(example, encoding="utf-8")
    assert check([Path("llama.yaml")]) == 0
    assert capsys.readouterr().out.rstrip() == summary
    broken = example.replace("order: HND", "odrer: HND").replace("block_tokens: 64", "block_tokens: 0")
    broken = broken.replace("{ttft_ms: 2000, tpot_ms: 50}", "{ttft: 2000}")
    Path("broken.yaml").write_text(broken, encoding="utf-8")
    assert check([Path("broken.yaml")]) == 1
    assert capsys.readouterr().out.rstrip() == problems
    Path("endpoints.yaml").write_text(endpoints, encoding="utf-8")
    assert len(load_endpoints(Path("endpoints.yaml")).entries) == 2
    assert example.count("    layout: {block_tokens: 64}\n") == 1
    Path("preset.yaml").write_text(
        example.replace("    layout: {block_tokens: 64}\n", layout), encoding="utf-8"
    )
    assert check([Path("preset.yaml")]) == 0
    assert "64 HND fp8_e4m3fnuz TP 2" in capsys.readouterr().out


def test_the_page_lists_every_preset_with_its_evidence() -> None:
    text = reference_text()
    for name, preset in PRESETS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| {preset.evidence}: {preset.source} |" in row
        assert f"block_tokens: {preset.layout.block_tokens}, order: {preset.layout.order}" in row
