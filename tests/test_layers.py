"""Imports go one way: guest <- tdx <- firmware <- bootstub <- kernel, cpu <- tools."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = (("guest",), ("tdx",), ("firmware",), ("bootstub",), ("kernel", "cpu"), ("tools",))
"""From the ground up; packages of one floor do not know each other."""
PACKAGES = [package for floor in FLOORS for package in floor]
ROOT = Path(__file__).parent.parent


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level name and line of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno


def imports_of(package: str, names: set[str]) -> list[str]:
    """Where the files of a package import one of ``names``."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return [f"{path}:{line} imports {name}" for path in files for name, line in imported(path) if name in names]


@pytest.mark.parametrize("package", PACKAGES)
def test_layer(package):
    """A package imports only itself and the floors below it, and never the tests."""
    floor = next(number for number, floor in enumerate(FLOORS) if package in floor)
    below = {name for lower in FLOORS[:floor] for name in lower} | {package}
    bad = imports_of(package, {*PACKAGES, "tests"} - below)
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("package", PACKAGES[:-1])
def test_no_input_or_output(package):
    """Below tools/ nothing touches files, terminals or the real clock."""
    outside = {"argparse", "os", "pathlib", "rich", "shutil", "subprocess", "tempfile", "time"}
    if package == "cpu":
        outside.remove("pathlib")  # cpu/build.py reads its own process's memory map
    bad = imports_of(package, outside)
    assert not bad, "\n".join(bad)
