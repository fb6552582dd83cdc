"""Arrows go one way: train -> eval -> recipes -> parse, and no files import each other."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

LEVELS = ["parse", "recipes", "eval", "recipes.demo", "train"]  # the making of the shipped pair stands on its task


def modules():
    """Every module's name and file."""
    files = [file for package in ("parse", "recipes", "eval", "train") for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name, file, known):
    """The project's modules that a file imports, within functions too, but not for types alone."""
    found = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= within & known | ({node.module} if not within <= known else set())
    return {each for each in found if each in known and each != name}


def level(module):
    package = "recipes.demo" if module.startswith("recipes.demo") else module.split(".")[0]
    return LEVELS.index(package)


def test_every_module_that_is_imported_is_there():
    """Also within functions, where nothing else tells before they run."""
    known = modules()
    for file in [*known.values(), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            own = {name for name in names if name.split(".")[0] in ("parse", "recipes", "eval", "train")}
            assert own <= known.keys(), f"{file.name} imports {', '.join(sorted(own - known.keys()))}"


GRAPH = {name: imports(name, file, set(modules())) for name, file in modules().items()}


def test_there_are_arrows():
    assert "parse" in GRAPH["recipes.pair"]
    assert sum(map(len, GRAPH.values())) > 200
    assert {level(name) for name in GRAPH} == set(range(len(LEVELS)))


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_arrows_go_one_way(name):
    up = {each for each in GRAPH[name] if level(each) > level(name)}
    assert not up, f"{name} imports {', '.join(sorted(up))}, which stands above it"


def test_no_files_import_each_other():
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names them
