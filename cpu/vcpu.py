"""A vCPU: real x86-64 machine code on the guest's own memory, firmware services and TDX module.

The code runs on the same bytes as our own stages, and meets the same platform: memory is mapped into the engine
only when the platform admits the access, TDCALL goes to the TDX module with the real registers, and a call
through a firmware table arrives at the same call gate.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from cpu import apic
from cpu.binding import RAX, RBX, RCX, RDX, REGISTER_ORDER, RSP, Engine
from cpu.exceptions import NAMES, WITH_ERROR_CODE, deliver
from cpu.exits import NO_VE, InstructionExits, VeConfig
from cpu.interrupts import Interrupts
from cpu.paging import translate
from guest.gates import CallGate
from guest.machine import Machine
from guest.memory import AccessKind, PhysicalMemory
from guest.ranges import RangeSet
from guest.registers import Registers
from guest.units import PAGE_SIZE, SZ_64M, U64_MAX, round_down, round_up
from tdx.instructions import Ports
from tdx.module import TdxModule
from tdx.ve import ExitReason, VeInfo

_TDCALL = b"\x66\x0f\x01\xcc"
_PIECE = SZ_64M
_ADDRESS_BITS = 40
"""Of physical addresses in the engine. The highest is a TD's shared bit: shared memory has bytes of its own."""
_SHADOW_SPACE = 0x28
"""Return address and home space before the fifth argument (Microsoft x64 convention)."""
_MSR_EFER, _MSR_STAR, _MSR_LSTAR, _MSR_FMASK = 0xC000_0080, 0xC000_0081, 0xC000_0082, 0xC000_0084
_CR0 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1  # PG WP NE ET MP PE
_CR4 = 1 << 5 | 1 << 9 | 1 << 10  # PAE OSFXSR OSXMMEXCPT
_PF, _PF_WRITE = 14, 1 << 1
_TSC_START_BITS = 40
_TSC_STEP_NS, _TSC_NOISE_NS = 25, 16
"""Time between two reads of the TSC. Without noise, the kernel's jitter entropy source never believes it."""


class Vcpu:
    """One processor of the machine. ``physical`` are the bytes, which only the mapping of admitted memory uses.

    ``devices`` answer IN and OUT that do not raise #VE. ``ve`` needs a machine on a TDX module. ``seed`` decides what
    RDRAND and RDSEED give, and where the TSC begins.
    """

    def __init__(
        self, machine: Machine, physical: PhysicalMemory, devices: Ports, ve: VeConfig = NO_VE, seed: int = 0
    ) -> None:
        if ve.any and not isinstance(machine.platform, TdxModule):
            raise ValueError("#VE needs a machine on a TDX module")
        self._machine, self._physical, self._devices = machine, physical, devices
        self.engine = Engine(seed)
        self.state = self.engine.state
        self._mapped = RangeSet()
        self._address_mask = (1 << _ADDRESS_BITS) - PAGE_SIZE
        self.exceptions: dict[int, int] = {}
        self.ve_reasons: dict[ExitReason, int] = {}
        """Number of #VE so far by exit reason."""
        self._exits = InstructionExits(self.engine, self, ve)
        self._noise = 1
        tsc_start = Random(f"TSC {seed}").getrandbits(_TSC_START_BITS)
        self.interrupts = Interrupts(machine, self.state, self._enter, tsc_start)
        self.tsc: Callable[[], int] = self._virtual_tsc
        """What RDTSC reads."""
        self.breakpoints: dict[int, Callable[[], None]] = {}
        self._install_hooks()

    def start(self, regs: Registers) -> None:
        """Enter long mode with paging on, as UEFI leaves a processor, with the registers of ``regs``."""
        uc, const = self.engine.uc, self.engine.const
        self._map_around(regs.cr3, 2 * PAGE_SIZE, "read")  # a page walk asks no hook
        uc.reg_write(const.UC_X86_REG_CR3, regs.cr3)
        uc.reg_write(const.UC_X86_REG_CR4, _CR4)
        uc.msr_write(_MSR_EFER, 0xD01)  # SCE, LME, LMA, NXE
        uc.reg_write(const.UC_X86_REG_CR0, _CR0)
        for number, name in enumerate(REGISTER_ORDER):
            self.state.regs[number] = getattr(regs, name)

    def run(self, rip: int) -> None:
        """Run from ``rip`` until a hook stops it."""
        self.engine.run(rip)

    def registers(self) -> Registers:
        """The registers as they are now."""
        values = {name: self.state.regs[number] for number, name in enumerate(REGISTER_ORDER)}
        return Registers(**values, rip=self.state.rip, cr3=self.state.cr[3])

    def forget(self, start: int, end: int) -> None:
        """Take ``[start, end)`` out of the engine: the next access asks the platform again."""
        for low, high in list(self._mapped.within(start, end)):
            self.engine.unmap(low, high - low)
            self._mapped.remove(low, high)

    def break_at(self, linear: int, action: Callable[[], None]) -> None:
        """Call ``action`` whenever the instruction at ``linear`` is about to run."""
        self.breakpoints[linear] = action
        self.engine.uc.hook_add(self.engine.unicorn.UC_HOOK_CODE, self._on_code, begin=linear, end=linear)

    def return_from_function(self, value: int) -> None:
        """Make the function that was just entered return ``value``."""
        stack = self.state.regs[RSP]
        self.state.regs[RAX] = value
        self.state.regs[RSP] = stack + 8
        self.jump(int.from_bytes(self.read(stack, 8), "little"))

    def page_fault(self, linear: int) -> None:
        """Go on as if the instruction that is about to run had written to ``linear`` and found no page there."""
        self.state.cr[2], self.state.error_code = linear, _PF_WRITE
        self._deliver(_PF)
        self.jump(self.state.rip)

    def jump(self, rip: int) -> None:
        """Go on at ``rip``."""
        self.engine.uc.reg_write(self.engine.const.UC_X86_REG_RIP, rip)

    # Memory by linear address, for what the processor itself reads and writes

    def read(self, linear: int, size: int) -> bytes:
        """The bytes at ``linear``; what crosses a page is read page by page."""
        out = b""
        while size:
            piece = min(size, PAGE_SIZE - linear % PAGE_SIZE)
            out += self._machine.memory.read(self._physical_address(linear), piece)
            linear, size = linear + piece, size - piece
        return out

    def write(self, linear: int, data: bytes) -> None:
        """Store ``data`` at ``linear``."""
        while data:
            piece = min(len(data), PAGE_SIZE - linear % PAGE_SIZE)
            self._machine.memory.write(self._physical_address(linear), data[:piece])
            linear, data = linear + piece, data[piece:]

    def peek(self, linear: int, size: int) -> bytes:
        """The bytes at ``linear`` for a look from outside: no gate, and it ends where nothing is mapped."""
        out = b""
        while size:
            piece = min(size, PAGE_SIZE - linear % PAGE_SIZE)
            gpa = translate(self._physical.read, self.state.cr[3], linear, self._address_mask)
            if gpa is None:
                break
            out += self._physical.read(gpa, piece)
            linear, size = linear + piece, size - piece
        return out

    def _physical_address(self, linear: int) -> int:
        gpa = translate(self._physical.read, self.state.cr[3], linear, self._address_mask)
        if gpa is None:
            raise self._machine.panic(f"the processor's own access to {linear:#x}, which is not mapped: triple fault")
        return gpa

    # Hooks

    def _install_hooks(self) -> None:
        uc, unicorn, x86 = self.engine.uc, self.engine.unicorn, self.engine.const
        uc.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, self._on_unmapped)
        uc.hook_add(unicorn.UC_HOOK_INSN_INVALID, self._on_invalid)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._on_exception)
        uc.hook_add(unicorn.UC_HOOK_INSN, self._on_in, aux1=x86.UC_X86_INS_IN)
        uc.hook_add(unicorn.UC_HOOK_INSN, self._on_out, aux1=x86.UC_X86_INS_OUT)
        uc.hook_add(unicorn.UC_HOOK_INSN, self._on_syscall, aux1=x86.UC_X86_INS_SYSCALL)
        self.engine.hook_insn(x86.UC_X86_INS_CPUID, self._on_cpuid)
        self.engine.hook_insn(x86.UC_X86_INS_RDTSC, self._on_rdtsc)
        self.engine.hook_insn(x86.UC_X86_INS_RDTSCP, self._on_rdtsc)

    def _on_unmapped(self, uc: Any, access: int, gpa: int, size: int, value: int, data: Any) -> bool:
        """The engine does not know this memory yet: ask the platform, and map what it admits."""
        reads = (self.engine.unicorn.UC_MEM_READ_UNMAPPED, self.engine.unicorn.UC_MEM_FETCH_UNMAPPED)
        self._map_around(gpa, max(size, 1), "read" if access in reads else "write")
        return True

    def _map_around(self, gpa: int, size: int, kind: AccessKind) -> None:
        """Map the memory around an access, as far as the platform admits it, in pieces of 64 MiB at most."""
        start, end = self._machine.platform.admit(gpa, size, kind)
        low, high = max(start, round_down(gpa, _PIECE)), min(end, round_up(gpa + size, _PIECE))
        for gap in list(self._mapped.gaps(low, high)):
            for first, last in self._physical.pieces(gap.start, gap.end):
                self.engine.map(first, self._physical.view(first, last - first))
                self._mapped.add(first, last)

    def _on_invalid(self, uc: Any, data: Any) -> bool:
        """An instruction that the engine does not know: TDCALL, a call gate, or a real #UD."""
        rip = self.state.rip
        gate = self._machine.gates.at(rip)
        if gate is not None:
            self._call_gate(rip, gate)
        elif self.read(rip, len(_TDCALL)) == _TDCALL:
            self._tdcall()
            self.state.rip = rip + len(_TDCALL)
        else:
            self._deliver(6)
        return True

    def _call_gate(self, address: int, gate: CallGate) -> None:
        regs, stack = self.state.regs, self.state.regs[RSP]
        in_registers = (regs[RCX], regs[RDX], regs[8], regs[9])

        def argument(number: int) -> int:
            if number < len(in_registers):
                return in_registers[number]
            return int.from_bytes(self.read(stack + _SHADOW_SPACE + 8 * (number - len(in_registers)), 8), "little")

        self._machine.caller = self
        try:
            regs[RAX] = self._machine.call(address, *gate.arguments(argument))
        finally:
            self._machine.caller = self._machine.memory
        self.state.rip = int.from_bytes(self.read(stack, 8), "little")
        regs[RSP] = stack + 8

    def _tdcall(self) -> None:
        values = self.state.regs
        regs = Registers(**{name: values[number] for number, name in enumerate(REGISTER_ORDER)})
        self.interrupts.pass_time()
        self._machine.platform.tdcall(regs)
        for number, name in enumerate(REGISTER_ORDER):
            values[number] = getattr(regs, name) & U64_MAX

    def _on_exception(self, uc: Any, vector: int, data: Any) -> None:
        if not self._exits.caused(vector):
            self._deliver(vector)
            return
        info = self._exits.take(vector)
        if info is not None:
            self._on_exit(info)

    def _on_exit(self, info: VeInfo) -> None:
        """An instruction exited: it raises #VE, or is done without the guest's help."""
        module = self._machine.platform
        if not self._exits.raises_ve(info):
            self._do(info)
            return
        assert isinstance(module, TdxModule)
        if info.exit_reason is ExitReason.CPUID and module.cpuid_is_native(*self._cpuid_operands(), self.state.cpl):
            self._on_cpuid()
            self.state.rip += info.instruction_length
            return
        self.ve_reasons[info.exit_reason] = self.ve_reasons.get(info.exit_reason, 0) + 1
        self.state.error_code = 0  # of #DF
        self._deliver(module.inject_ve(info))

    def _do(self, info: VeInfo) -> None:
        """HLT, or RDMSR or WRMSR of the local APIC."""
        if info.exit_reason is not ExitReason.HLT:
            self._access_msr(info)
            return
        self.state.rip += info.instruction_length
        if self.interrupts.started:
            self.interrupts.halt()
        else:
            self.engine.stop()

    def _access_msr(self, info: VeInfo) -> None:
        """What the local APIC refuses is #GP. What it does not know reads as 0: so the engine itself has it."""
        regs = self.state.regs
        index, is_write = regs[RCX] & 0xFFFF_FFFF, info.exit_reason is ExitReason.WRMSR
        value: int | None = 0
        if index in apic.MSRS and is_write:
            operand = (regs[RDX] & 0xFFFF_FFFF) << 32 | regs[RAX] & 0xFFFF_FFFF
            value = 0 if self.interrupts.wrmsr(index, operand) else None
        elif index in apic.MSRS:
            value = self.interrupts.rdmsr(index)
        if value is None:
            self.state.error_code = 0
            self._deliver(13)
            return
        if not is_write:
            regs[RAX], regs[RDX] = value & 0xFFFF_FFFF, value >> 32
        self.state.rip += info.instruction_length

    def _deliver(self, vector: int) -> None:
        self.exceptions[vector] = self.exceptions.get(vector, 0) + 1
        if self.state.table_base("idt") == 0:
            name = NAMES.get(vector, f"exception {vector}")
            raise self._machine.panic(f"{name} at {self.state.rip:#x}, cr2={self.state.cr[2]:#x}, and no IDT")
        self._enter(vector, self.state.error_code if vector in WITH_ERROR_CODE else None)

    def _enter(self, vector: int, error_code: int | None = None) -> None:
        """Enter the guest's handler of ``vector``."""
        rflags = self.engine.uc.reg_read(self.engine.const.UC_X86_REG_EFLAGS)
        deliver(self.state, self, vector, rflags, error_code)

    def _on_in(self, uc: Any, port: int, size: int, data: Any) -> int:
        return 0 if self._exits.hold_io(port, size, is_in=True) else self._devices.read(port, size)

    def _on_out(self, uc: Any, port: int, size: int, value: int, data: Any) -> None:
        if not self._exits.hold_io(port, size, is_in=False):
            self._devices.write(port, size, value)

    def _on_cpuid(self) -> int:
        regs = self.state.regs
        leaf = self._machine.platform.cpuid(*self._cpuid_operands())
        regs[RAX], regs[RBX], regs[RCX], regs[RDX] = leaf
        return 1

    def _cpuid_operands(self) -> tuple[int, int]:
        return self.state.regs[RAX] & 0xFFFF_FFFF, self.state.regs[RCX] & 0xFFFF_FFFF

    def _on_rdtsc(self) -> int:
        tsc = self.tsc()
        self.state.regs[RAX], self.state.regs[RDX] = tsc & 0xFFFF_FFFF, tsc >> 32 & 0xFFFF_FFFF
        return 1

    def _virtual_tsc(self) -> int:
        self._noise = self._noise * 1103515245 + 12345 & 0x7FFF_FFFF
        self.interrupts.pass_time(_TSC_STEP_NS + (self._noise >> 16) % _TSC_NOISE_NS)
        return self.interrupts.apic.tsc()

    def _on_syscall(self, uc: Any, data: Any) -> None:
        """SYSCALL: the engine leaves the change of rings to us, and adds 2 to RIP afterwards."""
        state, regs = self.state, self.state.regs
        rflags = uc.reg_read(self.engine.const.UC_X86_REG_EFLAGS)
        selector = uc.msr_read(_MSR_STAR) >> 32 & 0xFFFC
        regs[RCX], regs[11] = state.rip + 2, rflags
        state.rflags &= ~uc.msr_read(_MSR_FMASK)
        state.set_segment("cs", selector, 0, 0xFFFF_FFFF, 0x00AF_9B00)
        state.set_segment("ss", selector + 8, 0, 0xFFFF_FFFF, 0x00CF_9300)
        state.cpl = 0
        state.rip = uc.msr_read(_MSR_LSTAR) - 2

    def _on_code(self, uc: Any, address: int, size: int, data: Any) -> None:
        action = self.breakpoints.get(address)
        if action is not None:
            action()
