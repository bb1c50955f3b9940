"""A GPT with mixtures of experts, each expert on one rank (expert parallelism), and the trainer that goes with it.

  torchrun --standalone --nproc-per-node 4 -m forgather_ckpt.demo.moe runs/moe

All ranks read samples of their own. What is no expert, each has a copy of. Of the experts a rank has a few, to which the
others send their tokens. With a mesh (dp, ep), the experts lie along ep, and along dp are copies of them. So the ranks
with identical state are those along dp, which is what PER_GROUP is told; as names are global, what is no expert is one
item that all groups hold and compare, and each expert one that its group holds. Any other number of ranks goes on from
such a checkpoint: `python -m forgather_ckpt.demo.moe runs/moe` does in one process, with all experts.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from forgather_ckpt.component import StateComponent
from forgather_ckpt.data.batches import Samples
from forgather_ckpt.demo.gpt import GPT
from forgather_ckpt.demo.text import StandardLibrary
from forgather_ckpt.patterns import SharingPattern, ValidationLevel
from forgather_ckpt.trainers import Trainer, TrainingArguments
from forgather_ckpt.trainers.distributed import DistributedTrainer
from forgather_ckpt.trainers.gradients import (
    average_gradients,
    broadcast_from_first,
    own_gradient,
    scale_gradients,
    squared_norm,
)
from forgather_ckpt.trainers.stages import Share
from forgather_ckpt.trainers.trainer import unwrapped


class Experts(nn.Module):
    """(…, width) to the same. Each token goes through the expert that its router rates highest, and is weighted with the
    rating (Fedus et al., Switch Transformers, 2021; without their capacity limit and balancing loss)."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleDict({f"{number}": _expert(width) for number in range(num_experts)})
        """By number: an expert keeps its name where others are missing."""
        self._group: dist.ProcessGroup | None = None
        self._num_ranks = 1

    def spread(self, group: dist.ProcessGroup) -> None:
        """Keep this rank's share of the experts; the members of the group have the others."""
        if self.num_experts % group.size():
            raise ValueError(f"{self.num_experts} experts cannot be dealt out evenly to {group.size()} ranks")
        self._group, self._num_ranks = group, group.size()
        per_rank = self.num_experts // group.size()
        own = range(group.rank() * per_rank, (group.rank() + 1) * per_rank)
        self.experts = nn.ModuleDict({f"{number}": self.experts[f"{number}"] for number in own})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        rating, chosen = self.router(tokens).softmax(-1).max(-1)
        by_expert = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).view(self._num_ranks, -1)
        answers = self._answered(tokens[by_expert], counts)[by_expert.argsort()]
        weighted: torch.Tensor = rating.unsqueeze(-1) * answers
        return weighted.view_as(x)

    def _answered(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What the experts make of tokens, which come in the order of experts: `counts` of them for each, (rank, expert
        of this rank)."""
        arriving = counts
        if self._group is not None:
            arriving = torch.empty_like(counts)
            dist.all_to_all_single(arriving, counts, group=self._group)
            sent, received = counts.sum(1).tolist(), arriving.sum(1).tolist()
            tokens = exchanged(tokens, sent, received, self._group)
        # They came rank by rank, and of each rank expert by expert.
        own = torch.arange(len(self.experts), device=tokens.device).repeat(self._num_ranks)
        by_expert = own.repeat_interleave(arriving.flatten()).argsort(stable=True)
        parts = tokens[by_expert].split(arriving.sum(0).tolist())
        # An expert without tokens is run too, so that its gradient is zeros and not missing.
        answers = torch.cat([expert(part) for expert, part in zip(self.experts.values(), parts, strict=True)])
        answers = answers[by_expert.argsort()]
        if self._group is not None:
            answers = exchanged(answers, received, sent, self._group)
        return answers


def _expert(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def exchanged(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """What rows the ranks of a group give this one for its own: `sent[r]` go to rank r, `received[r]` come from it.
    Gradients go back the same way."""
    arrived: torch.Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return arrived


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.exchange = (received, sent, group)
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        received, sent, group = ctx.exchange
        return exchanged(gradients[0], received, sent, group), None, None, None


class MoEGPT(GPT):
    """A GPT that has experts in every block."""

    def __init__(self, *, num_experts: int, width: int, **options: Any) -> None:
        super().__init__(width=width, **options)
        for block in self.blocks:
            block.mlp = Experts(width, num_experts)


class MoETrainer(DistributedTrainer):
    """A `Trainer` in each process of `torchrun` for a model with `Experts`.

    `mesh` has the axes dp and ep; by default all ranks are along ep. Every rank gives the whole model, and rank 0's
    values are taken.
    """

    model_validation = ValidationLevel.TENSOR

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Samples | None,
        *,
        mesh: DeviceMesh | None = None,
        **options: Any,
    ) -> None:
        self._mesh = mesh
        super().__init__(model, args, train_dataset, **options)

    def take_model(self, model: nn.Module) -> nn.Module:
        module = unwrapped(model)
        self.mesh = self._mesh or init_device_mesh(self.device.type, (1, self.world_size), mesh_dim_names=("dp", "ep"))
        if self.mesh.mesh_dim_names != ("dp", "ep") or self.mesh.size() != self.world_size:
            raise ValueError("give a mesh over all ranks with the axes dp and ep, in this order")
        broadcast_from_first((*module.parameters(), *module.buffers()), self.device)
        known = module.state_dict().keys()
        for part in module.modules():
            if isinstance(part, Experts):
                part.spread(self.mesh.get_group("ep"))
        self._share = Share(module, known)
        return super().take_model(model)

    def combine_gradients(self) -> None:
        assert dist.group.WORLD is not None
        average_gradients(self.dense(), dist.group.WORLD)
        average_gradients(self.experts(), self.mesh.get_group("dp"))
        for parameter in self.experts():
            # It has the sum over the tokens of all ranks along ep, and the loss is the mean over ranks.
            own_gradient(parameter).div_(self.mesh["ep"].size())

    def clip_gradients(self) -> torch.Tensor:
        total = squared_norm(self.experts(), self.device)
        dist.all_reduce(total, group=self.mesh.get_group("ep"))
        norm = (total + squared_norm(self.dense(), self.device)).sqrt()
        scale_gradients(self.model.parameters(), norm, self.args.max_grad_norm)
        return norm

    def dense(self) -> Iterator[nn.Parameter]:
        """What all ranks have."""
        own = set(self.experts())
        return (parameter for parameter in self.model.parameters() if parameter not in own)

    def experts(self) -> Iterator[nn.Parameter]:
        for module in self.model.modules():
            if isinstance(module, Experts):
                yield from module.experts.parameters()

    def get_process_groups(self) -> DeviceMesh:
        return self.mesh

    def get_state_components(self) -> list[StateComponent]:
        components = super().get_state_components()
        for place, component in enumerate(components):
            if component.key in ("model", "optimizer"):
                stateful = self._share if component.key == "model" else component.stateful
                components[place] = replace(
                    component,
                    stateful=stateful,
                    sharing_pattern=SharingPattern.PER_GROUP,
                    process_group_name="dp",
                    names="global",
                )
        return components


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        sys.exit("usage: [torchrun --standalone --nproc-per-node N -m] forgather_ckpt.demo.moe RUN_DIRECTORY")
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    logging.getLogger("forgather_ckpt").setLevel(logging.INFO)
    torch.manual_seed(0)
    model = MoEGPT(num_experts=4, context=64, width=64, num_heads=4, num_layers=2)
    args = TrainingArguments(
        argv[0],
        max_steps=60,
        save_steps=20,
        logging_steps=5,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        resume_from_checkpoint="auto",
    )
    kind = MoETrainer if dist.is_torchelastic_launched() else Trainer
    kind(model, args, StandardLibrary(context=64)).train()


if __name__ == "__main__":
    main(sys.argv[1:])
