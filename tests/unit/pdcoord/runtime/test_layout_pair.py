"""Two layouts by name or by keys, judged, with what is known of each."""

import io
import json
from dataclasses import replace

import pytest

from pdcoord.runtime.layout_pair import (
    BAD_INPUT,
    IMPOSSIBLE,
    POSSIBLE,
    LayoutTextError,
    compare,
    parse_layout,
)
from transfer.layout import KvDtype, KvLayout, KvSplit, Order
from transfer.presets import PRESETS


def shown(producer: str, consumer: str) -> tuple[int, str]:
    out = io.StringIO()
    return compare(producer, consumer, as_json=False, out=out), out.getvalue()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_named_and_paired_with_itself(name: str) -> None:
    status, text = shown(name, name)
    assert status == POSSIBLE
    assert text.startswith("verdict   native\nreason    layouts are equal\n")
    assert text.count(PRESETS[name].source) == 2
    assert text.count(f"evidence  {PRESETS[name].evidence}\n") == 2


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("block_tokens=16", KvLayout(16)),
        (
            "block_tokens=128, order=HND, dtype=fp8_e5m2, split=halved, tiling=cpu-vec, head_dim_multiple=64",
            KvLayout(128, Order.HND, KvDtype.FP8_E5M2, 1, "cpu-vec", KvSplit.HALVED, 64),
        ),
        (
            "nvidia-flash-attn:block_tokens=32,tensor_parallel=4",
            replace(PRESETS["nvidia-flash-attn"].layout, block_tokens=32, tensor_parallel=4),
        ),
        ("preset=cpu-vec,block_tokens=64", replace(PRESETS["cpu-vec"].layout, block_tokens=64)),
        ("intel-gaudi:", PRESETS["intel-gaudi"].layout),
    ],
)
def test_layouts_are_read_from_text(text: str, layout: KvLayout) -> None:
    assert parse_layout(text).layout == layout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu", 'preset is "cpu", expected one of nvidia-flash-attn'),
        ("", 'preset is "", expected one of'),
        ("cpu-vec:order", '"order" is not key=value'),
        ("cpu-vec:=5", '"=5" is not key=value'),
        ("cpu-vec:ordr=HND", "ordr is not a known key; did you mean order?"),
        ("cpu-vec:order=hnd", 'order is "hnd", expected one of HND, NHD'),
        ("cpu-vec:block_tokens=0", "block_tokens is 0, expected a whole number of at least 1"),
        ("cpu-vec:block_tokens=-1", "block_tokens is -1, expected"),
        ("cpu-vec:block_tokens=many", 'block_tokens is "many", expected a whole number'),
        ("cpu-vec:preset=cpu-amx", "preset is given twice"),
        ("order=HND", "block_tokens is missing, expected a whole number"),
        ("dtype=fp8,order=x", 'order is "x"'),
        ("cpu-vec:block_tokens=" + "9" * 5000, "block_tokens is"),
        ("cpu-vec:block_tokens=²", 'block_tokens is "²", expected a whole number'),
    ],
)
def test_what_is_no_layout_is_said_with_its_key(
    text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LayoutTextError) as caught:
        parse_layout(text)
    assert said in str(caught.value)
    assert "such as nvidia-flash-attn" in str(caught.value) or "twice" in said
    assert shown("cpu-vec", text) == (BAD_INPUT, "")
    assert shown(text, "cpu-vec") == (BAD_INPUT, "")
    assert capsys.readouterr().err.startswith('pdcoord paths: layout "')


def test_both_layouts_at_fault_are_both_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("one", "two")[0] == BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_pair_of_vendors_has_its_cost_and_what_stock_makes_of_it() -> None:
    status, text = shown("nvidia-flash-attn", "cpu-vec:block_tokens=32,dtype=float32")
    assert status == POSSIBLE
    lines = text.splitlines()
    assert lines[0] == "verdict   convert"
    assert lines[1].endswith("bfloat16 becomes float32 exactly")
    assert lines[2].startswith(
        "cost      2 passes over the KV to pack and 3 to unpack, 0.5 times the consumer's"
    )
    assert lines[3].startswith("stock     impossible with connector nixl: nixl moves equal layouts only")
    assert "consumer  cpu-vec with block_tokens=32,dtype=float32" in lines
    assert "  evidence  verified on CPU, for the preset without what was overridden" in lines
    assert "  evidence  read from source" in lines


def test_an_impossible_pair_is_status_one_with_a_reason() -> None:
    status, text = shown("nvidia-flash-attn", "block_tokens=16,tiling=fractal-nz")
    assert status == IMPOSSIBLE
    assert text.startswith(
        "verdict   impossible\nreason    layouts differ in tiling, and nothing here can unpack"
    )
    assert "\ncost      -\n" in text
    assert "consumer  given by its keys\n" in text
    assert "  source    as given\n" in text


def test_json_has_all_of_it() -> None:
    out = io.StringIO()
    assert compare("amd-aiter:dtype=fp8_e4m3fnuz", "block_tokens=16", as_json=True, out=out) == POSSIBLE
    found = json.loads(out.getvalue())
    assert found["verdict"] == "convert"
    assert found["cost"]["wire_factor"] == 0.5
    assert found["stock"]["verdict"] == "impossible"
    assert found["producer"]["preset"] == {"name": "amd-aiter", "overrides": "dtype=fp8_e4m3fnuz"}
    assert found["producer"]["evidence"] == "read from source"
    assert found["producer"]["layout"]["dtype"] == "fp8_e4m3fnuz"
    assert found["consumer"]["preset"] is None
    assert KvLayout(**found["consumer"]["layout"]) == KvLayout(16)
