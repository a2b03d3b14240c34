"""Protections of the kernel, and what a test takes out of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """Protections of the kernel, each of which can be left out for a test."""

    zeropad_guard: bool = True
    """accept_memory() takes the unit behind a range too, where load_unaligned_zeropad() may read (v9 11/14)."""
    accept_exclusion: bool = True
    """Two CPUs never accept the same unit: v9's spinlock, mainline's list of ranges in flight."""
    reader_filter: bool = True
    """mainline's /proc/kcore and /proc/vmcore leave out unaccepted memory (patches of September 2023)."""
    strict_devmem: bool = True
    """CONFIG_STRICT_DEVMEM: /dev/mem gives no RAM."""
    ranges_in_flight: bool = True
    """mainline holds no lock while it accepts (commit 50e782a86c98, "efi/unaccepted: Fix soft lockups caused by
    parallel memory acceptance"); without it, it accepts as v9 does."""
    overlap_fix: bool = True
    """Ranges in flight that only touch do not wait for each other (commit 01b1e3ca0e5c)."""
    early_accept: bool = True
    """mainline accepts a block at each look at a zone while watermarks are 0 (commit 800f1059c99e, "mm/page_alloc: fix
    memory accept before watermarks gets initialized")."""
    queued_spinlocks: bool = False
    """A spinlock goes to the CPU that has waited longest; without it to any, as the test-and-set lock of a guest does
    (arch/x86/include/asm/qspinlock.h, virt_spin_lock())."""


DEFAULT_BUILD = KernelBuild()
