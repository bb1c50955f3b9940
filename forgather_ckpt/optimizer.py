"""`NamedOptimizer`: an optimizer's state under the names of its parameters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from forgather_ckpt.component import Available, StateDict, Target
from forgather_ckpt.errors import DeclarationError, LoadMismatch, StructureError
from forgather_ckpt.matching import some_of
from forgather_ckpt.names import decode_path

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""What `torch.compile` and activation checkpointing call the module inside."""

_MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "sum", "square_avg", "grad_avg", "acc_delta",
    "ax", "prev", "step_size",
}  # fmt: skip
"""What torch's own optimizers keep of each element of a parameter. Those of others may mean anything by these names."""

_OF_SCHEDULES = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""What torch's schedules write into the groups of whatever optimizer they are for."""


def unwrapped_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters, under the names that they have without DDP around it, and without `torch.compile` and
    activation checkpointing anywhere.

    A wrapper is what has one child, called `module` or `_orig_mod`, and no parameters of its own.
    """
    while [name for name, _ in module.named_children()] in (["module"], ["_orig_mod"]) and not module._parameters:
        [module] = module.children()
    for name, parameter in module.named_parameters():
        yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), parameter


class NamedOptimizer:
    """The state of a torch optimizer by parameter name, so that any later layout can read it.

    Items are flat and unique over the job: `state.<parameter>.exp_avg`, `groups.<parameter>.lr`. Dtypes come back
    exactly as they were (torch's own loading casts moments to the parameter's dtype), and an optimizer that has no
    state yet loads without a step being run.

    >>> StateComponent("optimizer", NamedOptimizer(optimizer, [model]), SharingPattern.REPLICATED)

    `model_parts` are the modules that own the optimizer's parameters; several only where their names are disjoint.
    """

    def __init__(self, optimizer: Optimizer, model_parts: Iterable[nn.Module]) -> None:
        self.optimizer = optimizer
        self._names: dict[nn.Parameter, str] = {}
        owners: dict[str, nn.Parameter] = {}
        for part in model_parts:
            for name, parameter in unwrapped_parameters(part):
                if owners.setdefault(name, parameter) is not parameter:
                    raise DeclarationError(f"two parameters are called {name!r}; name the model's parts differently")
                self._names.setdefault(parameter, name)
        self._parameters = {name: parameter for parameter, name in self._names.items()}

    def state_dict(self) -> StateDict:
        """References to the live state, flat. Values that are not tensors are the groups' hyperparameters.

        `StructureError` where the optimizer keeps state of another kind, which has no parameter to be named after.
        """
        self._refuse_other_state()
        state: StateDict = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = self._name(parameter)
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    state[f"state.{name}.{key}"] = value
                for key, value in group.items():
                    if key != "params":
                        state[f"groups.{name}.{key}"] = value
        return state

    def _refuse_other_state(self) -> None:
        grouped = self._grouped()
        strays = [
            key if isinstance(key, str) else type(key).__name__ for key in self.optimizer.state if key not in grouped
        ]
        if type(self.optimizer).state_dict is not Optimizer.state_dict:
            strays += sorted(set(self.optimizer.state_dict()) - {"state", "param_groups"})
        if strays:
            raise StructureError(
                f"{type(self.optimizer).__name__} keeps state that belongs to no parameter of its groups: {strays[:5]}; declare "
                "the optimizer itself, as a component of its own with names='local', or keep that state elsewhere"
            )

    def load_targets(self, available: Mapping[str, Available]) -> dict[str, Target | None]:
        """State goes to the device of the parameter that it belongs to; of parameters that are not in the groups here,
        such as frozen ones or those of other layers, nothing is wanted.

        `LoadMismatch` where what there is of each of its elements is that of another shape, and where it is of another
        kind of optimizer.
        """
        targets: dict[str, Target | None] = {}
        grouped = self._grouped()
        self._refuse_other_kind(available)
        for item, what in available.items():
            kind, name, key = self._parse(decode_path(item)[0])
            if name is None or self._parameters[name] not in grouped:
                targets[item] = None
            elif what.dtype is None or kind == "groups":
                targets[item] = Target("cpu")
            elif key not in self.optimizer.state.get(self._parameters[name], {}):  # else it is filled in place
                parameter, is_moment = self._parameters[name], self._is_torchs and key in _MOMENTS
                if is_moment and what.shape != tuple(parameter.shape):
                    raise LoadMismatch(
                        f"{item!r} has the shape {list(what.shape or ())} in the checkpoint and its parameter "
                        f"{list(parameter.shape)} in the job; build the model as it was saved, or leave the item out of a "
                        "warm start with exclude="
                    )
                targets[item] = _target(parameter, key, what)
        return targets

    def _refuse_other_kind(self, available: Iterable[str]) -> None:
        """A group's hyperparameters and moments would be mixed with those of another algorithm, of which none steps.

        New releases add hyperparameters, or drop some; that one does both is no matter of releases.
        """
        stored: dict[str, set[str]] = {}
        for item in available:
            kind, name, key = self._parse(decode_path(item)[0])
            if kind == "groups" and name is not None:
                stored.setdefault(name, set()).add(key)
        for group in self.optimizer.param_groups:
            known = stored.get(self._name(group["params"][0]), set()) if group["params"] else set()
            lacking = group.keys() & self.optimizer.defaults.keys() - known
            unknown = known - group.keys() - _OF_SCHEDULES
            if lacking and unknown:
                raise LoadMismatch(
                    f"the checkpoint's optimizer has {some_of(unknown)}, and this {type(self.optimizer).__name__} has "
                    f"{some_of(lacking)} instead: it is another one; make the optimizer that was saved, or load without "
                    "this component"
                )

    @property
    def _is_torchs(self) -> bool:
        return type(self.optimizer).__module__.startswith("torch.optim.")

    def check_values(self, values: Mapping[str, Any]) -> None:
        """`LoadMismatch` where parameters of one group would have different hyperparameters."""
        groups: dict[str, dict[str, Any]] = {}
        for item, value in values.items():
            kind, name, key = self._parse(decode_path(item)[0])
            if kind == "groups" and name is not None:
                groups.setdefault(name, {})[key] = value
        for group in self.optimizer.param_groups:
            self._refuse_unlike([self._name(parameter) for parameter in group["params"]], groups)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over the tensors in `state_dict`, whose memory is the optimizer's from then on."""
        states: dict[str, dict[str, Any]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for item, value in state_dict.items():
            kind, name, key = self._parse(item)
            if name is None:
                raise LoadMismatch(f"{item!r} belongs to no parameter of this optimizer's model")
            (states if kind == "state" else groups).setdefault(name, {})[key] = value
        for group in self.optimizer.param_groups:
            self._load_group(group, groups)
            for parameter in group["params"]:
                loaded = {
                    key: value.to(_device(parameter, key, group)) if isinstance(value, torch.Tensor) else value
                    for key, value in states.get(self._name(parameter), {}).items()
                }
                if loaded:
                    self.optimizer.state[parameter] = loaded
                else:
                    self.optimizer.state.pop(parameter, None)

    def _load_group(self, group: dict[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> None:
        """A group's hyperparameters are stored with each of its parameters; they must still agree."""
        for parameter in group["params"]:
            name = self._name(parameter)
            if name not in groups:
                raise LoadMismatch(f"the checkpoint has no optimizer state for the parameter {name!r}")
        self._refuse_unlike([self._name(parameter) for parameter in group["params"]], groups)
        if group["params"]:
            for key, value in groups[self._name(group["params"][0])].items():
                current = group.get(key)
                if isinstance(current, torch.Tensor) and isinstance(value, torch.Tensor):
                    current.copy_(value)  # a captured graph may refer to the tensor
                else:
                    group[key] = value

    def _refuse_unlike(self, names: Sequence[str], groups: Mapping[str, Mapping[str, Any]]) -> None:
        """`LoadMismatch` unless the parameters of a group are to have the same hyperparameters."""
        known = [name for name in names if name in groups]
        for name in known:
            for key, value in groups[name].items():
                other = groups[known[0]].get(key)
                if not _equal(other, value):
                    raise LoadMismatch(
                        f"{key} of {name!r} is {value!r} and of {known[0]!r} {other!r}, but both are in one parameter "
                        "group now; group the parameters as they were saved, or leave all hyperparameters out of a warm start "
                        "with exclude='groups.*'"
                    )

    def _name(self, parameter: nn.Parameter) -> str:
        try:
            return self._names[parameter]
        except KeyError:
            raise DeclarationError(
                f"the optimizer has a parameter of shape {list(parameter.shape)} that is in none of the model_parts; pass "
                "all modules that it optimizes, and make it after fully_shard() and parallelize_module(), which replace "
                "parameters"
            ) from None

    def _parse(self, item: Any) -> tuple[str, str | None, str]:
        """`state.<parameter>.<key>` in its three parts; the parameter is None where it is not one of ours."""
        kind, _, rest = item.partition(".") if isinstance(item, str) else ("", "", "")
        if kind in ("state", "groups"):
            name = rest
            while name := name.rpartition(".")[0]:
                if name in self._parameters:
                    return kind, name, rest[len(name) + 1 :]
        return kind, None, ""

    def _grouped(self) -> set[nn.Parameter]:
        return {parameter for group in self.optimizer.param_groups for parameter in group["params"]}


def _target(parameter: nn.Parameter, key: str, what: Available) -> Target:
    """Where an item of a parameter's state is read to that is not there yet."""
    if what.shape == tuple(parameter.shape) and parameter.dim() > 0:
        return Target.like(parameter)  # moments are cut as their parameter is
    return Target("cpu" if key == "step" else parameter.device)  # where a step belongs say the groups that are loaded


def _device(parameter: nn.Parameter, key: str, group: Mapping[str, Any]) -> torch.device:
    """Where an item of a parameter's state belongs: torch keeps step counters in host memory, unless captured or fused."""
    is_on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if is_on_host else parameter.device


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
