"""The TD of a recorded run: our TDX module and host, where they have to be as the recorded mocks were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import RAM_TYPES, MemoryDescriptor
from guest.clock import CostTable, VirtualClock
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.ranges import RangeSet
from guest.registers import Registers
from guest.trace import Trace
from tdx.events import TdCall
from tdx.leaves import Leaf
from tdx.module import TdConfig, TdxModule
from tdx.sept import LEVEL_1G, LEVEL_2M, LEVEL_SIZE, SecureEpt, SeptState
from tdx.status import TDX_PAGE_ALREADY_ACCEPTED, TDX_PAGE_SIZE_MISMATCH, TDX_SUCCESS
from tdx.vmm import Host

_CPUID_FEATURES, _CPUID_TDX = 1, 0x21
_RDRAND = 1 << 30
_TSC_STEP = 1000
_TSC0 = 0x1234_5678_9ABC
"""Where the TSC begins in cases that do not say it."""


class RecordedModule(TdxModule):
    """Our TDX module where the recorded one differs: 1 GiB pages, a processor without RDRAND, counted CPUIDs."""

    def __init__(self, physical: PhysicalMemory, sept: SecureEpt, host: Host, max_level: int, tdx: bool) -> None:
        super().__init__(physical, sept, host, host.trace, host.clock, host.costs, TdConfig())
        self._sept_1g, self._host_1g, self._max_level, self._tdx = sept, host, max_level, tdx
        self.cpuids: Counter[int] = Counter()

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """As a TD sees it. ``tdx`` is false: nothing says that it is one."""
        self.cpuids[leaf] += 1
        if leaf == _CPUID_TDX and not self._tdx:
            return 0, 0, 0, 0
        eax, ebx, ecx, edx = super().cpuid(leaf, subleaf)
        return eax, ebx, ecx & ~_RDRAND if leaf == _CPUID_FEATURES else ecx, edx

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
    """

    def __init__(
        self, descriptors: list[MemoryDescriptor], tdx_max_level: int, tdx: bool = True,
        already_accepted: Iterable[Sequence[int]] = (), tsc0: int = _TSC0,
    ) -> None:  # fmt: skip
        self.physical, self.sept = PhysicalMemory(), SecureEpt()
        clock = VirtualClock()
        self.trace = Trace(clock)
        ram = RangeSet((d.start, d.end) for d in descriptors if d.type in RAM_TYPES)
        kind = EfiMemoryType.EfiUnacceptedMemoryType
        self._unaccepted = RangeSet((d.start, d.end) for d in descriptors if d.type == kind)
        level = min(tdx_max_level, LEVEL_2M)
        self.host = Host(self.physical, self.sept, self.trace, clock, CostTable(), ram, level)
        self.add_memory(ram, self._unaccepted)
        self.add_memory((start, end) for start, end in already_accepted)
        self.host.finalize()
        self.module = RecordedModule(self.physical, self.sept, self.host, tdx_max_level, tdx)
        self.machine = Machine.build(self.physical, self.module, self.trace, clock)
        self._tsc = tsc0
        self.rdtscs = 0

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

    def still_pending(self) -> list[list[int]]:
        """What is not accepted of the memory that was unaccepted."""
        pending = self._unaccepted.copy()
        for start, end in self.sept.mapped():
            pending.remove(start, end)
        return [[start, end] for start, end in pending]

    def accepts(self) -> list[list[int]]:
        """The accepts so far, ``[gpa, level, status, calls]``; those that go on where the last one ended are one."""
        out: list[list[int]] = []
        for record in self.trace.records:
            event = record.event
            if not isinstance(event, TdCall) or event.leaf != Leaf.TDG_MEM_PAGE_ACCEPT.spec_name:
                continue
            gpa, level = event.rcx & ~0xFFF, event.rcx & 7
            last = out[-1] if out else [0, -1, 0, 0]
            if last[1:3] == [level, event.status] and last[0] + last[3] * LEVEL_SIZE[level] == gpa:
                last[3] += event.count
            else:
                out.append([gpa, level, event.status, event.count])
        return out
