"""What every test process needs before the first test: torch imported once, one thread, and no CUDA unless asked."""

from __future__ import annotations

import os

import pytest
import torch

# Imported here, once, so that forked ranks find them and start in milliseconds (tests/ranks.py).
import torch._dynamo
import torch.distributed
import torch.distributed.tensor
import torch.fx.experimental.symbolic_shapes
from hypothesis import HealthCheck, settings

# No test is about how long something takes, and the machine may be busy.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# A pool of OpenMP threads does not survive a fork: a rank that used it would hang.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA devices unless `-m` selects gpu tests: a parent that initialised CUDA cannot fork ranks that use it."""
    if not _selects_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _selects_gpu(config) and torch.cuda.device_count() > 0:
        return
    skip = pytest.mark.skip(reason="needs CUDA devices, and to be selected with -m gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _selects_gpu(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr") or ""
    return "gpu" in expression and "not gpu" not in expression
