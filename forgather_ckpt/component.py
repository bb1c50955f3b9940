"""What a trainer declares: one `StateComponent` for each named part of its training state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import torch

from forgather_ckpt import strict_json
from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.patterns import TRAITS, SharingPattern, ValidationLevel
from forgather_ckpt.topology import Topology
from forgather_ckpt.values import NotPlain, dumps

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

StateDict = dict[str, Any]


class Stateful(Protocol):
    """Anything whose state can be taken and given back (as `torch.distributed.checkpoint.stateful.Stateful`)."""

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state_dict: StateDict, /) -> Any: ...


@dataclass(frozen=True)
class Target:
    """Where a tensor is to be made on load: `Target("cuda:0")`, or as a DTensor: `Target(mesh=mesh, placements=[Shard(0)])`."""

    device: Any = "cpu"
    """Of a whole tensor. A DTensor's parts lie on the devices of its mesh."""
    mesh: "DeviceMesh | None" = None
    placements: "Sequence[Placement] | None" = None

    def __post_init__(self) -> None:
        if (self.mesh is None) != (self.placements is None):
            raise DeclarationError("a Target takes mesh= and placements= together, or neither")
        if self.mesh is not None and self.placements is not None and len(self.placements) != self.mesh.ndim:
            raise DeclarationError(
                f"a Target has the placements {list(self.placements)} on a mesh of {self.mesh.ndim} axes; give one for each"
            )
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as err:
            raise DeclarationError(
                f"a Target's device is {self.device!r}; use one such as 'cpu' or 'cuda:0' ({err})"
            ) from None

    @classmethod
    def like(cls, tensor: torch.Tensor) -> Self:
        """Where `tensor` is, and cut as it is."""
        if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
            return cls(tensor.device, tensor.device_mesh, tensor.placements)
        return cls(tensor.device)


@dataclass(frozen=True)
class Available:
    """An item that the checkpoint has, as `load_targets` is told of it: a tensor, or a value where both are None."""

    dtype: str | None
    """torch's name, such as "bfloat16"."""
    shape: tuple[int, ...] | None


@runtime_checkable
class ChoosesTargets(Protocol):
    """A stateful that says where its tensors shall be loaded to, also those that do not exist yet.

    Of the names in `available`, those in the answer go there, or nowhere with None; the others go into the live
    tensor of that name where there is one, else into host memory. What goes to a target is memory of its own.

    One with a true attribute `may_convert` may make tensors of other dtypes and shapes of what it is given; elsewhere that
    is an error.
    """

    def load_targets(self, available: Mapping[str, Available]) -> Mapping[str, Target | None]: ...


@runtime_checkable
class ChecksValues(Protocol):
    """A stateful that is shown, before anything is touched, the values that a load or a warm start will give it.

    `values` are all that are not tensors, by item name; it raises where they do not fit each other.
    """

    def check_values(self, values: Mapping[str, Any]) -> None: ...


ResizeRule = Callable[[Sequence[StateDict], Topology, Topology], StateDict]
"""`on_resize(saved, old, new)`: a new rank's state from all old entries of the component, in the order of sets."""


@dataclass(frozen=True)
class StateComponent:
    """One named part of the training state, and how it is shared among the ranks.

    >>> StateComponent("model", model, SharingPattern.REPLICATED, validation_level="tensor")
    >>> StateComponent("stage", stage, SharingPattern.PER_GROUP, process_group_name="dp", names="global")
    >>> StateComponent("dataset", loader if rank == 0 else None, SharingPattern.GLOBAL)
    """

    key: str
    stateful: Stateful | None
    """None on a rank that takes part but holds nothing. Every rank declares every key."""
    sharing_pattern: SharingPattern
    process_group_name: str | None = None
    """For PER_GROUP, and only there: the group whose members hold *identical* state."""
    required: bool = True
    """An optional component that fails is left out of the checkpoint, with a warning, on every rank alike."""
    validation_level: ValidationLevel = None  # type: ignore[assignment]  # None is resolved in __post_init__
    """How copies are compared before they are stored; QUICK for REPLICATED and PER_GROUP unless said otherwise."""
    names: Literal["global", "local"] = None  # type: ignore[assignment]
    """"global": item names are unique over the job, and any rank of any layout may read them. "local": they belong
    to the set. GLOBAL and REPLICATED are always global; the others local unless said otherwise."""
    on_resize: Literal["error", "drop"] | ResizeRule = "error"
    """For local names, when the set is not found again: fail, start fresh with a warning, or build a new state."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for the manifest."""
    validation_exclude: Sequence[str] = ()
    """Shell patterns of item names that are not compared, such as "*.running_mean": what differs by design, or is of
    no account. They are stored as the lowest rank of the majority has them, and the manifest names them."""
    _has_own_level: bool | None = field(repr=False, compare=False, default=None, kw_only=True)
    """Whether the level was given; `dataclasses.replace` passes it on, where the level itself is no longer None."""

    def __post_init__(self) -> None:
        def refuse(problem: str) -> DeclarationError:
            return DeclarationError(f"component {self.key!r}: {problem}", component=str(self.key))

        if not isinstance(self.key, str) or not self.key:
            raise refuse("the key must be a non-empty string")
        try:
            pattern = SharingPattern(self.sharing_pattern)
        except ValueError:
            choices = ", ".join(f"SharingPattern.{pattern.name}" for pattern in SharingPattern)
            raise refuse(f"{self.sharing_pattern!r} is not a sharing pattern; use one of {choices}") from None
        object.__setattr__(self, "sharing_pattern", pattern)
        traits = TRAITS[pattern]
        if self._has_own_level is None:
            object.__setattr__(self, "_has_own_level", self.validation_level is not None)
        if self.validation_level is None:
            level = ValidationLevel.QUICK if traits.compared else ValidationLevel.NONE
        else:
            try:
                level = ValidationLevel(self.validation_level)
            except ValueError:
                choices = ", ".join(repr(level.value) for level in ValidationLevel)
                raise refuse(f"{self.validation_level!r} is not a validation level; use one of {choices}") from None
        object.__setattr__(self, "validation_level", level)
        if isinstance(self.validation_exclude, (str, bytes)) or not all(
            isinstance(pattern, str) and pattern for pattern in self.validation_exclude
        ):
            raise refuse(
                f"validation_exclude is {self.validation_exclude!r}; use a list of patterns of item names, such as "
                '["*.running_mean"]'
            )
        object.__setattr__(self, "validation_exclude", tuple(self.validation_exclude))
        if self.names is None:
            object.__setattr__(self, "names", traits.names)
        if self.names not in ("global", "local"):
            raise refuse(f"names is {self.names!r}; use 'global' or 'local'")
        if traits.names == "global" and self.names == "local":
            raise refuse(f"names='local' contradicts {pattern.name}, where one state serves all ranks; drop it")
        if level is not ValidationLevel.NONE and not traits.compared and self.names == "local":
            raise refuse(
                f"validation_level={level.value!r} with {pattern.name}: there is one copy only, nothing to compare; "
                "drop it, or declare REPLICATED or PER_GROUP"
            )
        if pattern is SharingPattern.GLOBAL and level is not ValidationLevel.NONE:
            raise refuse("with GLOBAL only rank 0's state counts, nothing to compare; declare REPLICATED instead")
        if self.process_group_name is not None and not isinstance(self.process_group_name, str):
            raise refuse(
                f"process_group_name is a {type(self.process_group_name).__name__}; use the group's name, a string, and "
                "give the group itself to the coordinator: process_groups={name: group}"
            )
        if pattern is SharingPattern.PER_GROUP and not self.process_group_name:
            raise refuse("PER_GROUP needs process_group_name=, the group whose members hold identical state")
        if pattern is not SharingPattern.PER_GROUP and self.process_group_name is not None:
            raise refuse(f"process_group_name= means something for PER_GROUP only, not for {pattern.name}; drop it")
        if self.on_resize not in ("error", "drop") and not callable(self.on_resize):
            raise refuse(
                f"on_resize is {self.on_resize!r}; use 'error', 'drop' or a function (saved, old, new) -> state"
            )
        if self.stateful is not None and not (
            callable(getattr(self.stateful, "state_dict", None))
            and callable(getattr(self.stateful, "load_state_dict", None))
        ):
            raise refuse(
                f"{type(self.stateful).__name__} has no state_dict() and load_state_dict(); give an object that has, or None"
            )
        try:
            if type(self.metadata) is not dict or not all(type(key) is str for key in self.metadata):
                raise NotPlain("is not a dict with string keys")
            if not _is_json(self.metadata):
                raise NotPlain("it holds more than str, bool, None, finite numbers of 64 bits, lists and dicts of them")
        except NotPlain as err:
            raise refuse(f"metadata goes into a JSON manifest, but {err.reason}") from None

    @property
    def is_global(self) -> bool:
        return self.names == "global"

    def level_for(self, num_sets: int) -> ValidationLevel:
        """The level for items that `num_sets` sets hold. Names that several sets share are copies too: they are
        compared at QUICK unless the component says otherwise."""
        if num_sets > 1 and self.is_global and not self._has_own_level:
            return ValidationLevel.QUICK
        return self.validation_level

    def declaration(self) -> dict[str, Any]:
        """What must be equal on all ranks, as plain data."""
        return {
            "key": self.key,
            "pattern": self.sharing_pattern.value,
            "group": self.process_group_name,
            "required": self.required,
            "level": self.validation_level.value,
            "exclude": list(self.validation_exclude),
            "names": self.names,
            "on_resize": self.on_resize if isinstance(self.on_resize, str) else "function",
        }


def _is_json(value: Any) -> bool:
    """Whether plain JSON gives `value` back as it is; `NotPlain` where not even typed JSON can."""
    typed = dumps(value)
    try:
        return strict_json.dumps(value) == typed
    except (TypeError, ValueError):
        return False
