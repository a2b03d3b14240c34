"""What differs between versions of the kernel in the memory boot: one table of facts.

Sizes of structures are those of Debian's cloud kernels, read off logs with ``memblock=debug``; they depend on the
configuration.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from guest.errors import FormatError
from kernel.e820 import RAM_AND_ACPI, RAM_ONLY
from kernel.memblock import MAINLINE_MEMBLOCK, V9_MEMBLOCK, MemblockVersion
from kernel.mm_rules import MAINLINE_MM, V9_MM, MmRules


@dataclass(frozen=True, slots=True)
class KernelVersion:
    """Facts of one version; sizes are bytes.

    ``ram_types``: e820 types that count for the end of RAM. ``updates_kexec_table``: setup_data is marked in the kexec
    table, too, and said twice (up to 6.1; e820__reserve_setup_data()). ``removes_efi_mmio``: large MMIO ranges of the
    EFI map leave e820 (6.2). ``trims_numa_to_dram``: node ranges are cut to memblock's memory, and not to page 0 and
    max_pfn (6.12, numa_cleanup_meminfo()). ``node_data``: pg_data_t as alloc_node_data() rounds it.
    ``percpu_static``: the section of per-CPU variables. ``pcpu_chunk``: struct pcpu_chunk with its bitmap of one word.
    ``percpu_cpumasks``: cpumasks beside those of nodes. ``says_freed_efi``: boot services memory is freed with a line.
    ``generic_crashkernel``: the crash kernel's memory is found by code for all architectures, with other words (6.8).
    ``hashes_by_free_memory``: hash tables are sized by what memblock has free (6.10), not by present pages.
    """

    name: str
    memblock: MemblockVersion
    mm_rules: MmRules
    ram_types: Collection[int]
    updates_kexec_table: bool
    removes_efi_mmio: bool
    trims_numa_to_dram: bool
    node_data: int
    percpu_static: int
    pcpu_chunk: int
    percpu_cpumasks: int
    says_freed_efi: bool
    generic_crashkernel: bool
    hashes_by_free_memory: bool

    def efi_minor(self, minor: int) -> str:
        """The minor version of UEFI as it is printed: ``70`` up to 6.1, then ``7``, or ``7.1`` for 71."""
        if self.updates_kexec_table and not self.removes_efi_mmio:
            return f"{minor:02}"
        return f"{minor // 10}.{minor % 10}" if minor % 10 else str(minor // 10)


V6_1 = KernelVersion(
    "6.1", V9_MEMBLOCK, V9_MM, RAM_ONLY, updates_kexec_table=True, removes_efi_mmio=False, trims_numa_to_dram=False,
    node_data=0x2B000, percpu_static=212_992, pcpu_chunk=144, percpu_cpumasks=4, says_freed_efi=False,
    generic_crashkernel=False,
    hashes_by_free_memory=False,
)  # fmt: skip
V6_3 = KernelVersion(
    "6.3", V9_MEMBLOCK, V9_MM, RAM_ONLY, updates_kexec_table=True, removes_efi_mmio=True, trims_numa_to_dram=False,
    node_data=0x2B000, percpu_static=212_992, pcpu_chunk=144, percpu_cpumasks=4, says_freed_efi=False,
    generic_crashkernel=False,
    hashes_by_free_memory=False,
)  # fmt: skip
"""The base of the v9 series; sizes as in 6.1."""
V6_12 = KernelVersion(
    "6.12", MAINLINE_MEMBLOCK, MAINLINE_MM, RAM_AND_ACPI, updates_kexec_table=False, removes_efi_mmio=True,
    trims_numa_to_dram=True,
    node_data=0x2A980, percpu_static=233_472, pcpu_chunk=200, percpu_cpumasks=1, says_freed_efi=True,
    generic_crashkernel=True,
    hashes_by_free_memory=True,
)  # fmt: skip

MAX_NUMNODES = 1 << 10
"""Nodes that a kernel with CONFIG_MAXSMP knows."""
VERSIONS = {version.name: version for version in (V6_1, V6_3, V6_12)}
BY_PROTOCOL = {"v9": V6_3, "mainline": V6_12}
"""The kernel that a protocol of the boot stub belongs to."""


def version_of_release(release: str) -> KernelVersion:
    """The version of ``6.12.117+deb12-cloud-amd64``; one that is not in the table is a ``FormatError``."""
    name = ".".join(release.split(".")[:2])
    if name not in VERSIONS:
        raise FormatError(
            "kernel version", found=release, expected=f"one of {', '.join(VERSIONS)}", source="kernel/version.py"
        )
    return VERSIONS[name]
