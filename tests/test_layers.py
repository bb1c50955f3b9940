"""Each module imports from lower layers only, and what `fgckpt` needs comes without torch and numpy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import forgather_ckpt

ROOT = Path(forgather_ckpt.__file__).parent

LAYERS = [
    # words and the bytes below everything
    ("errors", "patterns", "dtypes", "hashtree", "metrics", "multilinear", "paths"),
    ("figures", "strict_json", "topology", "boxes", "signals", "triggers"),
    # codecs
    ("values", "container", "manifest", "run_clock"),
    ("names", "index", "redaction", "command_line"),
    # decisions: pure
    ("plan", "replication", "resume", "pieces", "parting", "matching", "policies", "changes"),
    ("portions", "differences", "comparison", "control", "retention", "prompt", "resume_arguments"),
    ("inventory", "agreement"),
    # the file system
    ("files", "liveness", "launch"),
    ("lease", "catalog", "environment", "callbacks", "resume_command"),
    ("verify", "digest_log", "annotations", "attempts"),
    ("commit",),
    ("divergence", "digest_writer", "pruning", "space"),
    ("choice", "requests", "deleter"),
    ("cli",),
    ("__main__",),
    # --- no torch, no numpy above this line
    ("component", "comm", "elements", "excerpts", "triton_digest", "sharded"),
    ("structure", "discovery", "declarations", "optimizer", "rng", "entries", "deltas", "bulk"),
    ("memory", "holdings", "job"),
    ("reading", "writing", "settle", "device_digest"),
    ("digests",),
    ("bytewise", "recorder", "logical"),
    ("mismatch",),
    ("check",),
    ("assembly", "validate", "save"),
    ("library",),
    ("prepare", "opened"),
    ("load",),
    ("warm_start",),
    ("coordinator",),
    ("start", "housekeeping"),
    ("manager",),
    ("data",),
    ("trainers",),
    ("demo",),
]
"""Lowest first; no module imports its own layer. A folder is one family: inside it, siblings may import each other."""

NUM_LIGHT_LAYERS = LAYERS.index(("__main__",)) + 1
LIGHT = [module for layer in LAYERS[:NUM_LIGHT_LAYERS] for module in layer]
"""What must be importable on a login node in milliseconds."""

LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}


def source_files() -> dict[Path, str]:
    """Every file of the package, with the module or family of the layer list that it belongs to."""
    files = {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sorted(ROOT.rglob("*.py"))}
    return {path: module for path, module in files.items() if module != "__init__"}


def module_names(family: str) -> list[str]:
    """The importable names of a module, or of all modules of a family."""
    names = []
    for path in (path for path, module in source_files().items() if module == family):
        parts = [part for part in path.relative_to(ROOT.parent).with_suffix("").parts if part != "__init__"]
        names.append(".".join(parts))
    return names


def imported(path: Path) -> Iterator[str]:
    """The full names of what a file imports when it is imported: not inside functions, not for type checking only."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def imported_families(path: Path) -> set[str]:
    names = (name.split(".") for name in imported(path))
    return {parts[1] for parts in names if parts[0] == "forgather_ckpt" and len(parts) > 1}


def test_the_list_names_every_module_once() -> None:
    listed = [module for layer in LAYERS for module in layer]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(source_files().values())


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_lower_layers_only(path: Path) -> None:
    module = source_files()[path]
    for other in imported_families(path) - {module}:
        assert other in LAYER_OF, f"{other} is imported from the package itself; import it from its module"
        assert LAYER_OF[other] < LAYER_OF[module], f"{module} imports {other}, which is not below it"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_numpy(module: str) -> None:
    for path, family in source_files().items():
        if family == module:
            heavy = {name for name in imported(path) if name.split(".")[0] in ("torch", "numpy")}
            assert not heavy, f"{path.name} imports {heavy}"
