"""The pipeline schedules of torch that a trainer runs, and how each deals out stages to ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)


class SafeStage(PipelineStage):
    """A `PipelineStage` that goes around faults of torch: two of older releases, one of 2.13 as well.

    - Zero-bubble schedules take the gradients of weights apart from those of inputs, and torch 2.11 then counts some
      twice (pytorch issue 180952); 2.13 does not. With a release before that the schedules keep their order, but run
      each backward pass whole: that is right, and without the time that they are made to save.
    - Before the first step torch 2.11 sends something between all neighbours, also those on one rank, and gloo has no
      connection of a rank to itself.
    - Where two stages that follow each other share a rank, schedules hand gradients over in an evaluation too, and torch
      refuses to, as there are none.
    """

    def __init__(self, submodule: nn.Module, stage_index: int, num_stages: int, device: torch.device, **examples: Any):
        super().__init__(submodule, stage_index, num_stages, device, dw_builder=_whole_backward(), **examples)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        greetings = super()._get_init_p2p_neighbors_ops()
        return [greeting for greeting in greetings if greeting.group_peer != self.group_rank]

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()  # type: ignore[no-untyped-call]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


def _whole_backward() -> Callable[[], Callable[..., None]] | None:
    """What makes torch take all gradients at once, leaving nothing for later, where it cannot be left to split them."""
    major, minor = (int(number) for number in torch.__version__.split(".")[:2])
    return (lambda: lambda: None) if (major, minor) < (2, 13) else None


@dataclass(frozen=True)
class PipelineSchedule:
    """A schedule of torch."""

    of_torch: Callable[..., Any]
    stages_per_rank: int | None
    """None: as many as one likes, two by default."""
    is_v: bool = False
    """The second half of the stages goes back over the ranks, so that the first and the last stage share one."""

    def rank_of(self, stage: int, num_ranks: int) -> int:
        turn, rank = divmod(stage, num_ranks)
        return num_ranks - 1 - rank if self.is_v and turn % 2 else rank

    def default_stages(self, num_ranks: int) -> int:
        return num_ranks * (self.stages_per_rank or 2)

    def of(self, stages: Sequence[PipelineStage], num_micro_batches: int, loss: Callable[..., Any]) -> Any:
        """The schedule of one rank, whose stages these are. `loss(output, target)` is of one micro-batch.

        The loss is to be divided by the number of micro-batches: torch would divide gradients, and those of a parameter
        twice that two stages of one rank share.
        """
        own = stages[0] if self.stages_per_rank == 1 else list(stages)
        return self.of_torch(own, num_micro_batches, loss_fn=loss, scale_grads=False)

    def check(self, num_stages: int, num_micro_batches: int, group: dist.ProcessGroup) -> None:
        """`ValueError` where the schedule cannot be run so. Torch knows when a schedule is made, of whatever stages."""
        rank, num_ranks = group.rank(), group.size()
        if num_stages % num_ranks or self.stages_per_rank not in (None, num_stages // num_ranks):
            wanted = self.stages_per_rank or "the same number"
            raise ValueError(f"it runs {wanted} of the stages on each rank")
        own = [number for number in range(num_stages) if self.rank_of(number, num_ranks) == rank]
        idle = [PipelineStage(nn.Identity(), number, num_stages, torch.device("cpu"), group=group) for number in own]
        self.of(idle, num_micro_batches, nn.Identity())


SCHEDULES = {
    "gpipe": PipelineSchedule(ScheduleGPipe, 1),
    "1f1b": PipelineSchedule(Schedule1F1B, 1),
    "interleaved_1f1b": PipelineSchedule(ScheduleInterleaved1F1B, None),
    "interleaved_zero_bubble": PipelineSchedule(ScheduleInterleavedZeroBubble, None),
    "zbv": PipelineSchedule(ScheduleZBVZeroBubble, 2, is_v=True),
}
