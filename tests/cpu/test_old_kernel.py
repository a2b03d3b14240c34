"""A real kernel that knows nothing of unaccepted memory."""

from __future__ import annotations

from pathlib import Path

from guest.trace import Print
from guest.units import SZ_1G, SZ_4G
from tools.pipeline import REAL_KERNEL_CMDLINE, Boot, BootConfig
from tools.verdict import lost_memory, verdict_lines


def test_a_kernel_without_support_loses_the_memory(debian_kernel_6_1: Path) -> None:
    """Debian's 6.1 kernel reaches its zones without what is unaccepted, and the boot says how much that is."""
    image = debian_kernel_6_1.read_bytes()
    until = "Zone ranges:"
    boot = Boot(BootConfig(image, memory=6 * SZ_1G, cmdline=REAL_KERNEL_CMDLINE, run="kernel", until=until))
    boot.run()
    lines = [r.event.text for r in boot.trace.records if isinstance(r.event, Print) and r.stage == "kernel"]
    assert lines[-1].endswith(until)
    assert any("Linux version 6.1." in line for line in lines)
    assert not any("BIOS-e820: [mem 0x0000000100000000" in line for line in lines)
    assert list(lost_memory(boot)) == [(SZ_4G, 2 * SZ_4G)]
    assert verdict_lines(boot) == [
        "lost: 4194304 KiB of unaccepted memory are not in the kernel's e820 table",
        "no bitmap of unaccepted memory; 4194304 KiB are unaccepted",
    ]
