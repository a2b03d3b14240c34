"""The guest's side of TDX: finding out that this is a TD, and accepting memory.

One loop for firmware, EFI stub, decompressor and kernel, as in Linux (arch/x86/coco/tdx/tdx-shared.c, which the
boot stub includes). The calls are those that the loop would make page by page; equal ones go out as one run.
"""

from __future__ import annotations

from collections.abc import Callable

from guest.machine import Machine
from guest.registers import Registers
from guest.units import round_up
from tdx.leaves import EXPOSE_R10_R15, Leaf, SubFunction, VmCallStatus
from tdx.sept import LEVEL_1G, LEVEL_2M, LEVEL_4K, LEVEL_SIZE

TDX_CPUID_LEAF_ID = 0x21
TDX_IDENT = b"IntelTDX    "
MAX_RETRIES_PER_PAGE = 3
"""Answers of RETRY without progress after which mainline gives up."""


def tdx_guest_detected(machine: Machine) -> bool:
    """True if CPUID says that this is a TD (arch/x86/boot/compressed/tdx.c, early_tdx_detect())."""
    if machine.platform.cpuid(0)[0] < TDX_CPUID_LEAF_ID:
        return False
    _, ebx, ecx, edx = machine.platform.cpuid(TDX_CPUID_LEAF_ID)
    return b"".join(reg.to_bytes(4, "little") for reg in (ebx, edx, ecx)) == TDX_IDENT


def tdx_cc_mask(machine: Machine) -> int:
    """The shared bit, from TDG.VP.INFO: the highest bit of the guest physical address width."""
    regs = Registers(rax=Leaf.TDG_VP_INFO)
    machine.platform.tdcall(regs)
    return 1 << (regs.rcx & 0x3F) - 1


def tdx_map_gpa_v9(machine: Machine, start: int, end: int) -> bool:
    """One TDG.VP.VMCALL<MapGPA> for the whole range, without a retry, as v9 does; True if it succeeded."""
    return _map_gpa(machine, start, end)[0] == VmCallStatus.SUCCESS


def tdx_map_gpa(machine: Machine, start: int, end: int) -> bool:
    """MapGPA as mainline does since 6.7: where the host says RETRY, go on from the address in R11.

    False if the host refused, if R11 is outside what is left, or after three answers in a row without progress.
    Source: arch/x86/coco/tdx/tdx.c, tdx_map_gpa().
    """
    retries = 0
    while retries < MAX_RETRIES_PER_PAGE:
        status, failed_at = _map_gpa(machine, start, end)
        if status != VmCallStatus.RETRY:
            return status == VmCallStatus.SUCCESS
        if not start <= failed_at < end:
            return False
        retries = retries + 1 if failed_at == start else 0
        start = failed_at
    return False


def _map_gpa(machine: Machine, start: int, end: int) -> tuple[int, int]:
    """One MapGPA: R10 and R11."""
    regs = Registers(rax=Leaf.TDG_VP_VMCALL, rcx=EXPOSE_R10_R15, r11=SubFunction.MapGPA, r12=start, r13=end - start)
    machine.platform.tdcall(regs)
    return (regs.rax or regs.r10), regs.r11


def tdx_accept_memory_v9(machine: Machine, start: int, end: int) -> bool:
    """Ask the host to make ``[start, end)`` private, then accept it: 1 GiB, else 2 MiB, else 4 KiB pages.

    False if the host refused or a 4 KiB page was refused. Source: v9 14/14, tdx_accept_memory().
    """
    return tdx_map_gpa_v9(machine, start, end) and tdx_accept_memory(machine, start, end)


def tdx_accept_memory(machine: Machine, start: int, end: int) -> bool:
    """Accept ``[start, end)`` without asking the host first, as mainline does (arch/x86/coco/tdx/tdx-shared.c)."""
    return accept_pages(machine, start, end, (LEVEL_1G, LEVEL_2M, LEVEL_4K))


def accept_pages(machine: Machine, start: int, end: int, levels: tuple[int, ...]) -> bool:
    """Accept ``[start, end)`` with the largest page that fits, trying ``levels`` from left to right.

    After each page the largest level is tried first again; a refusal, whatever its status, falls to the next
    level at the same place. False if the last level was refused; what came before stays accepted.
    """
    gpa = start
    while gpa < end:
        for at, level in enumerate(levels):
            count = _tries(gpa, end, level, levels[at - 1] if at else None)
            if count == 0:
                continue
            regs = Registers(rax=Leaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa | level)
            done = machine.platform.tdcall_run(regs, LEVEL_SIZE[level], count)
            gpa += done * LEVEL_SIZE[level]
            if done == count:
                break
        else:
            return False
    return True


def _tries(gpa: int, end: int, level: int, larger: int | None) -> int:
    """How many pages of ``level`` come one after the other before a ``larger`` page would be tried again."""
    size = LEVEL_SIZE[level]
    if gpa % size or end - gpa < size:
        return 0
    if larger is not None:
        turn = round_up(gpa + 1, LEVEL_SIZE[larger])
        if end - turn >= LEVEL_SIZE[larger]:
            return (turn - gpa) // size
    return (end - gpa) // size


class PlatformAccept:
    """``__accept_memory()`` of one stage: it finds out at its first use which platform it runs on.

    ``accept`` is v9's way or mainline's; what the stage says when it fails goes with it.
    Sources: v9 08/14 and 14/14, arch/x86/boot/compressed/mem.c and arch/x86/mm/unaccepted_memory.c.
    """

    def __init__(self, machine: Machine, accept: Callable[[Machine, int, int], bool] = tdx_accept_memory_v9) -> None:
        self._machine = machine
        self._accept = accept
        self._tdx: bool | None = None

    def __call__(self, start: int, end: int) -> None:
        """Accept ``[start, end)``, or stop the stage with the kernel's words."""
        if self._tdx is None:
            self._tdx = tdx_guest_detected(self._machine)
            if self._tdx:
                tdx_cc_mask(self._machine)
        if not self._tdx:
            raise self._machine.panic("Cannot accept memory: unknown platform")
        if not self._accept(self._machine, start, end):
            v9 = self._accept is tdx_accept_memory_v9
            text = f"Accepting memory failed: {start:#x}-{end:#x}" if v9 else "TDX: Failed to accept memory"
            raise self._machine.panic(text)
