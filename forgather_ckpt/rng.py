"""`RNGState`: the random generators of this process."""

import logging
import random
from typing import Any

import numpy as np
import torch

from forgather_ckpt.component import StateDict
from forgather_ckpt.errors import LoadMismatch

logger = logging.getLogger(__name__)


class RNGState:
    """The global random generators of Python, numpy, torch on the CPU, and torch on every CUDA device.

    Restore it after whatever draws numbers on start-up: the coordinator calls `load_state_dict` in the order of
    declaration, so declare it last.

    `stream`: which of the job's random streams is this rank's, where ranks that compute the same thing draw from one. It
    is saved too, and `loaded_stream` tells after a load which one the state was of, None if that was not saved: where it is
    another one on any rank, all ranks should begin new streams.

    >>> StateComponent("rng", RNGState(), SharingPattern.PER_RANK, on_resize="drop")
    """

    def __init__(self, stream: int | None = None) -> None:
        self.stream = stream
        self.loaded_stream: int | None = None

    def state_dict(self) -> StateDict:
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = {str(number): one for number, one in enumerate(torch.cuda.get_rng_state_all())}
            state["cuda_device"] = torch.cuda.current_device()
        if self.stream is not None:
            state["stream"] = self.stream
        return state

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Where another number of CUDA devices is visible, the generator of the one that was in use goes to the one that is
        in use now, and the others are left as they are.

        `LoadMismatch` there where the checkpoint is an old one, which does not say which device was in use.
        """
        self.loaded_stream = state_dict.get("stream")
        saved = state_dict.get("cuda", {}) if torch.cuda.is_available() else {}
        are_others = bool(saved) and len(saved) != torch.cuda.device_count()
        if are_others and "cuda_device" not in state_dict:
            raise LoadMismatch(
                f"generators of {len(saved)} CUDA devices were saved, {torch.cuda.device_count()} are visible, and which one "
                "was in use was not saved; show each process as many as before, or load without this component"
            )
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"].cpu())
        if are_others:
            torch.cuda.set_rng_state(saved[str(state_dict["cuda_device"])].cpu())  # into the current device
            logger.warning(
                "generators of %d CUDA devices were saved, %d are visible: the device in use now goes on with that of the "
                "one that was, the others go on from where they are",
                len(saved),
                torch.cuda.device_count(),
            )
        elif saved:
            torch.cuda.set_rng_state_all([saved[str(number)].cpu() for number in range(len(saved))])
