"""Guests of several sizes, lazy and eager, under both protocols: their logs and files of /proc are golden files.

Lines whose numbers are 0 are left out, so that a golden file is about what the guest has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bootstub.protocol import PROTOCOLS
from bootstub.sample_kernel import sample_bzimage
from guest.units import SZ_1G, SZ_1M
from kernel.events import FileRead
from kernel.runtime import parse_script
from tdx.machine_type import MachineType
from tools.maps.source import boot_descriptors, read_map
from tools.numa import numa_nodes, parse_numa
from tools.pipeline import KERNEL_STAGES, Boot, BootConfig
from tools.render import log_lines

if TYPE_CHECKING:
    from tests.conftest import Golden

WORST_CASE = Path(__file__).parent.parent / "samples" / "maps" / "worst-case-4-pib.toml"
GUESTS: dict[str, dict[str, Any]] = {
    "256M": {"memory": 256 * SZ_1M},
    "4G": {"memory": 4 * SZ_1G},
    "64G": {"memory": 64 * SZ_1G},
    "2-nodes": {"memory": 4 * SZ_1G, "nodes": numa_nodes(parse_numa("2"), MachineType().ram(4 * SZ_1G))},
    "4P-hole": {"efi_map": boot_descriptors(read_map(str(WORST_CASE)))},
}
SCRIPT = """\
alloc 9 16
alloc 0 256
cat /proc/meminfo
cat /proc/zoneinfo
cat /proc/buddyinfo
"""
ZERO = re.compile(r"(\b0|\b0 kB)$")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("how", ["lazy", "eager"])
@pytest.mark.parametrize("guest", GUESTS)
def test_guest(golden: Golden, guest: str, how: str, protocol: str) -> None:
    """dmesg from the zones on, /proc/meminfo, zoneinfo and buddyinfo of a guest do not change unnoticed."""
    boot = Boot(
        BootConfig(
            sample_bzimage(), cmdline=f"nokaslr accept_memory={how}", protocol=PROTOCOLS[protocol],
            script=tuple(parse_script(SCRIPT)), **GUESTS[guest],
        )
    )  # fmt: skip
    boot.run()
    lines = log_lines(record for record in boot.trace.records if record.stage in KERNEL_STAGES)
    start = next(number for number, line in enumerate(lines) if line.endswith("Zone ranges:"))
    golden.check("".join(line + "\n" for line in lines[start:] if not ZERO.search(line)))
    assert (unaccepted_kb(boot) == 0) == (how == "eager" or guest == "256M")


def unaccepted_kb(boot: Boot) -> int:
    """What /proc/meminfo says."""
    reads = [record.event for record in boot.trace.records if isinstance(record.event, FileRead)]
    found = re.search(r"^Unaccepted: +(\d+) kB$", reads[0].text, re.MULTILINE)
    assert found is not None
    return int(found[1])
