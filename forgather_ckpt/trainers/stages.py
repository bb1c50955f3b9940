"""How a model is cut into pipeline stages, so that every tensor keeps the name that it has in the whole model."""

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from forgather_ckpt.component import StateDict
from forgather_ckpt.data.batches import Batch, map_leaves
from forgather_ckpt.structure import memory_of


@dataclass(frozen=True)
class Part:
    """A step of a model's forward pass: a pipeline is cut between parts, never inside one.

        Part("blocks.3")                                    # calls this submodule
        Part(["embedding", "position"], GPT.embed)          # calls GPT.embed(model, …), which uses just these

    The first part gets a micro-batch as the collate function made it, each further one what the part before returned,
    a tuple as several arguments. The `model` has only what the parts on its rank name. What several parts use, such
    as a rotary table, each of them names.
    """

    names: Sequence[str]
    """Of modules, parameters and buffers, as in the whole model."""
    call: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        if self.call is None and len(names) != 1:
            raise ValueError(
                f"Part({list(names)}) does not say how it is called; write Part({list(names)}, Model.method)"
            )

    def __call__(self, model: nn.Module, *inputs: Any) -> Any:
        if self.call is not None:
            return self.call(model, *inputs)
        return model.get_submodule(self.names[0])(*inputs)


@runtime_checkable
class CanBeCut(Protocol):
    """A model that knows its parts, in the order in which they are called, and the loss on what the last one returns."""

    def pipeline_parts(self) -> Sequence[Part]: ...

    def pipeline_loss(self, output: Any, batch: Batch, /) -> torch.Tensor: ...


def parts_of(model: nn.Module) -> list[Part]:
    """The parts that a model names itself, or the children of an `nn.Sequential`."""
    if isinstance(model, CanBeCut):
        return list(model.pipeline_parts())
    if isinstance(model, nn.Sequential):
        return [Part(name) for name in model._modules]
    raise ValueError(
        f"{type(model).__name__} does not say where it may be cut: give it the methods pipeline_parts() and "
        'pipeline_loss(output, batch), or give parts=[Part("embedding"), Part("blocks.0"), …] and compute_loss='
    )


def dealt(num_parts: int, stages: int | Sequence[int]) -> list[int]:
    """How many parts each stage gets: as is said, or as evenly as can be."""
    if isinstance(stages, int):
        if not 1 <= stages <= num_parts:
            raise ValueError(f"{stages} stages cannot be made of {num_parts} parts, as each gets one at least")
        return [(stage + 1) * num_parts // stages - stage * num_parts // stages for stage in range(stages)]
    if sum(stages) != num_parts or min(stages, default=0) < 1:
        raise ValueError(
            f"stages={list(stages)} deals out {sum(stages)} parts of {num_parts}; say of each stage how many it gets, at "
            "least one"
        )
    return list(stages)


class Cut:
    """A whole model, its parts in stages, and its stages on ranks.

    Tied weights need no declaration. A parameter that the model has under several names, or that several parts name,
    is on each rank that has one of these parts, and there under all its names: a rank's state dict calls its tensors
    what the whole model's calls them.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Sequence[Part]], ranks: Sequence[int]) -> None:
        self.model = model
        self.stages = stages
        self.ranks = ranks
        """Of each stage, the rank that runs it."""
        self._tensors: dict[str, torch.Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._names: dict[torch.Tensor, list[str]] = defaultdict(list)
        for name, tensor in self._tensors.items():
            self._names[tensor].append(name)
        self._refuse_unknown_names()
        self._refuse_hidden_ties()
        self._refuse_idle_ranks()

    def share(self, rank: int) -> nn.Module:
        """The model with what this rank has and nothing else; its tensors are those of the whole one."""
        parts = [part for stage, owner in zip(self.stages, self.ranks, strict=True) if owner == rank for part in stage]
        return pruned(self.model, {*self._tensor_names(parts), *(name for part in parts for name in part.names)})

    def parameters(self, stage: int) -> dict[str, nn.Parameter]:
        """Those that a stage uses, each once, under its first name."""
        tensors = dict.fromkeys(self._tensors[name] for name in self._tensor_names(self.stages[stage]))
        return {self._names[tensor][0]: tensor for tensor in tensors if isinstance(tensor, nn.Parameter)}

    def holders(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor, under its first name, the ranks that have it; in the order of the model."""
        holders: dict[str, set[int]] = {names[0]: set() for names in self._names.values()}
        for stage, rank in zip(self.stages, self.ranks, strict=True):
            for name in self._tensor_names(stage):
                holders[self._names[self._tensors[name]][0]].add(rank)
        return {name: tuple(sorted(ranks)) for name, ranks in holders.items()}

    def _tensor_names(self, parts: Sequence[Part]) -> list[str]:
        """All names of the parameters and buffers that these parts use."""
        roots = [root for part in parts for root in part.names]
        used = [name for name in self._tensors if any(name == root or name.startswith(f"{root}.") for root in roots)]
        return list(dict.fromkeys(other for name in used for other in self._names[self._tensors[name]]))

    def _refuse_unknown_names(self) -> None:
        known = {*self._tensors, *(name for name, _ in self.model.named_modules(remove_duplicate=False) if name)}
        parts = [part for stage in self.stages for part in stage]
        for name in (name for part in parts for name in part.names):
            if name not in known:
                raise ValueError(f"a part names {name!r}, but {type(self.model).__name__} has nothing of that name")
        if missing := sorted(self._tensors.keys() - set(self._tensor_names(parts))):
            raise ValueError(f"{missing[0]!r} is in no part; name it, or the module it is in, in the part that uses it")

    def _refuse_hidden_ties(self) -> None:
        owners: dict[Any, str] = {}
        for tensor, (name, *_) in self._names.items():
            memory = memory_of(tensor)
            if memory is not None and owners.setdefault(memory, name) != name:
                raise ValueError(
                    f"{owners[memory]!r} and {name!r} share memory, but are two tensors: on two ranks they would part. Tie "
                    "parameters by assigning one to the other, as in model.head.weight = model.embedding.weight"
                )

    def _refuse_idle_ranks(self) -> None:
        for rank in sorted(set(self.ranks)):
            own = [stage for stage, owner in enumerate(self.ranks) if owner == rank]
            if not any(parameter.requires_grad for stage in own for parameter in self.parameters(stage).values()):
                raise ValueError(
                    f"rank {rank} would train nothing: the parts of its stages {own} have no parameter that requires a "
                    "gradient; deal them out in another way, with stages=[…]"
                )


def pruned(module: nn.Module, names: Collection[str], prefix: str = "") -> nn.Module:
    """A copy that has only what is named, at the same places. What is named is not copied."""
    copied = copy.copy(module)
    copied._modules = {
        name: child if child is None or prefix + name in names else pruned(child, names, f"{prefix}{name}.")
        for name, child in module._modules.items()
        if child is None or any(f"{one}.".startswith(f"{prefix}{name}.") for one in names)
    }
    for kind in ("_parameters", "_buffers"):
        kept = {
            name: tensor for name, tensor in getattr(module, kind).items() if tensor is None or prefix + name in names
        }
        setattr(copied, kind, kept)
    return copied


class Share(nn.Module):
    """The state of a rank's share of a model, whose keys are among those of the whole model's state dict, `known`.

    A module, so that a load refuses another model's state before any of it is loaded, as it does for whole models, while
    a warm start may take some of it. That the checkpoint has a block more, which is nobody's, only all ranks together
    see: so the component's names are to be global.
    """

    def __init__(self, module: nn.Module, known: Collection[str]) -> None:
        super().__init__()
        self.share = module
        if unknown := sorted(self.state_dict().keys() - set(known)):
            raise ValueError(f"the share of the model has {unknown[0]!r}, and the whole model does not; keep its names")

    def state_dict(self, *args: Any, **options: Any) -> StateDict:  # type: ignore[override]  # of several signatures
        return self.share.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.share.load_state_dict(*args, **options)


class Stage(nn.Module):
    """Consecutive parts of a model as one module, over the model that has them.

    The schedules of torch know micro-batches by their numbers: the first stage is called with one, and looks up the
    micro-batch itself. So a micro-batch may be whatever the collate function makes.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        parameters: Sequence[nn.Parameter],
        precision: Callable[[], AbstractContextManager[Any]],
        micro_batches: Sequence[Batch] | None = None,
    ) -> None:
        super().__init__()
        self.used = nn.ParameterList(parameters)
        """What torch takes for the stage's parameters; the model, which may be other stages' too, is no child of it."""
        self._run = _Run(model, parts, precision)
        self._micro_batches = micro_batches
        """The first stage's; None in all others."""

    def forward(self, *inputs: Any) -> Any:
        if self._micro_batches is not None:
            [number] = inputs
            inputs = (self._micro_batches[int(number)],)
        return self._run(*inputs)


@dataclass(frozen=True)
class _Run:
    """The calls of some parts, one after the other."""

    model: nn.Module
    parts: Sequence[Part]
    precision: Callable[[], AbstractContextManager[Any]]

    def __call__(self, *inputs: Any) -> Any:
        output: Any = inputs
        with self.precision():
            for part in self.parts:
                output = part(self.model, *inputs)
                inputs = output if isinstance(output, tuple) else (output,)
        # Nothing else can be sent.
        return map_leaves(lambda leaf: leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf, output)


Handed = tuple[torch.Tensor, ...]
"""What a stage hands on for one micro-batch, as tensors on the meta device."""


class Outline:
    """A model's shapes without its tensors: what the stages hand on is known without running any of them.

    Torch would find it out by a forward pass of its own in the first step of every process, in which BatchNorm and the
    like count a micro-batch that the undisturbed run does not have.
    """

    def __init__(self, cut: Cut, device: torch.device) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._device = device
        self._stages = cut.stages
        tensors = [*cut.model.parameters(), *cut.model.buffers()]
        self._model = copy.deepcopy(cut.model, {id(tensor): self._outlined(tensor) for tensor in tensors})

    def handed_on(self, micro_batch: Batch, precision: Callable[[], AbstractContextManager[Any]]) -> list[Handed]:
        """What each stage returns for such a micro-batch. No generator is drawn from."""
        inputs: tuple[Any, ...] = (map_leaves(self._outlined, micro_batch),)
        handed = []
        for number, parts in enumerate(self._stages):
            try:
                with self._mode:
                    output = _Run(self._model, parts, precision)(*inputs)
            except Exception as err:
                raise ValueError(
                    f"stage {number}: its parts cannot be run on tensors without data, from which the shapes follow that "
                    f"stages exchange ({type(err).__name__}: {err}); a part must not look at values"
                ) from err
            inputs = output if isinstance(output, tuple) else (output,)
            is_last = number == len(self._stages) - 1
            for tensor in inputs:
                if not isinstance(tensor, torch.Tensor) or not (is_last or tensor.requires_grad):
                    raise ValueError(
                        f"stage {number} returns {_described(tensor)}; stages exchange tensors that depend on what is "
                        "trained before them, one or a tuple: cut elsewhere, or let each part make for itself what needs "
                        "no gradient"
                    )
            handed.append(
                tuple(torch.empty_like(one, device="meta", requires_grad=one.requires_grad) for one in inputs)
            )
            with self._mode:
                inputs = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs)
        return handed

    def _outlined(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        with self._mode:
            outlined = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=self._device)
        return nn.Parameter(outlined, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else outlined


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)} that has no gradient"
