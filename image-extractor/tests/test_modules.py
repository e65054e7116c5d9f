"""The modules of the package: one job each, no import cycles."""

import ast
import graphlib

import pytest
from conftest import PACKAGE

MODULES = {p.stem: p for p in (PACKAGE / "image_extractor").glob("*.py")}


def imported(path):
    """Names of the package's modules that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [a.name for a in node.names]


def test_imports_have_no_cycle():
    # __version__ is imported from the package itself, __init__.py, which imports nothing.
    needed = {name: set(imported(path)) & MODULES.keys() for name, path in MODULES.items()}
    order = list(graphlib.TopologicalSorter(needed).static_order())  # raises CycleError
    assert order.index("layout") < order.index("writer") < order.index("image_extractor")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_first_line_of_a_module_is_a_sentence(name):
    first = (ast.get_docstring(ast.parse(MODULES[name].read_text())) or "").partition("\n")[0]
    assert first.endswith(".")
