"""The public names: complete, in order, importable, and imported when they are first used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import forgather_ckpt
from forgather_ckpt.errors import CheckpointError

PROMISED = {
    "SharingPattern",
    "ValidationLevel",
    "StateComponent",
    "Topology",
    "NamedOptimizer",
    "RNGState",
    "CheckpointCoordinator",
    "CheckpointManifest",
    "open_checkpoint",
    "load_component",
    "CheckpointError",
}


def test_all_is_sorted_and_has_what_is_promised() -> None:
    assert forgather_ckpt.__all__ == sorted(set(forgather_ckpt.__all__))
    assert set(forgather_ckpt.__all__) >= PROMISED


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(forgather_ckpt.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module.removeprefix("forgather_ckpt.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert seen == forgather_ckpt._MODULES
    assert sorted(seen) == forgather_ckpt.__all__


@pytest.mark.parametrize("name", forgather_ckpt.__all__)
def test_a_name_can_be_imported_and_is_itself(name: str) -> None:
    found = getattr(forgather_ckpt, name)
    assert found.__name__ == name
    assert found.__module__ == f"forgather_ckpt.{forgather_ckpt._MODULES[name]}"
    assert name in dir(forgather_ckpt)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CheckpointManger'"):
        _ = forgather_ckpt.CheckpointManger


def test_the_errors_need_no_torch() -> None:
    code = (
        "import sys; from forgather_ckpt import CheckpointError; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    root = Path(forgather_ckpt.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "[]\n"
    assert issubclass(CheckpointError, Exception)
