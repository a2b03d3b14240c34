"""Unicorn, and the cures for what its binding cannot do. What depends on its build is here, in ``cpu.build`` and in
``cpu.rdrand``.

Unicorn 2.1.4 delivers no exception through the IDT, keeps a stale ``old_exception`` that turns the second page
fault into a double fault, and a stale ``exception_is_int`` that sends the first intercepted instruction after an INT3
back behind it, has no hook for RDTSC in Python, and is slow to read registers. The cure for all of them is to read
and write the CPU's state directly. Where it lies is found when an engine is made; what lies where
in it is known for one version, and checked before the engine is used.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from typing import Any

from cpu.build import KNOWN_VERSION, EngineError, find_register, import_unicorn
from cpu.rdrand import RandomNumbers, first_number

# struct CPUX86State of unicorn 2.1.4, x86-64 Linux: offsets in bytes
_REGS, _RIP, _RFLAGS, _HFLAGS, _SEGMENTS = 0, 128, 136, 176, 184
_TR, _GDT, _IDT, _CR = 352, 376, 400, 424
_ERROR_CODE, _IS_INT, _DR, _OLD_EXCEPTION = 5384, 5388, 5400, 5496
_VM_VMCB, _INTERCEPT, _INTERCEPT_DR_WRITE = 5504, 5520, 5534
_SEGMENT = struct.Struct("<IIQII")
_SEGMENT_ORDER = ("es", "cs", "ss", "ds", "fs", "gs")
_NO_EXCEPTION = -1
_CPL_MASK = 3
_HF_INHIBIT_IRQ, _HF_GUEST, _HF_IO_BREAKPOINTS = 1 << 3, 1 << 21, 1 << 24
_DR6_INIT, _DR7_INIT = 0xFFFF_0FF0, 0x400
_INT3, _BP = b"\xcc", 3
_RDRAND = b"\x48\x0f\xc7\xf0"  # rdrand rax
_TEST_CPUID, _TEST_TABLES, _UNMAPPED = 0x100, 0x1000, 0x12_3000

# What the exception hook gets for an intercepted instruction: EXCP_VMEXIT + exit code of SVM
EXCP_VMEXIT = 0x100
_SVM_EXIT_WRITE_DR0, _SVM_EXIT_INTR = 0x30, 0x60
SVM_EXIT_WRITE_DR7, SVM_EXIT_IDTR_WRITE, SVM_EXIT_CPUID, SVM_EXIT_HLT, SVM_EXIT_MSR = 0x37, 0x6A, 0x72, 0x78, 0x7C

REGISTER_ORDER = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)


class CpuState:
    """The emulated CPU's state in host memory: read and written in place, also from within hooks."""

    def __init__(self, address: int) -> None:
        self.regs = (ctypes.c_uint64 * 16).from_address(address + _REGS)
        """RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15."""
        self._rip = ctypes.c_uint64.from_address(address + _RIP)
        self.rflags_address = address + _RFLAGS
        self._rflags = ctypes.c_uint64.from_address(self.rflags_address)
        self._hflags = ctypes.c_uint32.from_address(address + _HFLAGS)
        self._segments = (ctypes.c_char * (_SEGMENT.size * 6)).from_address(address + _SEGMENTS)
        self._tables = {
            name: (ctypes.c_char * _SEGMENT.size).from_address(address + offset)
            for name, offset in (("tr", _TR), ("gdt", _GDT), ("idt", _IDT))
        }
        self.cr = (ctypes.c_uint64 * 5).from_address(address + _CR)
        self._error_code = ctypes.c_int32.from_address(address + _ERROR_CODE)
        self._is_int = ctypes.c_int32.from_address(address + _IS_INT)
        self.dr = (ctypes.c_uint64 * 8).from_address(address + _DR)
        self._old_exception = ctypes.c_int32.from_address(address + _OLD_EXCEPTION)
        self._vm_vmcb = ctypes.c_uint64.from_address(address + _VM_VMCB)
        self._intercept = ctypes.c_uint64.from_address(address + _INTERCEPT)
        self._intercept_dr_write = ctypes.c_uint16.from_address(address + _INTERCEPT_DR_WRITE)

    @property
    def rip(self) -> int:
        return self._rip.value

    @rip.setter
    def rip(self, value: int) -> None:
        self._rip.value = value

    @property
    def rflags(self) -> int:
        """RFLAGS without the lazily kept condition codes; those come through the binding."""
        return self._rflags.value

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._rflags.value = value

    @property
    def error_code(self) -> int:
        """Error code of the exception that a hook is told of."""
        return self._error_code.value

    @error_code.setter
    def error_code(self, value: int) -> None:
        self._error_code.value = value

    @property
    def old_exception(self) -> int:
        return self._old_exception.value

    def forget_exception(self) -> None:
        """An exception was delivered: the next one is a first one again, and an exit after INT3 is no INT3."""
        self._old_exception.value = _NO_EXCEPTION
        self._is_int.value = 0

    @property
    def cpl(self) -> int:
        return self._hflags.value & _CPL_MASK

    @cpl.setter
    def cpl(self, value: int) -> None:
        self._hflags.value = self._hflags.value & ~_CPL_MASK | value

    @property
    def in_shadow(self) -> bool:
        """Whether the instruction before was STI or MOV SS, which keep interrupts off for one more instruction."""
        return bool(self._hflags.value & _HF_INHIBIT_IRQ)

    @in_shadow.setter
    def in_shadow(self, value: bool) -> None:
        self._hflags.value = self._hflags.value & ~_HF_INHIBIT_IRQ | (_HF_INHIBIT_IRQ if value else 0)

    def intercept(self, control_block: int, exits: Iterable[int], io_breakpoints: bool = False) -> None:
        """Run as a guest of SVM from now on, with intercepts for these exit codes and no others.

        With ``io_breakpoints``, IN and OUT look at the I/O breakpoints in ``dr``.
        """
        codes = tuple(exits)
        self._vm_vmcb.value = control_block
        self._intercept.value = sum(1 << code - _SVM_EXIT_INTR for code in codes if code >= _SVM_EXIT_INTR)
        self._intercept_dr_write.value = sum(1 << code - _SVM_EXIT_WRITE_DR0 for code in codes if code < _SVM_EXIT_INTR)
        flags = self._hflags.value & ~_HF_IO_BREAKPOINTS | _HF_GUEST
        self._hflags.value = flags | _HF_IO_BREAKPOINTS if io_breakpoints else flags

    def table_base(self, name: str) -> int:
        """Base of ``tr``, ``gdt`` or ``idt``."""
        base: int = _SEGMENT.unpack(self._tables[name].raw)[2]
        return base

    def segment(self, name: str) -> tuple[int, int, int, int]:
        """Selector, base, limit and flags of a segment register."""
        at = _SEGMENT_ORDER.index(name) * _SEGMENT.size
        selector, _, base, limit, flags = _SEGMENT.unpack_from(self._segments.raw, at)
        return selector, base, limit, flags

    def set_segment(self, name: str, selector: int, base: int, limit: int, flags: int) -> None:
        """Load a segment register without the checks that a load by the guest would get."""
        at = _SEGMENT_ORDER.index(name) * _SEGMENT.size
        _SEGMENT.pack_into(self._segments, at, selector, 0, base, limit, flags)


class Engine:
    """An x86-64 Unicorn engine with its CPU state laid open. ``seed`` decides what RDRAND and RDSEED give."""

    def __init__(self, seed: int = 0) -> None:
        self.unicorn = import_unicorn()
        self.const = self.unicorn.x86_const
        self.uc = self.unicorn.Uc(self.unicorn.UC_ARCH_X86, self.unicorn.UC_MODE_64)
        self.uc.ctl_set_cpu_model(self.const.UC_CPU_X86_SKYLAKE_SERVER)  # pages of 1 GiB, SMEP, SMAP
        self.state = CpuState(find_register(self.uc, self.const.UC_X86_REG_R15) - _REGS - 15 * 8)
        self._random = RandomNumbers(seed)
        self._hooks: list[object] = []
        """What the library calls: it must live as long as the engine."""

    def run(self, rip: int) -> None:
        """Run from ``rip`` until a hook stops the engine. What a hook raised comes out here."""
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        self.state.forget_exception()
        try:
            with self._random:
                self.uc.emu_start(rip, 0)
        except self.unicorn.UcError as error:
            if self.uc._hook_exception is not None:
                raise self.uc._hook_exception from None
            raise EngineError(f"unicorn: {error}, at {self.state.rip:#x}") from error

    def stop(self) -> None:
        """Stop after the hook that calls this."""
        self.uc.emu_stop()

    def go_on(self) -> None:
        """Leave the basic block that a hook is called for, and go on with the state as the hook has set it."""
        self.uc.reg_write(self.const.UC_X86_REG_RIP, self.state.rip)

    def map(self, gpa: int, view: memoryview) -> None:
        """Let the guest see ``view``, whole pages, at ``gpa``; the bytes are shared, not copied."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        self.uc.mem_map_ptr(gpa, len(view), self.unicorn.UC_PROT_ALL, address)

    def unmap(self, gpa: int, size: int) -> None:
        """Let the guest no longer see ``[gpa, gpa + size)``, all of it mapped."""
        self.uc.mem_unmap(gpa, size)

    def guarded(self, function: Callable[[], Any]) -> Callable[..., Any]:
        """``function`` without arguments as a callback for C, which no exception may enter.

        What it raises stops the engine and comes out of :meth:`run`, as with the binding's own hooks.
        """

        def guard(*_: object) -> Any:
            try:
                return function()
            except BaseException as error:
                self.uc._hook_exception = self.uc._hook_exception or error
                self.uc.emu_stop()
                return 1

        return guard

    def hook_insn(self, instruction: int, callback: Callable[[], int]) -> None:
        """Call ``callback`` instead of each CPUID, RDTSC or RDTSCP; it returns 1 if it did the instruction's work.

        The binding has such hooks for CPUID only; the library treats the three alike.
        """
        function = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p)(self.guarded(callback))
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
        self.hook_native(function, self.unicorn.UC_HOOK_INSN, address, 0, instruction)

    def hook_native(
        self, owner: object, kind: int, function: int, user_data: int, *arguments: int, begin: int = 1, end: int = 0
    ) -> None:
        """Hook the machine code at ``function``; see uc_hook_add() in unicorn.h. It is for all addresses by default.

        The code and ``user_data`` belong to ``owner``, which the engine keeps.
        """
        from unicorn.unicorn_py3.unicorn import uclib

        handle = ctypes.c_size_t()
        status = uclib.uc_hook_add(
            self.uc._uch, ctypes.byref(handle), kind, ctypes.c_void_p(function), ctypes.c_void_p(user_data),
            ctypes.c_uint64(begin), ctypes.c_uint64(end), *(ctypes.c_int(argument) for argument in arguments),
        )  # fmt: skip
        if status != self.unicorn.UC_ERR_OK:
            raise EngineError(f"unicorn: hook of kind {kind} refused with status {status}")
        self._hooks.append(owner)


def self_test() -> None:
    """Run a page fault, INT3, RDRAND and an intercepted CPUID through a small engine: is its build as these files say?

    Raises ``EngineError`` with the version that is known.
    """
    engine = Engine()
    seen: list[tuple[int, int, int]] = []
    code = b"\x48\xa1" + _UNMAPPED.to_bytes(8, "little")  # mov rax, [address]
    engine.uc.mem_map(0, 1 << 16)
    engine.uc.mem_write(0, code)
    engine.uc.mem_write(_TEST_TABLES, _identity_tables(_TEST_TABLES))

    def on_exception(uc: Any, number: int, _: object) -> None:
        seen.append((number, engine.state.old_exception, engine.state.cr[2]))
        uc.emu_stop()

    engine.uc.hook_add(engine.unicorn.UC_HOOK_INTR, on_exception)
    const = engine.const
    engine.uc.reg_write(const.UC_X86_REG_CR3, _TEST_TABLES)
    engine.uc.reg_write(const.UC_X86_REG_CR4, 1 << 5)
    engine.uc.reg_write(const.UC_X86_REG_CR0, 1 << 31 | 1 << 16 | 1)
    engine.run(0)
    layout = seen == [(14, 14, _UNMAPPED)] and engine.state.rip == 0
    start = _TEST_CPUID - len(_INT3 + _RDRAND)
    engine.uc.mem_write(start, _INT3 + _RDRAND + b"\x0f\xa2")
    engine.state.intercept(0, [SVM_EXIT_CPUID])
    engine.run(start)
    layout &= engine.state.rip == start + len(_INT3)
    engine.run(engine.state.rip)
    layout &= engine.state.rip == _TEST_CPUID
    numbers = _BP, EXCP_VMEXIT + SVM_EXIT_CPUID
    layout &= seen[1:] == [(number, _NO_EXCEPTION, _UNMAPPED) for number in numbers]
    if not layout or engine.state.dr[6:] != [_DR6_INIT, _DR7_INIT]:
        raise EngineError(
            f"unicorn {engine.unicorn.__version__}: its CPU state is not laid out as in {KNOWN_VERSION} "
            f"(a page fault, INT3 and CPUID look like {seen}); pip install 'unicorn=={KNOWN_VERSION}'"
        )
    if engine.state.regs[RAX] != first_number(0):
        raise EngineError(
            f"unicorn {engine.unicorn.__version__}: RDRAND does not draw its numbers as in {KNOWN_VERSION}; "
            f"pip install 'unicorn=={KNOWN_VERSION}'"
        )


def _identity_tables(base: int) -> bytes:
    """Page tables at ``base`` that map the first 64 KiB, and nothing else, to itself."""

    def table(entries: list[int]) -> bytes:
        return struct.pack("<512Q", *entries, *[0] * (512 - len(entries)))

    upper = b"".join(table([base + 0x1000 * (level + 1) | 3]) for level in range(3))
    return upper + table([page << 12 | 3 for page in range(16)])
