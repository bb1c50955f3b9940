"""`RNGState`: the random generators of this process."""

import random
from typing import Any

import numpy as np
import torch

from forgather_ckpt.component import StateDict
from forgather_ckpt.errors import LoadMismatch


class RNGState:
    """The global random generators of Python, numpy, torch on the CPU, and torch on every CUDA device.

    Restore it after whatever draws numbers on start-up: the coordinator calls `load_state_dict` in the order of
    declaration, so declare it last.

    >>> StateComponent("rng", RNGState(), SharingPattern.PER_RANK, on_resize="drop")
    """

    def state_dict(self) -> StateDict:
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = {str(number): one for number, one in enumerate(torch.cuda.get_rng_state_all())}
        return state

    def load_state_dict(self, state_dict: StateDict) -> None:
        """`LoadMismatch` where the number of CUDA devices is another one: their generators cannot be matched then."""
        saved = state_dict.get("cuda", {})
        if torch.cuda.is_available() and saved and len(saved) != torch.cuda.device_count():
            raise LoadMismatch(
                f"generators of {len(saved)} CUDA devices were saved, {torch.cuda.device_count()} are visible; show each "
                "process as many as before, or load without this component"
            )
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"].cpu())
        if torch.cuda.is_available() and saved:
            torch.cuda.set_rng_state_all([saved[str(number)].cpu() for number in range(len(saved))])
