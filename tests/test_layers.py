"""The map in ``walproto.__doc__`` is complete, and imports go one way through it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import walproto

PACKAGE = Path(walproto.__file__).parent
MAP = re.findall(r"^- :mod:`(walproto[\w.]*)`", walproto.__doc__ or "", re.MULTILINE)
MAY_USE_TWISTED = ("walproto.access.tls", "walproto.options", "walproto.running", "walproto.tap")


def imported_by(module: str) -> set[str]:
    """The modules of ours that a module imports when it runs (not those for type checkers)."""
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    checked_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in checked_only:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | names
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MAP)


def test_the_map_names_every_module_once() -> None:
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(MAP) == sorted(modules)


def test_a_module_imports_only_from_those_above_it() -> None:
    for position, module in enumerate(MAP):
        upward = imported_by(module) - set(MAP[:position])
        assert not upward, f"{module} imports {sorted(upward)}, which come after it in the map"


def test_the_lower_layers_know_nothing_of_twisted() -> None:
    for module in MAP:
        if (
            module.startswith(("walproto.wire", "walproto.access", "walproto.wal."))
            or module.count(".") == 1
        ):
            path = PACKAGE.parent / (module.replace(".", "/") + ".py")
            if module not in MAY_USE_TWISTED:
                assert "twisted" not in path.read_text().split('"""', 2)[2], module


def test_no_group_in_a_regular_expression_is_possessive() -> None:
    """Python before 3.11.5 has those wrong (it goes back into them); single characters it has
    right."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"\)[*+?]\+", path.read_text()), path
