"""File and directory names: no key becomes a path, no two files get one name."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forgather_ckpt import paths
from tests.states import texts

keys = (
    texts.filter(bool)
    | st.sampled_from(
        ["model", "Model", "MODEL", "small", "index", "small-00000", "index-00000", "model-part1", "ß", "ss"]
    )
    | st.builds(
        "{}{}{}".format,
        st.sampled_from(["model", "small", "a"]),
        st.sampled_from(["", "-00000", "-00001", "-00000-of-00002", "-00001-of-00002"]),
        st.sampled_from(["", "-part1", "-part2"]),
    )
)


def file_names(keys: list[str], num_writers: int) -> list[str]:
    """All files that ranks may write for components with these keys."""
    names = [paths.MANIFEST, paths.ANNOTATIONS]
    for writer, part in itertools.product(range(num_writers), range(3)):
        names += [paths.index(writer, part), paths.small_tensors(writer, part)]
    for stem in paths.stems(keys).values():
        names.append(paths.tensors_index(stem))
        for part in range(3):
            names.append(paths.tensors(stem, 0, part, num_writers=1))
            if num_writers > 1:
                names += [paths.tensors(stem, writer, part, num_writers=num_writers) for writer in range(num_writers)]
    return names


@given(st.lists(keys, unique=True, max_size=6), st.integers(1, 3))
@example(["model", "model-00000-of-00002", "model-part1"], 2)
@example(["small", "small-00000", "small-00001-part2"], 2)
def test_no_two_files_get_one_name_even_where_case_does_not_count(keys, num_writers):
    names = file_names(keys, num_writers)
    assert len({name.casefold() for name in names}) == len(names)
    assert all(paths.is_safe_file_name(name) for name in names)


@given(st.lists(keys, unique=True, min_size=1, max_size=4))
def test_b31_a_key_never_becomes_a_path(keys):
    for stem in paths.stems(keys).values():
        assert "/" not in stem
        assert not stem.startswith(".")
        assert stem.isascii()
        assert len(stem) <= 80


@pytest.mark.parametrize(
    ("key", "stem"),
    [("model", "model"), ("optimizer.0", "optimizer.0"), ("a_b-c", "a_b-c"), ("0", "0"), ("x" * 64, "x" * 64)],
)
def test_a_key_that_is_fit_for_a_file_name_is_one(key, stem):
    assert paths.stems([key]) == {key: stem}


@pytest.mark.parametrize(
    "key",
    ["../../evil", "a/b", "..", ".hidden", "-", "*", "x" * 65, "größe", "\0", "small", "index", "\ud800", "a-part1"],
)
def test_a_key_that_is_not_gets_a_digest(key):
    stem = paths.stems([key])[key]
    assert stem != key
    assert paths.is_safe_file_name(stem)
    assert stem == paths.stems(["other", key])[key]


def test_keys_that_differ_in_case_only_are_told_apart():
    stems = paths.stems(["model", "Model", "other"])
    assert stems["other"] == "other"
    assert stems["model"].startswith("model-")
    assert stems["Model"].startswith("Model-")


@pytest.mark.parametrize(
    ("name", "is_safe"),
    [
        ("model.safetensors", True), ("index-00000.json", True), ("_a", True), ("0", True), ("a" * 128, True),
        ("", False), (".", False), ("..", False), (".hidden", False), ("a/b", False), ("/etc/passwd", False), ("a\\b", False),
        ("a b", False), ("a\n", False), ("-a", False), ("ä", False), ("a\0", False), ("a" * 129, False), ("C:a", False),
        (None, False), (5, False), (b"a", False),
    ],
)  # fmt: skip
def test_file_names_that_a_manifest_may_hold(name, is_safe):
    assert paths.is_safe_file_name(name) is is_safe


def test_names_of_the_format():
    assert paths.checkpoint(1000) == "checkpoint-1000"
    assert paths.temporary(5, "ab") == ".tmp-checkpoint-5-ab"
    assert paths.replaced(5, "ab") == "checkpoint-5.replaced-ab"
    assert paths.index(3, 0) == "index-00003.json"
    assert paths.index(3, 2) == "index-00003-part2.json"
    assert paths.small_tensors(0, 0) == "small-00000.safetensors"
    assert paths.tensors("model", 0, 0, num_writers=1) == "model.safetensors"
    assert paths.tensors("model", 1, 0, num_writers=2) == "model-00001-of-00002.safetensors"
    assert paths.tensors("model", 1, 1, num_writers=2) == "model-00001-of-00002-part1.safetensors"
    assert paths.tensors_index("model") == "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "is_temporary"),
    [
        (paths.temporary(5, "ab"), True),
        (paths.trash(paths.checkpoint(5), "ab"), True),
        (paths.checkpoint(5), False),
        (paths.replaced(5, "ab"), False),
        ("checkpoint-backup-mine", False),
        ("tmp-checkpoint-5", False),
        (paths.LEASE, False),
    ],
)
def test_what_may_be_swept(name, is_temporary):
    assert paths.is_temporary(name) is is_temporary
