"""Imports go one way: guest <- tdx <- firmware <- bootstub <- kernel <- tools."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDER = ("guest", "tdx", "firmware", "bootstub", "kernel", "tools")
ROOT = Path(__file__).parent.parent


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level name and line of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno


@pytest.mark.parametrize("package", ORDER)
def test_layer(package):
    """A package imports only what stands to its left, and never the tests."""
    above = {*ORDER[ORDER.index(package) + 1 :], "tests"}
    files = sorted((ROOT / package).rglob("*.py"))
    bad = [f"{path}:{line} imports {name}" for path in files for name, line in imported(path) if name in above]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("package", ORDER[:-1])
def test_no_input_or_output(package):
    """Below tools/ nothing touches files, terminals or the real clock."""
    outside = {"argparse", "os", "pathlib", "rich", "shutil", "subprocess", "tempfile", "time"}
    files = sorted((ROOT / package).rglob("*.py"))
    bad = [f"{path}:{line} imports {name}" for path in files for name, line in imported(path) if name in outside]
    assert not bad, "\n".join(bad)
