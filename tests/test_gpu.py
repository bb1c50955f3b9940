"""On real GPUs, with NCCL: run by `pytest -m gpu`; two ranks, on two GPUs where there are two, else on one."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from forgather_ckpt import device_digest, dtypes, multilinear
from forgather_ckpt.hashtree import BLOCK_BYTES
from tests.gpus import nodes_on_gpus
from tests.ranks import run_ranks, values
from tests.states import tensor_of
from tests.torchrun import torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]


def test_every_pattern_is_exact_with_an_nccl_only_default_group(tmp_path: Path) -> None:
    nodes = nodes_on_gpus(2)
    result = torchrun([Path(__file__).with_name("nccl_job.py"), tmp_path], nproc=nodes[0], nodes=len(nodes), timeout=90)
    assert "exact: 2" in result.output, result.output


KIB, MIB = 1 << 10, 1 << 20
SIZES = [
    *range(70),
    *(size + more for size in (4 * KIB, 32 * KIB, 36 * KIB, 256 * KIB, MIB, BLOCK_BYTES) for more in (-16, -1, 0, 1, 15, 16)),
    2 * BLOCK_BYTES + MIB + 36 * KIB + 7,
]
"""Around a row of words, the kernel's rounds of 8 rows, its two sizes of tiles, and a block."""


def digest_inputs() -> list[torch.Tensor]:
    """Of every size at places that are and are not aligned, of every type and layout, and with the largest words."""
    memory = tensor_of("uint8", (3 * BLOCK_BYTES,))
    plain = [memory[place : place + size] for size in SIZES for place in (0, 16, 1, 4, 15)]
    typed = [tensor_of(dtype, (33, 130)) for dtype in dtypes.ITEM_BYTES]
    laid_out = [view for one in typed for view in (one, one.t(), one[1:, 3::7], one[:, :1].expand(33, 9), one[2, 3])]
    spectrum = torch.view_as_complex(torch.randn(33, 130, 2))  # finite: what becomes of the sign of a NaN is up to the device
    full = [torch.full((BLOCK_BYTES // 4 + 1,), word, dtype=torch.int32) for word in (-1, 0, -(2**31), 0xFFFF)]
    turned = torch.arange(3 * MIB, dtype=torch.int32).view(1024, -1).t()
    return [*plain, *laid_out, spectrum.conj(), spectrum.mH, *full, turned]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_the_kernel_takes_the_digests_that_torch_takes() -> None:
    """In a process of its own: this one shall not use CUDA (tests/ranks.py)."""

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        """The same view of the same memory."""
        bytes_ = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        storage = bytes_.to("cuda").view(tensor.dtype).untyped_storage()
        copy = torch.empty(0, dtype=tensor.dtype, device="cuda")
        copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        return copy.conj() if tensor.is_conj() else copy

    def case(rank: int, world_size: int) -> tuple[int, list[int], list[int]]:
        assert device_digest._kernel(torch.device("cuda", 0)) is not None, "Triton is not installed"
        inputs = digest_inputs()
        expected = device_digest.block_digests(inputs)
        live = [on_device(one) for one in inputs]
        wrong = []
        for many_bytes in (1, 1 << 60):  # tiles of either size
            with mock.patch.object(device_digest, "_MANY_BYTES", many_bytes):
                found = device_digest.block_digests(live)
            wrong += [number for number, pair in enumerate(zip(found, expected, strict=True)) if len(set(pair)) > 1]
        whole = live[SIZES.index(2 * BLOCK_BYTES + MIB + 36 * KIB + 7) * 5]
        whole_digests = device_digest.block_digests([whole])[0]
        not_additive = []
        for cut in (1, 16, 4096, 4097, BLOCK_BYTES - 1, BLOCK_BYTES + 36 * KIB + 3):
            parts = [device_digest.block_lanes([(0, part, start)]) for part, start in ((whole[:cut], 0), (whole[cut:], cut))]
            keys = sorted({key for part in parts for key in part})
            added = [multilinear.add(part[key] for part in parts if key in part) for key in keys]
            if tuple(map(multilinear.digest, added)) != whole_digests:
                not_additive.append(cut)
        return len(inputs), wrong, not_additive

    [(num_inputs, wrong, not_additive)] = values(run_ranks(1, case, backend=None, timeout=110))
    assert num_inputs > 500
    assert (wrong, not_additive) == ([], [])
