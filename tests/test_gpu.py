"""On real GPUs, with NCCL: run by `pytest -m gpu`, on a machine that has two."""

from pathlib import Path

import pytest
import torch

from tests.torchrun import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multiprocess,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_every_pattern_is_exact_with_an_nccl_only_default_group(tmp_path: Path) -> None:
    result = torchrun([Path(__file__).with_name("nccl_job.py"), tmp_path], nproc=2)
    assert "exact: 2" in result.output, result.output
