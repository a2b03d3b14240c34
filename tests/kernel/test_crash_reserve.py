"""``crashkernel=``: forms, which of several counts, and where the memory is taken."""

from __future__ import annotations

import pytest

from kernel.crash_reserve import CrashKernel, parse_crashkernel
from kernel.version import V6_1
from tests.kernel.plain_guest import GIB, HIGH, LOW, MIB, booted

LOW_SIZE = 256 * MIB


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("crashkernel=256M", CrashKernel(256 * MIB)),
        ("crashkernel=256M@16M quiet", CrashKernel(256 * MIB, 16 * MIB)),
        ("crashkernel=1G-4G:128M,4G-:256M", CrashKernel(256 * MIB)),
        ("crashkernel=1G-4G:128M,4G-16G:256M@64M", CrashKernel(256 * MIB, 64 * MIB)),
        ("crashkernel=1G-4G:128M", None),
        ("crashkernel=512M,high", CrashKernel(512 * MIB, high=True, low_size=LOW_SIZE)),
        ("crashkernel=512M,high crashkernel=0,low", CrashKernel(512 * MIB, high=True)),
        ("crashkernel=64M,low crashkernel=1G,high", CrashKernel(GIB, high=True, low_size=64 * MIB)),
        ("crashkernel=1G,high crashkernel=96M", CrashKernel(96 * MIB)),
        ("crashkernel=1M crashkernel=2M", CrashKernel(2 * MIB)),
        ("crashkernel=64M,low", None),
        ("crashkernel=x", None),
        ("crashkernel=256Mx", None),
        ("crashkernel=4G-1G:128M", None),
        ("crashkernel=0", None),
        ("crashkernel=64G", None),
        ("crashkernel=-", None),
        ("crashkernel=:,-:", None),
        ("quiet", None),
    ],
)
def test_forms(text, found):
    """With 8 GiB of memory; a form that is not understood reserves nothing."""
    assert parse_crashkernel(text, 8 * GIB) == found


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("256M", ["crashkernel reserved: 0x0000000070000000 - 0x0000000080000000 (256 MB)"]),
        ("64M@512M", ["crashkernel reserved: 0x0000000020000000 - 0x0000000024000000 (64 MB)"]),
        (
            "1G,high",
            [
                "crashkernel low memory reserved: 0x70000000 - 0x80000000 (256 MB)",
                "crashkernel reserved: 0x00000001bf000000 - 0x00000001ff000000 (1024 MB)",
            ],
        ),
        (
            "1G,high crashkernel=0,low",
            ["crashkernel reserved: 0x00000001bf000000 - 0x00000001ff000000 (1024 MB)"],
        ),
        (
            "3G",  # not below 4 GiB
            [
                "crashkernel low memory reserved: 0x70000000 - 0x80000000 (256 MB)",
                "crashkernel reserved: 0x000000013f000000 - 0x00000001ff000000 (3072 MB)",
            ],
        ),
        ("64M@16M", ["crashkernel reservation failed - memory is in use."]),
        ("5G", ["cannot allocate crashkernel (size:0x140000000)"]),
    ],
)
def test_where_it_is(text, lines):
    """As high as possible below 4 GiB, then above; an offset is taken as it is, or not at all."""
    _kernel, log = booted((*LOW, HIGH), cmdline=f"crashkernel={text}")
    assert [line for line in log if "crashkernel" in line and not line.startswith("Command")] == lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("256M", ["Reserving 256MB of memory at 1792MB for crashkernel (System RAM: 6143MB)"]),
        ("64M@17M", ["crashkernel reservation failed - memory is in use."]),
        ("65M@513M", ["Reserving 65MB of memory at 513MB for crashkernel (System RAM: 6143MB)"]),
        (
            "1G,high",
            [
                "Reserving 256MB of low memory at 1792MB for crashkernel (low RAM limit: 4096MB)",
                "Reserving 1024MB of memory at 7152MB for crashkernel (System RAM: 6143MB)",
            ],
        ),
        ("5G", ["crashkernel reservation failed - No suitable area found."]),
    ],
)
def test_where_6_1_has_it(text, lines):
    """Before 6.8 x86 had code and words of its own."""
    _, log = booted((*LOW, HIGH), cmdline=f"crashkernel={text}", version=V6_1)
    assert [line for line in log if "crashkernel" in line and not line.startswith("Command")] == lines
