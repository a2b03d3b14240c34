"""Instructions that leave the guest before they run, as under VMX, in an engine that knows no VMX.

The engine has AMD's SVM instead: in guest mode an intercepted instruction stops with the state from before it, and
the exception hook hears of it under a number of its own. Port I/O alone is never intercepted. There, an I/O breakpoint
that is set while the instruction runs stops right behind it, and what it changed is put back.
Sources: AMD64 Architecture Programmer's Manual volume 2, chapter 15 and appendix C; SDM volume 3, 17.2.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from itertools import chain

from cpu import apic
from cpu.binding import (
    EXCP_VMEXIT,
    RCX,
    RDI,
    RSI,
    SVM_EXIT_CPUID,
    SVM_EXIT_HLT,
    SVM_EXIT_IDTR_WRITE,
    SVM_EXIT_MSR,
    SVM_EXIT_WRITE_DR7,
    Engine,
)
from cpu.build import EngineError
from cpu.exceptions import LinearMemory
from guest.units import PAGE_SIZE
from tdx.msr import NATIVE_READS, NATIVE_WRITES, msr_is_native
from tdx.ve import ExitReason, VeInfo, io_qualification

_LENGTHS = {ExitReason.CPUID: 2, ExitReason.HLT: 1, ExitReason.RDMSR: 2, ExitReason.WRMSR: 2}
_DB = 1
_DR7_FIXED, _DR7_IO_BREAKPOINT_0 = 1 << 10, 0x2_0001

_CONTROL_BLOCK = 1 << 52
"""Where the SVM control block lies: above every address that the guest's page tables can hold."""
_MSR_MAP_POINTER, _MSR_MAP_SIZE = 0x48, 2 * PAGE_SIZE
_MSR_MAP_LOW, _MSR_MAP_HIGH_BASE = 0x2000, 0xC000_0000
"""The map has MSRs below the first, then those from the second on; any other MSR always exits."""


@dataclass(frozen=True, slots=True)
class VeConfig:
    """Which instructions raise #VE, where a TDX module raises it; the others are done without the guest's help.

    ``cpuid`` and ``msr`` raise it for leaves and MSRs that the module leaves to the host. Before the guest has an
    IDT of its own nothing raises #VE: there the firmware's handler would do it.
    """

    cpuid: bool = False
    io: bool = False
    msr: bool = False
    hlt: bool = False

    @property
    def any(self) -> bool:
        return self.cpuid or self.io or self.msr or self.hlt


NO_VE = VeConfig()


@dataclass(frozen=True, slots=True)
class _HeldIo:
    """An I/O instruction under way: what it must not have changed."""

    rip: int
    regs: tuple[int, ...]
    dr: tuple[int, ...]
    port: int
    size: int
    is_in: bool


class InstructionExits:
    """The exits of one engine: HLT and the MSRs of the local APIC always, the others from the first LIDT on."""

    def __init__(self, engine: Engine, memory: LinearMemory, config: VeConfig) -> None:
        self._state, self._memory, self._config = engine.state, memory, config
        self._begun = False
        self._held: _HeldIo | None = None
        self._control = memoryview(mmap.mmap(-1, PAGE_SIZE + _MSR_MAP_SIZE))
        self._control[_MSR_MAP_POINTER : _MSR_MAP_POINTER + 8] = (_CONTROL_BLOCK + PAGE_SIZE).to_bytes(8, "little")
        self._control[PAGE_SIZE:] = _msr_map(others=False)
        engine.map(_CONTROL_BLOCK, self._control)
        begin = [SVM_EXIT_IDTR_WRITE] if config.any else []
        self._state.intercept(_CONTROL_BLOCK, [SVM_EXIT_HLT, SVM_EXIT_MSR, *begin])

    def raises_ve(self, info: VeInfo) -> bool:
        """Whether this exit is to become #VE, or to be done without the guest's help."""
        config, msr = self._config, self._state.regs[RCX] & 0xFFFF_FFFF
        wanted = {
            ExitReason.CPUID: config.cpuid,
            ExitReason.HLT: config.hlt,
            ExitReason.IO_INSTRUCTION: config.io,
            ExitReason.RDMSR: config.msr and not msr_is_native(msr, NATIVE_READS),
            ExitReason.WRMSR: config.msr and not msr_is_native(msr, NATIVE_WRITES),
        }
        return self._begun and wanted[info.exit_reason]

    def hold_io(self, port: int, size: int, is_in: bool) -> bool:
        """An IN or OUT is running. True if it exits: then it must have no effect, and an exit follows at once."""
        if not (self._begun and self._config.io):
            return False
        state = self._state
        self._held = _HeldIo(state.rip, tuple(state.regs), tuple(state.dr), port, size, is_in)
        state.dr[0], state.dr[7] = port, _DR7_FIXED | _DR7_IO_BREAKPOINT_0
        return True

    def caused(self, vector: int) -> bool:
        """Whether the exception hook was called for an exit, and not for an exception of the guest."""
        return vector >= EXCP_VMEXIT or (vector == _DB and self._held is not None)

    def take(self, vector: int) -> VeInfo | None:
        """The instruction that exited, with the state from before it; None if the guest is just to go on."""
        if self._held is not None:
            held, self._held = self._held, None
            return self._take_io(held)
        code = vector - EXCP_VMEXIT
        if code == SVM_EXIT_CPUID:
            return _info(ExitReason.CPUID)
        if code == SVM_EXIT_HLT:
            return _info(ExitReason.HLT)
        if code == SVM_EXIT_MSR:
            return _info(ExitReason.WRMSR if self._state.error_code else ExitReason.RDMSR)
        if code == SVM_EXIT_IDTR_WRITE:
            self._begin()
        elif code == SVM_EXIT_WRITE_DR7:
            self._write_dr7()
        else:
            raise EngineError(f"unicorn: exit {code:#x}, which nothing asked for, at {self._state.rip:#x}")
        return None

    def _begin(self) -> None:
        """The guest is about to load an IDT: let that happen, and let instructions exit from now on."""
        config = self._config
        self._begun = True
        self._control[PAGE_SIZE:] = _msr_map(others=config.msr)
        wanted = {SVM_EXIT_CPUID: config.cpuid, SVM_EXIT_WRITE_DR7: config.io, SVM_EXIT_HLT: True, SVM_EXIT_MSR: True}
        self._state.intercept(_CONTROL_BLOCK, [code for code, exits in wanted.items() if exits], config.io)

    def _take_io(self, held: _HeldIo) -> VeInfo:
        """Put back what the instruction changed. If it moved RSI or RDI it was a string instruction."""
        state = self._state
        length = state.rip - held.rip
        is_string = (state.regs[RSI], state.regs[RDI]) != (held.regs[RSI], held.regs[RDI])
        state.regs[:], state.dr[:], state.rip = list(held.regs), list(held.dr), held.rip
        qualification = io_qualification(held.port, held.size, held.is_in, is_string)
        return VeInfo(ExitReason.IO_INSTRUCTION, qualification, length)

    def _write_dr7(self) -> None:
        """MOV DR7, in the guest's place: the engine would drop the I/O breakpoints. The guest's own do not work."""
        state = self._state
        code = self._memory.read(state.rip, 3)
        rex = code[0] if code[0] & 0xF0 == 0x40 else 0
        if rex:
            code = self._memory.read(state.rip + 1, 3)
        source = code[2] & 7 | (rex & 1) << 3
        state.dr[7] = state.regs[source] & 0xFFFF_FFFF | _DR7_FIXED
        state.rip += 3 + bool(rex)


def _info(reason: ExitReason) -> VeInfo:
    return VeInfo(reason, 0, _LENGTHS[reason])


def _msr_map(others: bool) -> bytes:
    """MSR permission map, two bits each, read and write: the local APIC's exit, and ``others`` that are not native."""
    bits = bytearray((b"\xff" if others else b"\0") * _MSR_MAP_SIZE)
    for native, way in ((NATIVE_READS, 0), (NATIVE_WRITES, 1)):
        for msr in chain.from_iterable(native):
            number = msr if msr < _MSR_MAP_LOW else msr - _MSR_MAP_HIGH_BASE + _MSR_MAP_LOW
            bits[number // 4] &= ~(1 << 2 * (number % 4) + way)
    for msr in apic.MSRS:
        bits[msr // 4] |= 3 << 2 * (msr % 4)
    return bytes(bits)
