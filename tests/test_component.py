"""A declaration that means nothing is refused where it is made, with what to write instead."""

import dataclasses

import pytest
from hypothesis import given

from forgather_ckpt import SharingPattern, StateComponent, ValidationLevel, paths, strict_json
from forgather_ckpt.component import ChoosesTargets
from forgather_ckpt.errors import DeclarationError
from tests.components import Box
from tests.states import plain_values

GLOBAL, PER_RANK, REPLICATED, PER_GROUP, PER_NODE = (
    SharingPattern.GLOBAL, SharingPattern.PER_RANK, SharingPattern.REPLICATED, SharingPattern.PER_GROUP,
    SharingPattern.PER_NODE,
)  # fmt: skip
NONE, QUICK, TENSOR = ValidationLevel.NONE, ValidationLevel.QUICK, ValidationLevel.TENSOR


def component(pattern=REPLICATED, *, key="model", stateful=None, **fields) -> StateComponent:
    return StateComponent(key, stateful, pattern, **fields)


@pytest.mark.parametrize(
    ("one", "level", "names"),
    [
        (component(GLOBAL), NONE, "global"),
        (component(PER_RANK), NONE, "local"),
        (component(PER_RANK, names="global"), NONE, "global"),
        (component(PER_RANK, names="global", validation_level="tensor"), TENSOR, "global"),
        (component(REPLICATED), QUICK, "global"),
        (component(REPLICATED, names="global"), QUICK, "global"),
        (component(REPLICATED, validation_level="tensor"), TENSOR, "global"),
        (component(REPLICATED, validation_level=NONE), NONE, "global"),
        (component("replicated", validation_level=TENSOR), TENSOR, "global"),
        (component(PER_GROUP, process_group_name="dp"), QUICK, "local"),
        (component(PER_GROUP, process_group_name="dp", names="global", validation_level="none"), NONE, "global"),
        (component(PER_NODE), NONE, "local"),
        (component(PER_NODE, names="global"), NONE, "global"),
        (component(GLOBAL, validation_level="none"), NONE, "global"),
    ],
)
def test_what_is_not_said_follows_from_the_pattern(one, level, names):
    assert (one.validation_level, one.names, one.is_global) == (level, names, names == "global")
    assert type(one.sharing_pattern) is SharingPattern
    assert type(one.validation_level) is ValidationLevel
    assert (one.required, one.on_resize, one.metadata, one.stateful) == (True, "error", {}, None)


@pytest.mark.parametrize(
    ("one", "alone", "shared"),
    [
        (component(PER_RANK, names="global"), NONE, QUICK),
        (component(PER_RANK, names="global", validation_level="none"), NONE, NONE),
        (component(PER_RANK, names="global", validation_level="tensor"), TENSOR, TENSOR),
        (component(PER_GROUP, process_group_name="dp", names="global", validation_level="none"), NONE, NONE),
        (component(PER_GROUP, process_group_name="dp", names="global", validation_level="tensor"), TENSOR, TENSOR),
        (component(REPLICATED), QUICK, QUICK),
    ],
)
def test_names_that_several_sets_share_are_compared_unless_it_is_said_otherwise(one, alone, shared):
    assert (one.level_for(1), one.level_for(2)) == (alone, shared)


class Half:
    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"key": ""}, "the key must be a non-empty string"),
        ({"key": 5}, "the key must be a non-empty string"),
        ({"key": None}, "the key must be a non-empty string"),
        (
            {"pattern": "sharded"},
            "'sharded' is not a sharing pattern; use one of SharingPattern.GLOBAL, SharingPattern.PER_RANK",
        ),
        ({"pattern": None}, "None is not a sharing pattern"),
        (
            {"validation_level": "deep"},
            "'deep' is not a validation level; use one of 'none', 'quick', 'tensor', 'full'",
        ),
        ({"validation_level": 1}, "1 is not a validation level"),
        ({"names": "both"}, "names is 'both'; use 'global' or 'local'"),
        ({"names": "local"}, "names='local' contradicts REPLICATED, where one state serves all ranks; drop it"),
        ({"pattern": GLOBAL, "names": "local"}, "names='local' contradicts GLOBAL"),
        (
            {"pattern": GLOBAL, "validation_level": "quick"},
            "with GLOBAL only rank 0's state counts, nothing to compare; declare",
        ),
        (
            {"pattern": PER_RANK, "validation_level": "quick"},
            "there is one copy only, nothing to compare; drop it, or declare",
        ),
        (
            {"pattern": PER_NODE, "validation_level": "tensor"},
            "validation_level='tensor' with PER_NODE: there is one copy only",
        ),
        ({"pattern": PER_GROUP}, "PER_GROUP needs process_group_name=, the group whose members hold identical state"),
        ({"pattern": PER_GROUP, "process_group_name": ""}, "PER_GROUP needs process_group_name="),
        (
            {"process_group_name": "dp"},
            "process_group_name= means something for PER_GROUP only, not for REPLICATED; drop it",
        ),
        ({"pattern": PER_RANK, "process_group_name": "dp"}, "not for PER_RANK; drop it"),
        (
            {"pattern": PER_GROUP, "process_group_name": [0, 1]},
            "process_group_name is a list; use the group's name, a string",
        ),
        ({"process_group_name": 0}, "process_group_name is a int; use the group's name"),
        ({"on_resize": "merge"}, "on_resize is 'merge'; use 'error', 'drop' or a function (saved, old, new) -> state"),
        ({"on_resize": None}, "on_resize is None; use"),
        ({"stateful": object()}, "object has no state_dict() and load_state_dict(); give an object that has, or None"),
        ({"stateful": Half()}, "Half has no state_dict() and load_state_dict()"),
        ({"stateful": {"state_dict": 1}}, "dict has no state_dict() and load_state_dict()"),
        ({"metadata": None}, "metadata goes into a JSON manifest, but"),
        ({"metadata": [1]}, "metadata goes into a JSON manifest, but"),
    ],
)
def test_misuse_is_refused_with_the_way_out(fields, problem):
    with pytest.raises(DeclarationError) as caught:
        component(**fields)
    assert problem in caught.value.message
    assert caught.value.component == str(fields.get("key", "model"))
    assert isinstance(caught.value, ValueError)


ENDLESS: dict[str, object] = {}
ENDLESS["x"] = ENDLESS


@pytest.mark.parametrize(
    "metadata",
    [
        {"f": print}, {"a": {"b": object()}}, {1: "int key"}, {"a": {1: "int key"}}, {"s": {1, 2}}, {"t": (1, 2)},
        {"b": b"x"}, {"x": float("nan")}, {"x": [float("inf")]}, {"c": 1j}, {"huge": 2**70}, {"tag": {"$set": [1]}}, ENDLESS,
    ],
    ids=lambda metadata: repr(metadata)[:30],
)  # fmt: skip
def test_b32_metadata_that_a_json_manifest_cannot_hold_is_refused_at_once(metadata):
    with pytest.raises(DeclarationError, match="metadata goes into a JSON manifest, but"):
        component(metadata=metadata)


@given(plain_values)
def test_b32_accepted_metadata_comes_back_from_json_as_it_was(value):
    try:
        one = component(metadata={"value": value})
    except DeclarationError:
        return
    data = strict_json.dumps(dict(one.metadata))
    assert strict_json.loads(data, what="metadata", max_bytes=1 << 20) == {"value": value}


def test_metadata_is_kept():
    metadata = {"note": "αβ", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    assert component(metadata=metadata).metadata == metadata


@pytest.mark.parametrize("key", ["../../evil", "/etc/passwd", "a\0b", "*", "..", "model/"])
def test_b31_any_key_may_be_declared_and_none_becomes_a_path(key):
    one = component(key=key)
    assert paths.is_safe_file_name(paths.tensors(paths.stems([one.key])[key], 0, 0, num_writers=1))


def test_a_declaration_is_plain_data_without_the_state():
    one = component(PER_RANK, stateful=Box({}), on_resize=lambda saved, old, new: {}, metadata={"a": 1}, required=False)
    assert one.declaration() == {
        "key": "model", "pattern": "per_rank", "group": None, "required": False, "level": "none", "exclude": [], "names": "local",
        "on_resize": "function",
    }  # fmt: skip
    strict_json.dumps(one.declaration())


def test_a_component_that_is_replaced_keeps_the_level_for_names_of_several_sets():
    default = component(PER_RANK, names="global")
    asked = component(PER_RANK, names="global", validation_level="none")
    for one, level in ((default, ValidationLevel.QUICK), (asked, ValidationLevel.NONE)):
        assert one.level_for(2) is level
        assert dataclasses.replace(one, key="other").level_for(2) is level


def test_a_declaration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        component().key = "other"


def test_a_changed_copy_is_checked_too():
    one = component(REPLICATED, validation_level="tensor")
    assert dataclasses.replace(one, key="other").validation_level is TENSOR
    with pytest.raises(DeclarationError):
        dataclasses.replace(one, key="")


def test_choosing_targets_is_optional():
    class Chooser(Box):
        def load_targets(self, available):
            return {}

    assert isinstance(Chooser({}), ChoosesTargets)
    assert not isinstance(Box({}), ChoosesTargets)
