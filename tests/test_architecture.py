"""The layout that the design promises: packages, import arrows, no cycles."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Where each package lies in the repository; `sparsecc/passes` and `sparsecc/targets` are links.
FOLDERS = {
    "sparsecc": ROOT / "sparsecc",
    "sparsecc.passes": ROOT / "passes",
    "sparsecc.targets": ROOT / "targets",
}
LINKS = {"passes", "targets"}
# The only core modules that may know passes and targets; the package itself only lazily.
JOINS = {"sparsecc.api"}
LAZY_JOINS = {"sparsecc"}
FRAMEWORKS = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


def sources(package: str) -> Iterator[tuple[str, Path]]:
    """Every module of a package with its file, without following the two links."""
    folder = FOLDERS[package]
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if package == "sparsecc" and parts[0] in LINKS:
            continue
        yield ".".join((package, *(part for part in parts if part != "__init__"))), file


@cache
def modules() -> dict[str, Path]:
    """All modules of the distribution by dotted name."""
    return {name: file for package in FOLDERS for name, file in sources(package)}


def is_type_checking(node: ast.stmt) -> bool:
    """Whether a statement is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: not those in functions or for types only."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            yield from at_import_time(node.orelse)
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from at_import_time(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import_time(handler.body)


def anywhere(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import of a module, wherever it stands, except those for types only."""
    hidden = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and is_type_checking(node)
              for child in node.body for inner in ast.walk(child)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in hidden:
            yield node


def absolute(node: ast.ImportFrom, importer: str, is_package: bool) -> str:
    """The module that a ``from`` import names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(importer: str, *, lazily: bool) -> set[str]:
    """Dotted names that a module imports; ``from a import b`` counts as ``a.b`` where that is a module."""
    file = modules()[importer]
    tree = ast.parse(file.read_text("utf-8"), str(file))
    found: set[str] = set()
    for node in anywhere(tree) if lazily else at_import_time(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = absolute(node, importer, file.name == "__init__.py")
        names = {f"{base}.{alias.name}" for alias in node.names}
        submodules = names & modules().keys()
        found |= submodules
        if names - submodules:
            found.add(base)
    return found


def belongs(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages or lies in one of them."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(importers: set[str], forbidden: tuple[str, ...], *, lazily: bool) -> list[str]:
    """``importer -> imported`` for every import of something forbidden."""
    return [
        f"{importer} -> {name}"
        for importer in sorted(importers)
        for name in sorted(imported(importer, lazily=lazily))
        if belongs(name, *forbidden)
    ]


def members(package: str) -> set[str]:
    """The modules of one of the three packages."""
    return {name for name, _ in sources(package)}


def cycle(edges: dict[str, set[str]]) -> list[str] | None:
    """Some cycle of a directed graph as a closed path, or None."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for successor in sorted(edges.get(node, ())):
            if found := visit(successor):
                return found
        path.pop()
        done.add(node)
        return None

    return next((found for node in sorted(edges) if (found := visit(node))), None)


def project() -> dict[str, object]:
    """The ``[tool.setuptools]`` table."""
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"][
        "setuptools"
    ]
    return table


def test_package_list_matches_the_folders() -> None:
    declared = project()["packages"]
    there = {name for name, file in modules().items() if file.name == "__init__.py"}
    assert isinstance(declared, list)
    assert sorted(declared) == sorted(set(declared)), "a package is listed twice"
    assert set(declared) == there


def test_every_folder_with_sources_is_a_package() -> None:
    folders = {file.parent for file in modules().values()}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_package_dirs_and_links() -> None:
    assert project()["package-dir"] == {name: str(path.relative_to(ROOT)) for name, path in FOLDERS.items()}
    for link in LINKS:
        assert (ROOT / "sparsecc" / link).readlink() == Path("..") / link


def test_core_knows_neither_passes_nor_targets() -> None:
    core = members("sparsecc")
    forbidden = ("sparsecc.passes", "sparsecc.targets")
    assert violations(core - JOINS - LAZY_JOINS, forbidden, lazily=True) == []
    assert violations(core & LAZY_JOINS, forbidden, lazily=False) == []


def test_targets_do_not_know_passes() -> None:
    assert violations(members("sparsecc.targets"), ("sparsecc.passes",), lazily=True) == []


def test_passes_do_not_know_targets_nor_the_api() -> None:
    forbidden = ("sparsecc.targets", "sparsecc.api", "sparsecc.cli")
    assert violations(members("sparsecc.passes"), forbidden, lazily=True) == []


def test_passes_do_not_know_each_other() -> None:
    passes = members("sparsecc.passes") - {"sparsecc.passes"}
    for importer in passes:
        others = {name for name in passes if not belongs(importer, name) and not belongs(name, importer)}
        assert violations({importer}, tuple(others), lazily=True) == []


def test_passes_do_not_know_frameworks() -> None:
    assert violations(members("sparsecc.passes"), FRAMEWORKS, lazily=True) == []


def test_no_import_cycles() -> None:
    edges = {name: (imported(name, lazily=False) & modules().keys()) - {name} for name in modules()}
    assert (found := cycle(edges)) is None, " -> ".join(found or [])


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, None),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
    ],
)
def test_cycle(edges: dict[str, set[str]], expected: list[str] | None) -> None:
    assert cycle(edges) == expected
