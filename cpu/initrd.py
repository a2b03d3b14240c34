"""An initial RAM disk without a foreign binary: a cpio archive, and in it an ``/init`` of our own machine code.

``/init`` shows lazy acceptance from user space: it prints /proc/meminfo, then takes memory piece by piece, touches
every page of it, and prints /proc/meminfo again. If it is to sleep, it does so first, between two prints of
/proc/interrupts. It prints through /dev/kmsg: the kernel sends its log to the UART
by polling, but what is written to a terminal waits for interrupts. Sources: Documentation/driver-api/early-userspace/
buffer-format.rst; ELF-64 Object File Format, version 1.5; SDM volume 2; arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from guest.units import PAGE_SIZE, SZ_1M, round_up

START = "unaccepted-init: start"
MEMINFO = "unaccepted-init: meminfo"
"""The lines after this one, up to the next of ``/init``, are /proc/meminfo."""
DONE = "unaccepted-init: done"
INTERRUPTS = "unaccepted-init: interrupts"
"""The lines after this one are /proc/interrupts."""
MAX_TOUCHES, MAX_SLEEP_MS = 1000, 3_600_000

S_IFDIR, S_IFCHR, S_IFREG = 0o040000, 0o020000, 0o100000

_NEWC_MAGIC = "070701"
_NEWC_TRAILER = "TRAILER!!!"

# syscall_64.tbl and include/uapi
_READ, _WRITE, _OPEN, _CLOSE, _MMAP, _NANOSLEEP, _MOUNT, _REBOOT = 0, 1, 2, 3, 9, 35, 165, 169
_O_RDONLY, _O_WRONLY = 0, 1
_PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, _NO_FILE = 3, 0x22, (1 << 64) - 1
_LINUX_REBOOT_MAGIC1, _LINUX_REBOOT_MAGIC2, _LINUX_REBOOT_CMD_HALT = 0xFEE1DEAD, 672274793, 0xCDEF0123

_TEXT_BASE, _DATA_BASE = 0x40_0000, 0x60_0000
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD, _PF_X, _PF_R = 1, 1, 4
_ET_EXEC, _EM_X86_64, _EV_CURRENT = 2, 62, 1
_HEADERS_SIZE = _EHDR.size + 2 * _PHDR.size

_RAX, _RCX, _RDX, _RSI, _RDI, _R8, _R9, _R10 = 0, 1, 2, 6, 7, 8, 9, 10
_ARGUMENTS = (_RDI, _RSI, _RDX, _R10, _R8, _R9)
"""Registers of a system call's arguments, in order."""


@dataclass(frozen=True, slots=True)
class CpioFile:
    """An entry of an archive: ``name`` without a leading slash, ``mode`` with the file type, device numbers."""

    name: str
    mode: int
    data: bytes = b""
    rdev_major: int = 0
    rdev_minor: int = 0


def cpio_newc(files: Iterable[CpioFile]) -> bytes:
    """A cpio archive in the "newc" format, as the kernel unpacks it: root's files, dated 1970."""
    out = bytearray()
    for ino, file in enumerate([*files, CpioFile(_NEWC_TRAILER, 0)], start=1):
        name = file.name.encode() + b"\0"
        fields = [
            ino, file.mode, 0, 0, 1, 0, len(file.data),  # uid gid nlink mtime filesize
            0, 0, file.rdev_major, file.rdev_minor, len(name), 0,  # maj min rmaj rmin namesize chksum
        ]  # fmt: skip
        out += (_NEWC_MAGIC + "".join(f"{value:08X}" for value in fields)).encode() + name
        out += bytes(-len(out) % 4) + file.data
        out += bytes(-len(out) % 4)
    return bytes(out)


def build_initrd(touches: int = 4, touch_bytes: int = 256 * SZ_1M, sleep_ms: int = 0) -> bytes:
    """The archive with ``/init``, which touches memory ``touches`` times, ``touch_bytes`` more each time.

    Before that it sleeps for ``sleep_ms``, if that is not 0, and shows /proc/interrupts from before and after.
    After the last time it prints :data:`DONE` and halts the machine by reboot(2).
    """
    if not 0 <= touches <= MAX_TOUCHES or touch_bytes <= 0 or touch_bytes % SZ_1M:
        raise ValueError(f"{touches} times {touch_bytes:#x} bytes: expected 0 to {MAX_TOUCHES}, and whole MiB")
    if not 0 <= sleep_ms <= MAX_SLEEP_MS:
        raise ValueError(f"a sleep of {sleep_ms} ms: expected 0 to {MAX_SLEEP_MS}")
    return cpio_newc(
        [
            CpioFile("dev", S_IFDIR | 0o755),
            CpioFile("dev/console", S_IFCHR | 0o600, rdev_major=5, rdev_minor=1),
            CpioFile("dev/kmsg", S_IFCHR | 0o600, rdev_major=1, rdev_minor=11),
            CpioFile("proc", S_IFDIR | 0o755),
            CpioFile("init", S_IFREG | 0o755, _init(touches, touch_bytes, sleep_ms)),
        ]
    )


class _Program:
    """Machine code and data of a static executable, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._code, self._data = bytearray(), bytearray()

    @property
    def here(self) -> int:
        """Address of the next instruction."""
        return _TEXT_BASE + _HEADERS_SIZE + len(self._code)

    def string(self, text: str) -> int:
        """Address of ``text``, with a null byte behind it."""
        return self.data(text.encode() + b"\0")

    def data(self, data: bytes) -> int:
        """Address of ``data``."""
        address = _DATA_BASE + len(self._data)
        self._data += data
        return address

    def emit(self, code: str) -> None:
        """Append an instruction, given in hexadecimal."""
        self._code += bytes.fromhex(code)

    def mov(self, register: int, value: int) -> None:
        """movabs register, value"""
        self._code += bytes([0x48 | register >> 3, 0xB8 | register & 7]) + value.to_bytes(8, "little")

    def jump(self, opcode: str, target: int) -> None:
        """A jump or call, ``opcode`` in hexadecimal, to ``target``, a displacement of 32 bits away."""
        self.emit(opcode)
        self._code += (target - self.here - 4).to_bytes(4, "little", signed=True)

    def syscall(self, number: int, *arguments: int) -> None:
        """A system call; arguments that are not given stay what the registers have. Spoils RCX and R11."""
        for register, value in zip(_ARGUMENTS, arguments, strict=False):
            self.mov(register, value)
        self.mov(_RAX, number)
        self.emit("0f 05")  # syscall

    def write(self) -> None:
        """write(2) of RDX bytes at RSI to the log."""
        self.emit("4c 89 f7")  # mov rdi, r14
        self.syscall(_WRITE)

    def print(self, line: str) -> None:
        """Log a line."""
        self.mov(_RSI, self.string(line + "\n"))
        self.mov(_RDX, len(line) + 1)
        self.write()

    def executable(self, entry: int) -> bytes:
        """The ELF file: headers and code in one segment, the strings in the other."""
        text_size = _HEADERS_SIZE + len(self._code)
        data_offset, data_size = round_up(text_size, PAGE_SIZE), len(self._data)
        ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        ehdr = _EHDR.pack(
            ident, _ET_EXEC, _EM_X86_64, _EV_CURRENT, entry, _EHDR.size, 0, 0,  # phoff shoff flags
            _EHDR.size, _PHDR.size, 2, 0, 0, 0,  # no sections
        )  # fmt: skip
        text = _PHDR.pack(_PT_LOAD, _PF_R | _PF_X, 0, _TEXT_BASE, _TEXT_BASE, text_size, text_size, PAGE_SIZE)
        data = _PHDR.pack(_PT_LOAD, _PF_R, data_offset, _DATA_BASE, _DATA_BASE, data_size, data_size, PAGE_SIZE)
        return (ehdr + text + data + self._code).ljust(data_offset, b"\0") + self._data


def _init(touches: int, touch_bytes: int, sleep_ms: int) -> bytes:
    """The executable. R14 holds the log's file descriptor."""
    program = _Program()
    show = program.here
    _show(program)
    entry = program.here
    proc = program.string("proc")
    program.syscall(_MOUNT, proc, program.string("/proc"), proc, 0, 0)
    program.syscall(_OPEN, program.string("/dev/kmsg"), _O_WRONLY)
    program.emit("49 89 c6")  # mov r14, rax
    program.print(START)
    if sleep_ms:
        _show_file(program, show, INTERRUPTS, "/proc/interrupts")
        program.syscall(_NANOSLEEP, program.data(struct.pack("<QQ", *divmod(sleep_ms * 1_000_000, 1_000_000_000))), 0)
        _show_file(program, show, INTERRUPTS, "/proc/interrupts")
    _show_file(program, show, MEMINFO, "/proc/meminfo")
    for number in range(1, touches + 1):
        _touch(program, touch_bytes)
        program.print(f"unaccepted-init: touched {number * touch_bytes // SZ_1M} MiB")
        _show_file(program, show, MEMINFO, "/proc/meminfo")
    program.print(DONE)
    program.syscall(_REBOOT, _LINUX_REBOOT_MAGIC1, _LINUX_REBOOT_MAGIC2, _LINUX_REBOOT_CMD_HALT)
    return program.executable(entry)


def _show_file(program: _Program, show: int, title: str, path: str) -> None:
    program.print(title)
    program.mov(_RDI, program.string(path))
    program.jump("e8", show)  # call show


def _show(program: _Program) -> None:
    """A subroutine: log the file whose name is at RDI line by line, as a write to /dev/kmsg is one message.

    Of the file it shows the first 4 KiB.
    """
    program.mov(_RSI, _O_RDONLY)
    program.syscall(_OPEN)
    program.emit("49 89 c7")  # mov r15, rax
    program.emit("48 89 c7")  # mov rdi, rax
    program.emit("4c 8d a4 24 00 e0 ff ff")  # lea r12, [rsp - 0x2000]
    program.emit("4c 89 e6")  # mov rsi, r12
    program.mov(_RDX, PAGE_SIZE)
    program.syscall(_READ)
    program.emit("4d 8d 2c 04")  # lea r13, [r12 + rax]
    next_line = program.here
    program.emit("4c 89 e6")  # mov rsi, r12
    scan = program.here
    program.emit("49 ff c4")  # inc r12
    program.emit("41 80 7c 24 ff 0a")  # cmp byte [r12 - 1], newline
    program.jump("0f 85", scan)  # jne scan
    program.emit("4c 89 e2")  # mov rdx, r12
    program.emit("48 29 f2")  # sub rdx, rsi
    program.write()
    program.emit("4d 39 ec")  # cmp r12, r13
    program.jump("0f 82", next_line)  # jb next_line
    program.emit("4c 89 ff")  # mov rdi, r15
    program.syscall(_CLOSE)
    program.emit("c3")  # ret


def _touch(program: _Program, size: int) -> None:
    """Map ``size`` bytes and write one byte to each page. Without memory, the kernel panics: init may not die."""
    program.syscall(_MMAP, 0, size, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, _NO_FILE, 0)
    program.mov(_RCX, size // PAGE_SIZE)
    loop = program.here
    program.emit("c6 00 01")  # mov byte [rax], 1
    program.emit("48 05 00 10 00 00")  # add rax, 0x1000
    program.emit("48 ff c9")  # dec rcx
    program.jump("0f 85", loop)  # jnz loop
