"""Fixtures for the real artefacts: Debian's kernels, OVMF and ACPI disassembler, as ``make artefacts`` gets them.

A test that asks for one of these fixtures is marked ``artefacts``. Without the files it is left out on a laptop,
with the reason in the summary; in CI (environment variable CI) it fails.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

ARTEFACTS = Path(__file__).parent / "artefacts"
KNOWN = Path(__file__).parent / "tests" / "artefacts.sha256"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"debian_kernel", "debian_kernel_6_1", "debian_ovmf", "iasl"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("artefacts")


def _artefact(name: str) -> Path:
    path = ARTEFACTS / name
    if not path.exists():
        reason = f"artefacts/{name} is missing: make artefacts"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return path


def _exact(path: Path) -> Path:
    """``path`` if it is the very file that the numbers in the tests were taken from."""
    known = dict(reversed(line.split()) for line in KNOWN.read_text().splitlines())
    if hashlib.sha256(path.read_bytes()).hexdigest() != known[path.name]:
        pytest.skip(f"artefacts/{path.name} is of another version than the tests know (make artefacts)")
    return path


@pytest.fixture
def debian_kernel() -> Path:
    """Debian's linux-image-6.12-cloud-amd64, the bzImage."""
    return _artefact("vmlinuz")


@pytest.fixture
def debian_kernel_6_1() -> Path:
    """Debian's linux-image-6.1.0-cloud-amd64, which knows nothing of unaccepted memory."""
    return _artefact("vmlinuz-6.1")


@pytest.fixture
def debian_ovmf() -> Path:
    """Debian's OVMF.fd."""
    return _artefact("OVMF.fd")


@pytest.fixture
def iasl() -> Path:
    """The ACPI compiler and disassembler of Debian's acpica-tools."""
    return _artefact("iasl")


@pytest.fixture
def exact_debian_kernel(debian_kernel: Path) -> Path:
    """The version of ``debian_kernel`` whose numbers the tests know."""
    return _exact(debian_kernel)


@pytest.fixture
def exact_debian_ovmf(debian_ovmf: Path) -> Path:
    """The version of ``debian_ovmf`` whose numbers the tests know."""
    return _exact(debian_ovmf)
