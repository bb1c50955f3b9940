"""On real GPUs, with NCCL: run by `pytest -m gpu`; on two GPUs where there are two, else on one."""

from pathlib import Path

import pytest
import torch

from tests.torchrun import torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]


def test_every_pattern_is_exact_with_an_nccl_only_default_group(tmp_path: Path) -> None:
    num_gpus = min(2, torch.cuda.device_count())
    result = torchrun([Path(__file__).with_name("nccl_job.py"), tmp_path], nproc=num_gpus)
    assert f"exact: {num_gpus}" in result.output, result.output
