"""The files of tensors are plain safetensors files: the real library reads them."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from forgather_ckpt import container, dtypes
from forgather_ckpt.container import ALIGNMENT, Slot
from forgather_ckpt.errors import FormatError
from tests.states import tensor_bytes, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def write(path, tensors: dict[str, torch.Tensor]) -> container.Layout:
    """A file of `tensors` in their order, as the layout says."""
    layout = container.lay_out([slot_of(key, tensor) for key, tensor in tensors.items()])
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for tensor, offset in zip(tensors.values(), layout.offsets, strict=True):
        content = tensor_bytes(tensor)
        data[offset : offset + len(content)] = content
    path.write_bytes(data)
    return layout


def slot_of(key: str, tensor: torch.Tensor) -> Slot:
    return Slot(key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def by_falling_element_size(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def test_the_library_reads_every_dtype(tmp_path):
    tensors = by_falling_element_size(
        {
            f"{dtype}{list(shape)}": tensor_of(dtype, shape)
            for dtype in dtypes.ITEM_BYTES
            for shape in [(3, 5), (7,), (), (0, 4), (1, 2, 3, 4)]
        }
    )
    layout = write(tmp_path / "x.safetensors", tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt", "forgather_ckpt": "1"}
        for key, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            found = file.get_tensor(key)
            assert found.dtype == (tensor.dtype if dtype in dtypes.SAFETENSORS else torch.uint8)
            assert tuple(found.shape) == container.stored_shape(dtype, tuple(tensor.shape))
            assert tensor_bytes(found) == tensor_bytes(tensor), key
    assert layout.size == (tmp_path / "x.safetensors").stat().st_size


def test_what_the_library_does_not_know_is_stored_as_its_bytes():
    assert container.stored_shape("complex64", (2, 3)) == (2, 3, 8)
    assert container.stored_shape("complex32", ()) == (4,)
    assert container.stored_shape("float8_e8m0fnu", (2, 3)) == (2, 3)
    assert container.stored_shape("bfloat16", (2, 3)) == (2, 3)


def test_sizes_of_elements_are_torch_s():
    assert {dtype: getattr(torch, dtype).itemsize for dtype in dtypes.ITEM_BYTES} == dtypes.ITEM_BYTES
    assert set(dtypes.SAFETENSORS) <= set(dtypes.ITEM_BYTES)


@pytest.mark.parametrize(
    "key", ["", "..", "../../evil", "a/b", "line\nbreak", '"', "\\", "\0", "😀" * 300, "x" * 10_000]
)
def test_any_name_is_a_key(tmp_path, key):
    tensors = {key: tensor_of("float32"), "other": tensor_of("int8")}
    write(tmp_path / "x.safetensors", tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert tensor_bytes(file.get_tensor(key)) == tensor_bytes(tensors[key])


slots = st.lists(
    st.builds(
        Slot,
        st.text(max_size=6).filter(lambda key: key != "__metadata__"),
        st.sampled_from(sorted(dtypes.ITEM_BYTES)),
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
    ),
    max_size=40,
    unique_by=lambda slot: slot.key,
).map(lambda slots: sorted(slots, key=lambda slot: -dtypes.ITEM_BYTES[slot.dtype]))


@given(slots)
def test_data_starts_at_a_page_without_holes_and_each_tensor_is_aligned(slots):
    layout = container.lay_out(slots)
    assert len(layout.header) % ALIGNMENT == 0
    assert len(layout.header) - 8 == int.from_bytes(layout.header[:8], "little")
    ends = [len(layout.header), *(offset + slot.num_bytes for slot, offset in zip(slots, layout.offsets, strict=True))]
    assert list(layout.offsets) == ends[:-1]
    assert layout.size == ends[-1]
    for slot, offset in zip(slots, layout.offsets, strict=True):
        assert offset % dtypes.ITEM_BYTES[slot.dtype] == 0
    header = json.loads(layout.header[8:])
    assert list(header) == ["__metadata__", *(slot.key for slot in slots)]


@settings(max_examples=30)
@given(slots)
def test_the_library_accepts_every_layout(tmp_path_factory, slots):
    layout = container.lay_out(slots)
    path = tmp_path_factory.mktemp("layout") / "x.safetensors"
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {slot.key for slot in slots}


@given(
    st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(["😀" * 100, "\0" * 100, '"' * 100]),
    st.sampled_from(sorted(dtypes.ITEM_BYTES)),
    st.lists(st.integers(0, 2**62), max_size=5).map(tuple),
)
def test_the_cost_of_a_slot_is_never_too_low(key, dtype, shape):
    slot = Slot(key, dtype, shape)
    size = slot.num_bytes
    shown = {"dtype": "F8_E5M2", "shape": list(container.stored_shape(dtype, shape)), "data_offsets": [size, 2 * size]}
    if size < 2**63:
        assert len(json.dumps({key: shown})) <= container.header_cost(slot)


def test_reserved_and_taken_keys_are_not_free():
    assert container.is_free("a", {"b": 1})
    assert not container.is_free("b", {"b": 1})
    assert not container.is_free("__metadata__", {})


@pytest.mark.parametrize("prefix", [b"", b"\1" * 7, (1 << 30).to_bytes(8, "little"), b"\xff" * 8])
def test_a_header_that_is_too_long_or_not_there_is_refused(prefix):
    with pytest.raises(FormatError, match=r"data\.safetensors"):
        container.header_size(prefix, what="data.safetensors")


def test_the_length_of_a_header_is_read_back():
    layout = container.lay_out([Slot("a", "int8", (5,))])
    assert container.header_size(layout.header[:8], what="x") == len(layout.header)


def test_every_pair_of_dtypes_lies_side_by_side(tmp_path):
    for number, (one, other) in enumerate(itertools.product(["complex128", "int16", "bool"], repeat=2)):
        tensors = by_falling_element_size({"one": tensor_of(one, (3,)), "other": tensor_of(other, (3,), seed=1)})
        write(tmp_path / f"{number}", tensors)
        with safe_open(tmp_path / f"{number}", "pt") as file:
            assert all(tensor_bytes(file.get_tensor(key)) == tensor_bytes(tensors[key]) for key in tensors)
