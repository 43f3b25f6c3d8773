"""The torch repacker with KV on an accelerator against the numpy reference, for every preset."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.layout import GroupShape, HeadRange, KvDtype, LayerScales, RankLayout
from transfer.presets import PRESETS
from transfer.repack.numbers import bits_type, decode, encode
from transfer.repack.reference import GroupMemory, NumpyRepacker
from transfer.repack.tables import as_learned
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.session.vocabulary import Slot, Unpack

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
torch_memory = pytest.importorskip("transfer.repack.torch_memory")
torch_numbers = pytest.importorskip("transfer.repack.torch_numbers")
torch_repacker = pytest.importorskip("transfer.repack.torch_repacker")

DEVICE = "cuda"
BLOCKS = 23
STAGING_BYTES = 1 << 21
SHAPE = GroupShape(3, 4, 64, 64)
LATENT = GroupShape(3, 1, 576, 0)
TABLES = ((3, 1, 9, 13, 14, 15, 16, 6, 20, 19, 5, 21, 22),)
SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32}
STAGINGS = ["device", "pinned", "host"]


@dataclass
class Twins:
    """A rank with the same blocks in numpy and on the device."""

    layout: RankLayout
    flats: list[Any]
    copies: list[Any]
    numpy: NumpyRepacker
    torch: Any
    numpy_staging: Any
    torch_staging: Any

    def assert_equal(self) -> None:
        """Bits are equal, but for those of a NaN."""
        dtype = self.layout.layout.dtype
        for flat, copy in zip(self.flats, self.copies, strict=True):
            found = copy.cpu().numpy().view(flat.dtype)
            differs = flat != found
            if differs.any():
                assert np.isnan(decode(flat[differs], dtype)).all()
                assert np.isnan(decode(found[differs], dtype)).all()


def twins(layout: RankLayout, *, staging: str, is_learned: bool = False, seed: int = 0) -> Twins:
    random = np.random.default_rng(seed)
    shape = layout.groups[0]
    heads = layout.heads(0).count
    tensors = dense_tensors(layout.layout, shape, heads, BLOCKS)
    arrangement: Any = arrangement_of(layout.layout, shape, heads, tuple(t.strides for t in tensors))
    arrangement = as_learned(arrangement) if is_learned else arrangement
    kind = bits_type(layout.layout.dtype)
    values = [random.normal(0, 3, t.element_count).astype(np.float32) for t in tensors]
    flats = [encode(each, layout.layout.dtype).astype(kind) for each in values]
    copies = [torch.from_numpy(flat.view(SIGNED[flat.itemsize]).copy()).to(DEVICE) for flat in flats]

    def layers(wholes: list[Any]) -> tuple[tuple[Any, ...], ...]:
        return tuple(
            tuple(whole[layer * t.layer_stride :] for whole, t in zip(wholes, tensors, strict=True))
            for layer in range(shape.layer_count)
        )

    numpy_staging = np.zeros(STAGING_BYTES, np.uint8)
    if staging == "device":
        torch_staging = torch.zeros(STAGING_BYTES, dtype=torch.uint8, device=DEVICE)
    else:
        torch_staging = torch.zeros(STAGING_BYTES, dtype=torch.uint8, pin_memory=staging == "pinned")
    group = torch_memory.TorchGroup(arrangement, layers(copies))
    return Twins(
        layout,
        flats,
        copies,
        NumpyRepacker(layout, [GroupMemory(layers(flats), arrangement)], numpy_staging),
        torch_repacker.TorchRepacker(layout, [group], torch_staging),
        numpy_staging,
        torch_staging,
    )


def hand_over(producer: Twins, consumer: Twins, *, form: Form = Form.TOKENS, first: int = 5) -> None:
    """Pack with both, compare, unpack with both, compare."""
    shape = producer.layout.groups[0]
    tokens = TokenRange(first, 330 - first)
    part = PartShape(form, 0, HeadRange(0, shape.kv_heads), tokens)
    length = part_bytes(part, shape, producer.layout.layout)
    slot = Slot(part, 512, length)
    digests = producer.torch.pack([slot], TABLES)
    assert digests == producer.numpy.pack([slot], TABLES)
    assert np.array_equal(producer.torch_staging.cpu().numpy(), producer.numpy_staging)

    consumer.torch_staging.copy_(producer.torch_staging)
    consumer.numpy_staging[:] = producer.numpy_staging
    order = Unpack(
        request="r",
        part=0,
        shape=part,
        source=producer.layout,
        landing=512,
        length_bytes=length,
        digest=digests[0],
        tables=TABLES,
        tokens=TokenRange(first + 11, tokens.count - 20),
    )
    torch.cuda.synchronize()
    assert consumer.torch.unpack(order)
    assert consumer.numpy.unpack(order)
    consumer.assert_equal()


def rank(name: str, **changes: Any) -> RankLayout:
    return RankLayout(replace(PRESETS[name].layout, block_tokens=32, **changes), 0, (SHAPE,))


@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_each_preset_packs_and_unpacks_as_the_reference(name: str, staging: str) -> None:
    layout = rank(name)
    hand_over(twins(layout, staging=staging), twins(layout, staging=staging, seed=1))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_each_preset_reads_what_another_wrote(name: str) -> None:
    other = sorted(PRESETS)[sorted(PRESETS).index(name) - 1]
    hand_over(twins(rank(other), staging="device"), twins(rank(name), staging="pinned", seed=1))


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_pages_form(name: str, is_learned: bool) -> None:
    layout = rank(name)
    engines = [twins(layout, staging="device", is_learned=is_learned, seed=seed) for seed in range(2)]
    hand_over(*engines, form=Form.PAGES, first=0)


@pytest.mark.parametrize("name", ["nvidia-flash-attn", "cpu-vec"])
def test_learned_pages(name: str) -> None:
    layout = rank(name)
    engines = [twins(layout, staging="pinned", is_learned=True, seed=seed) for seed in range(2)]
    hand_over(*engines)


def test_one_latent() -> None:
    layout = RankLayout(replace(PRESETS["nvidia-flash-attn"].layout, block_tokens=64), 0, (LATENT,))
    hand_over(twins(layout, staging="device"), twins(layout, staging="device", seed=1))


@pytest.mark.parametrize("target", list(KvDtype))
@pytest.mark.parametrize("source", list(KvDtype))
def test_conversion_between_all_types(source: KvDtype, target: KvDtype) -> None:
    def scaled(dtype: KvDtype, key: float) -> RankLayout:
        layout = rank("nvidia-flash-attn", dtype=dtype)
        scales = (tuple(LayerScales(key, 0.37 * layer + 0.5) for layer in range(3)),) if dtype.is_fp8 else ()
        return replace(layout, scales=scales)

    producer = twins(scaled(source, 0.013), staging="device")
    hand_over(producer, twins(scaled(target, 0.7), staging="device", seed=1))
