"""The TD of a recorded run: our TDX module and host, where they have to be as the recorded mocks were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import RAM_TYPES, MemoryDescriptor
from guest.clock import CostTable, VirtualClock
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.ranges import RangeSet
from guest.registers import Registers
from guest.trace import Trace
from guest.units import SZ_1M
from tdx.cpuid import TSC_HZ
from tdx.events import TdCall
from tdx.leaves import Leaf, SubFunction
from tdx.module import TdConfig, TdxModule
from tdx.sept import LEVEL_1G, LEVEL_2M, LEVEL_SIZE, SecureEpt, SeptState
from tdx.status import TDX_PAGE_ALREADY_ACCEPTED, TDX_PAGE_SIZE_MISMATCH, TDX_SUCCESS
from tdx.vmm import Host

_CPUID_FEATURES, _CPUID_FREQUENCY, _CPUID_TDX = 1, 0x16, 0x21
_TSC_MHZ = TSC_HZ // 1_000_000
NO_RDRAND, NO_MCE_MCA_APIC = (1 << 30, 0), (1 << 21 | 1 << 24, 1 << 7 | 1 << 14 | 1 << 9)
"""Features to hide: bits of ECX and EDX of CPUID 1. An APIC shows in three: as such, as x2APIC, by its TSC deadline."""
_TSC_STEP = 1000
_CONFIG = TdConfig()
_BOOT_CONFIG = TdConfig(gpaw=40, sept_ve_disable=False, flexible_pending_ve=True)
"""The TD of recorded boots. The emulated processor has 40 bits of physical address."""
_TSC0 = 0x1234_5678_9ABC
"""Where the TSC begins in cases that do not say it."""


_OPERANDS: dict[int, Callable[[Registers, Registers], list[Any]]] = {
    Leaf.TDG_VP_INFO: lambda asked, answer: ["TDG.VP.INFO"],
    Leaf.TDG_VM_RD: lambda asked, answer: ["TDG.VM.RD", asked.rdx, answer.r8],
    Leaf.TDG_VM_WR: lambda asked, answer: ["TDG.VM.WR", asked.rdx, asked.r8, asked.r9],
    Leaf.TDG_VP_VMCALL: lambda asked, answer: [_vmcall_name(asked), asked.r12, asked.r13, asked.r14, asked.r15],
}


def _vmcall_name(regs: Registers) -> str:
    known = regs.r10 == 0 and regs.r11 in set(SubFunction)
    return f"TDVMCALL.{SubFunction(regs.r11).name if known else f'{regs.r11:#x}'}"


class RecordedModule(TdxModule):
    """Our TDX module where the recorded one differs.

    There are 1 GiB pages; the processor tells its frequency (CPUID 0x16) and has the features of ``hidden`` less. It
    keeps what it is asked: ``cpuids`` by leaf, and in ``calls`` all TDCALLs but accepts, with their operands.
    """

    def __init__(
        self, physical: PhysicalMemory, sept: SecureEpt, host: Host, max_level: int, tdx: bool, hidden: tuple[int, int],
        config: TdConfig,
    ) -> None:  # fmt: skip
        super().__init__(physical, sept, host, host.trace, host.clock, host.costs, config)
        self._sept_1g, self._host_1g, self._max_level, self._tdx = sept, host, max_level, tdx
        self._hidden_ecx, self._hidden_edx = hidden
        self.cpuids: Counter[int] = Counter()
        self.calls: list[list[Any]] = []
        self.rip: Callable[[], int] = lambda: 0
        """Where the TDCALL stands that is being executed."""

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """As a TD sees it. ``tdx`` is false: nothing says that it is one."""
        self.cpuids[leaf] += 1
        if leaf == _CPUID_TDX and not self._tdx:
            return 0, 0, 0, 0
        if leaf == _CPUID_FREQUENCY:
            return _TSC_MHZ, _TSC_MHZ, 0, 0
        eax, ebx, ecx, edx = super().cpuid(leaf, subleaf)
        if leaf == _CPUID_FEATURES:
            return eax, ebx, ecx & ~self._hidden_ecx, edx & ~self._hidden_edx
        return eax, ebx, ecx, edx

    def tdcall(self, regs: Registers) -> None:
        """TDCALL; what is no accept is written down: name, RIP, operands in, and the value that was read."""
        if regs.rax == Leaf.TDG_MEM_PAGE_ACCEPT or regs.rax not in _OPERANDS:
            super().tdcall(regs)
            return
        leaf, asked = regs.rax, replace(regs)
        super().tdcall(regs)
        name, *operands = _OPERANDS[leaf](asked, regs)
        self.calls.append([name, self.rip(), *operands])

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        """TDCALL; a page of 1 GiB can be accepted if the recorded host has such pages."""
        if regs.rcx & 7 != LEVEL_1G:
            return super().tdcall_run(regs, step, count)
        for done in range(count):
            regs.rax = self._accept_1g(regs.rcx & ~0xFFF)
            self._host_1g.trace.add(TdCall(Leaf.TDG_MEM_PAGE_ACCEPT.spec_name, regs.rcx, regs.rax, 1))
            if regs.rax != TDX_SUCCESS:
                return done
            regs.rcx += step if done < count - 1 else 0
        return count

    def _accept_1g(self, gpa: int) -> int:
        if self._max_level < LEVEL_1G:
            return TDX_PAGE_SIZE_MISMATCH | LEVEL_2M
        end = gpa + LEVEL_SIZE[LEVEL_1G]
        free = all(entry.state is SeptState.FREE for _, _, entry in self._sept_1g.runs(gpa, end))
        if not free or not self._host_1g.ram.covers(gpa, end):
            return TDX_PAGE_ALREADY_ACCEPTED
        self._sept_1g.page_aug(gpa, end, LEVEL_2M)
        self._sept_1g.page_accept(gpa, end, LEVEL_2M)
        return TDX_SUCCESS


class RecordedTd:
    """A TD whose RAM is that of a memory map: accepted, but for what the map calls unaccepted.

    ``tdx_max_level`` is the largest page that can be accepted, ``tdx`` false hides the TD from the guest,
    ``already_accepted`` are ranges of unaccepted memory that need no accept, ``tsc0`` is where the TSC begins.
    ``hidden`` are features that CPUID 1 does not show: no RDRAND, for places by KASLR that can be repeated.
    """

    def __init__(
        self, descriptors: list[MemoryDescriptor], tdx_max_level: int, tdx: bool = True,
        already_accepted: Iterable[Sequence[int]] = (), tsc0: int = _TSC0, hidden: tuple[int, int] = NO_RDRAND,
        config: TdConfig = _CONFIG,
    ) -> None:  # fmt: skip
        self.physical, self.sept = PhysicalMemory(), SecureEpt()
        clock = VirtualClock()
        self.trace = Trace(clock)
        ram = RangeSet((d.start, d.end) for d in descriptors if d.type in RAM_TYPES)
        kind = EfiMemoryType.EfiUnacceptedMemoryType
        self._unaccepted = RangeSet((d.start, d.end) for d in descriptors if d.type == kind)
        level = min(tdx_max_level, LEVEL_2M)
        self.host = Host(self.physical, self.sept, self.trace, clock, CostTable(), ram, level, config.shared_mask)
        self.add_memory(ram, self._unaccepted)
        self.add_memory((start, end) for start, end in already_accepted)
        self.host.finalize()
        self.module = RecordedModule(self.physical, self.sept, self.host, tdx_max_level, tdx, hidden, config)
        self.machine = Machine.build(self.physical, self.module, self.trace, clock)
        self._tsc, self._noise = tsc0, 1
        self.rdtscs = 0

    @classmethod
    def of_boot(cls, case: dict[str, Any]) -> RecordedTd:
        """The TD of a recorded boot to user space; below 1 MiB the kernel looks for tables of a BIOS."""
        descriptors = [MemoryDescriptor(*fields) for fields in case["descs"]]
        td = cls(descriptors, case["tdx_max_level"], tsc0=0, hidden=NO_MCE_MCA_APIC, config=_BOOT_CONFIG)
        td.add_memory([(0, SZ_1M)])
        return td

    def add_memory(self, ranges: Iterable[tuple[int, int]], but: RangeSet | None = None) -> None:
        """Let the guest use ``ranges`` without ``but`` from the start."""
        wanted = RangeSet(ranges)
        for start, end in [*self.sept.mapped(), *(but or ())]:
            wanted.remove(start, end)
        for start, end in wanted:
            self.sept.page_add(start, end)

    def rdtsc(self) -> int:
        """What the recorded processor's TSC reads: 1000 more each time."""
        self.rdtscs += 1
        return self._tsc + self.rdtscs * _TSC_STEP

    def rdrand(self) -> int:
        """The recorded processor has no RDRAND, and CPUID says so."""
        raise ValueError("RDRAND on a processor without it")

    def noisy_rdtsc(self) -> int:
        """The same with noise of up to as much again, or the kernel takes the TSC for no clock."""
        self._noise = self._noise * 1103515245 + 12345 & 0x7FFF_FFFF
        self._tsc += (self._noise >> 16) % _TSC_STEP
        return self.rdtsc()

    def still_pending(self) -> list[list[int]]:
        """What is not accepted of the memory that was unaccepted."""
        pending = self._unaccepted.copy()
        for start, end in self.sept.mapped():
            pending.remove(start, end)
        return [[start, end] for start, end in pending]

    def accepts(self, stage: str | None = None) -> list[list[int]]:
        """The accepts so far, or those of a stage, ``[gpa, level, status, calls]``.

        Those that go on where the last one ended are one.
        """
        out: list[list[int]] = []
        for record in self.trace.records:
            event = record.event
            if not isinstance(event, TdCall) or event.leaf != Leaf.TDG_MEM_PAGE_ACCEPT.spec_name:
                continue
            if stage not in (None, record.stage):
                continue
            gpa, level = event.rcx & ~0xFFF, event.rcx & 7
            last = out[-1] if out else [0, -1, 0, 0]
            if last[1:3] == [level, event.status] and last[0] + last[3] * LEVEL_SIZE[level] == gpa:
                last[3] += event.count
            else:
                out.append([gpa, level, event.status, event.count])
        return out
