"""The bytes of live tensors, whatever their layout."""

import pytest
import torch
import xxhash

from forgather_ckpt import dtypes, hashtree, memory
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.structure import capture
from tests.states import tensor_bytes, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

BASE = tensor_of("float32", (4, 6))
IMAGES = tensor_of("float32", (2, 3, 4, 5))
COMPLEX = tensor_of("complex64", (3, 4))

LAYOUTS = {
    "contiguous": BASE,
    "transposed": BASE.t(),
    "strided": BASE[::2, 1::3],
    "offset": BASE.reshape(-1)[5:],
    "channels last": IMAGES.to(memory_format=torch.channels_last),
    "expanded": BASE[:, :1].expand(4, 6),
    "overlapping": BASE.reshape(-1).as_strided((5, 4), (1, 1)),
    "no dimension": BASE[1, 2],
    "empty": BASE[:0],
    "empty with stride": BASE[:, 3:3].t(),
    "flipped": BASE.flip(0),
    "conj": COMPLEX.conj(),
    "neg": COMPLEX.conj().imag,
    "transposed conj": COMPLEX.mH,
    "grad": BASE.clone().requires_grad_(),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_bytes_are_the_elements_in_c_order(tensor):
    assert memory.flat_bytes(tensor).numpy().tobytes() == tensor_bytes(tensor)
    elements = torch.tensor(tensor.tolist(), dtype=tensor.dtype).reshape(tensor.shape)
    assert torch.equal(elements.nan_to_num(), tensor.detach().nan_to_num())


@pytest.mark.parametrize("dtype", dtypes.ITEM_BYTES)
def test_bytes_of_every_dtype(dtype):
    for shape in [(3, 5), (), (0,)]:
        tensor = tensor_of(dtype, shape)
        assert memory.flat_bytes(tensor).numpy().tobytes() == tensor_bytes(tensor)


def blocks_of(tensor: torch.Tensor) -> tuple[bytes, ...]:
    return memory.block_digests(capture({"x": tensor}).tensors.values())["x"]


def test_contiguous_tensors_are_not_copied():
    for tensor in (BASE, BASE[1:], BASE.reshape(-1)[3], BASE.requires_grad_(False)):
        assert memory.flat_bytes(tensor).data_ptr() == tensor.data_ptr()
        assert memory.host_view(memory.flat_bytes(tensor)).nbytes == tensor.nbytes


@pytest.mark.parametrize(
    "shape", [(0,), (), (100,), (BLOCK_BYTES,), (BLOCK_BYTES + 1,), (3, BLOCK_BYTES - 7)], ids=lambda shape: f"{shape}"
)
def test_blocks_put_together_are_the_bytes(shape):
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).to(torch.int8).reshape(shape)
    flat = memory.flat_bytes(tensor)
    parts = [bytes(block) for block in memory.blocks(flat, 0, flat.numel())]
    assert b"".join(parts) == tensor_bytes(tensor)
    assert all(len(part) == BLOCK_BYTES for part in parts[:-1])
    middle = b"".join(bytes(block) for block in memory.blocks(flat, flat.numel() // 3, flat.numel() // 2))
    assert middle == tensor_bytes(tensor)[flat.numel() // 3 : flat.numel() // 2]


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_equal_content_in_another_layout_has_equal_digests(tensor):
    expected = hashtree.buffer_digest(tensor_bytes(tensor))
    assert hashtree.join(blocks_of(tensor)) == expected


def test_a_large_tensor_has_a_digest_a_block():
    tensor = torch.arange(5 << 20, dtype=torch.int32)
    data = tensor_bytes(tensor)
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    assert [digest.hex() for digest in blocks_of(tensor)] == [xxhash.xxh3_128_hexdigest(block) for block in blocks]
    assert blocks_of(tensor.reshape(-1, 4).t().contiguous().t()) == blocks_of(tensor)


def test_many_tensors_at_once_have_the_digests_that_each_has_alone():
    tensors = {f"small {number}": torch.full((number,), number, dtype=torch.int16) for number in range(300)}
    tensors |= {"large": torch.arange(11 << 20, dtype=torch.int32), "empty": torch.zeros(0)}
    tensors |= {"large, not contiguous": torch.arange(10 << 20, dtype=torch.int32).reshape(-1, 2).t()}
    tensors |= {f"after {number}": torch.full((3, 5), number) for number in range(10)}
    num_reports = []
    digests = memory.block_digests(capture(tensors).tensors.values(), lambda: num_reports.append(1))
    assert list(digests) == list(tensors)
    assert {name: hashtree.join(blocks) for name, blocks in digests.items()} == {
        name: hashtree.buffer_digest(tensor_bytes(tensor)) for name, tensor in tensors.items()
    }
    assert len(num_reports) > 1


def test_no_tensors_have_no_digests():
    assert memory.block_digests([]) == {}


def digest_of(state_dict) -> bytes:
    state = capture(state_dict)
    blocks = memory.block_digests(state.tensors.values())
    digests = {name: hashtree.join(blocks) for name, blocks in blocks.items()}
    return hashtree.state_digest(
        memory.records(state.tensors.values(), state.values.values(), state.aliases.values(), digests)
    )


STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3), "n": 5, "lr": 0.1}
TIED = torch.zeros(2)


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        (STATE, dict(reversed(STATE.items())), True),
        (STATE, {**STATE, "w": STATE["w"].t().contiguous().t()}, True),
        (STATE, {**STATE, "n": 6}, False),
        (STATE, {**STATE, "n": 5.0}, False),
        (STATE, {**STATE, "b": -torch.zeros(3)}, False),
        (STATE, {**STATE, "w": STATE["w"].reshape(3, 2)}, False),
        (STATE, {**STATE, "w": STATE["w"].view(torch.int32)}, False),
        (STATE, {**STATE, "w": STATE["w"][[1, 0]]}, False),
        (STATE, {**STATE, "w": STATE["b"], "b": STATE["w"]}, False),
        (STATE, {**STATE, "x": None}, False),
        ({"a": TIED, "b": TIED}, {"a": TIED, "b": TIED.clone()}, False),
        ({"x": torch.tensor([float("nan")])}, {"x": torch.tensor([-float("nan")])}, False),
        ({"x": float("nan")}, {"x": float("nan")}, True),
    ],
)
def test_the_digest_of_a_state_covers_structure_values_and_every_byte(one, other, is_equal):
    assert (digest_of(one) == digest_of(other)) is is_equal
