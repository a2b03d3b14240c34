"""CPUID of a TD: what the module answers, and what it leaves to the host."""

from __future__ import annotations

import pytest

from tdx.module import TdxModule


@pytest.mark.parametrize("leaf", [0, 1, 7, 0x15, 0x21, 0x8000_0000, 0x8000_0001, 0x8000_0007, 0x8000_0008], ids=hex)
def test_native_leaves(module: TdxModule, leaf: int) -> None:
    """What a TD must be able to trust is answered by the module."""
    assert module.cpuid_is_native(leaf, 0)
    assert module.cpuid(leaf) != (0, 0, 0, 0)


@pytest.mark.parametrize("leaf", [2, 0x16, 0x4000_0000, 0x4000_0001, 0x4000_00FF, 0x8000_0002, 0xFFFF_FFFF], ids=hex)
def test_leaves_that_raise_ve(module: TdxModule, leaf: int) -> None:
    """Hypervisor leaves, the brand string and leaves of no meaning to the module are left to #VE and the host."""
    assert not module.cpuid_is_native(leaf, 0)


def test_only_some_leaves_look_at_ecx(module: TdxModule) -> None:
    """ECX chooses a sub-leaf of leaves 7 and 0x21, and means nothing to a leaf without sub-leaves."""
    assert module.cpuid(1, 0x1234) == module.cpuid(1)
    assert module.cpuid_is_native(0x8000_0008, 0x1234)
    assert not module.cpuid_is_native(7, 1)
    assert module.cpuid(0x21, 1) == (0, 0, 0, 0)
