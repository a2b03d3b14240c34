"""What a kernel is built from, and what a test takes out of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """A kernel's source, ``mainline`` (6.12) or v9, and its protections, each of which can be left out for a test.

    ``zeropad_guard``: accept_memory() takes the unit behind a range too (v9 11/14). ``accept_exclusion``: two CPUs
    never accept the same unit: v9's spinlock, mainline's list of ranges. ``reader_filter``: mainline's /proc/kcore
    and /proc/vmcore leave out unaccepted memory (patches of September 2023). ``strict_devmem``: CONFIG_STRICT_DEVMEM,
    /dev/mem gives no RAM. ``ranges_in_flight``: mainline accepts without the lock held (commit 50e782a86c98, "efi/unaccepted: Fix
    soft lockups caused by parallel memory acceptance"); without it, as v9 does. ``overlap_fix``: ranges that only touch
    do not wait for each other (commit 01b1e3ca0e5c, "... off-by-one when checking for overlapping ranges").
    ``queued_spinlocks``: a spinlock goes to the CPU that has waited longest; without it, to
    any, as with the test-and-set lock that a guest has (arch/x86/include/asm/qspinlock.h, virt_spin_lock()).
    """

    mainline: bool = False
    zeropad_guard: bool = True
    accept_exclusion: bool = True
    reader_filter: bool = True
    strict_devmem: bool = True
    ranges_in_flight: bool = True
    overlap_fix: bool = True
    queued_spinlocks: bool = False
