"""Family ``v9`` of the recorded cases: the stub, the decompressor and the kernel helpers of the v9 series.

A case was recorded by running the C code over a host without memory of its own: it accepts a page if the page's
level is not above ``lvl``, and it keeps no page states. This module plays that host and the firmware around it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE, BootE820Entry, parse_e820_table
from bootstub.efi_call import EfiCalls
from bootstub.exit_boot import ALT_MEM_K, ExitBoot
from bootstub.protocol import V9
from bootstub.setup_data import SETUP_DATA
from bootstub.unaccepted_memory import accept_memory
from firmware.efi_types import EfiStatus
from firmware.memory_descriptor import (
    EFI_MEMORY_DESCRIPTOR_VERSION,
    OVMF_DESCRIPTOR_SIZE,
    MemoryDescriptor,
    pack_map,
)
from firmware.tables import BOOT_SERVICES, EFI_BOOT_SERVICES, EFI_RUNTIME_SERVICES, EFI_SYSTEM_TABLE
from guest.bitmap import GuestBitmap
from guest.clock import VirtualClock
from guest.gates import CallGate
from guest.machine import Machine
from guest.memory import AccessKind, PhysicalMemory
from guest.records import GuestRecord, field_extents
from guest.registers import Registers
from guest.trace import Trace
from guest.units import (
    BITS_PER_BYTE,
    DIV_ROUND_UP,
    PAGE_SHIFT,
    PAGE_SIZE,
    PHYSICAL_ADDRESS_END,
    PMD_SIZE,
    round_up,
)
from kernel.e820 import memory_setup
from kernel.unaccepted_memory import UnacceptedMemory
from tdx.guest import PlatformAccept
from tdx.leaves import Leaf
from tdx.sept import LEVEL_SIZE
from tdx.status import TDX_OPERAND_INVALID, TDX_SUCCESS

_HEAP = PHYSICAL_ADDRESS_END >> 1
"""Where the recorded firmware's memory lies here: in no case's way, and read back through pointers only."""


class _Host:
    """The stateless host: every address is accessible; accepts succeed up to a level; all calls are logged."""

    def __init__(self, level: int) -> None:
        self._level = level
        self.log: list[list[Any]] = []

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        return 0, PHYSICAL_ADDRESS_END

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        return (0, 0x65746E49, 0x20202020, 0x5844546C) if leaf else (0x21, 0, 0, 0)

    def tdcall(self, regs: Registers) -> None:
        if regs.rax == Leaf.TDG_VP_VMCALL:
            self.log.append(["m", regs.r12, regs.r13])
            regs.r10 = 0
        regs.rax, regs.rcx = TDX_SUCCESS, 52

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        ok = (regs.rcx & 7) <= self._level
        self._log_accepts(regs.rcx, ok, count if ok else 1)
        regs.rax = TDX_SUCCESS if ok else TDX_OPERAND_INVALID
        return count if ok else 0

    def _log_accepts(self, rcx: int, ok: bool, count: int) -> None:
        last: list[Any] = self.log[-1] if self.log else ["m"]
        if last[0] == "a" and last[2] == ok and last[1] + last[3] * LEVEL_SIZE[rcx & 7] == rcx:
            last[3] += count
        else:
            self.log.append(["a", rcx, int(ok), count])


class _Firmware:
    """The recorded firmware: hands out ``desc``, then ``desc_exit``, and memory from a heap of its own."""

    def __init__(self, machine: Machine, case: dict[str, Any]) -> None:
        self._memory = machine.memory
        self._maps = [_packed(case["desc"])] * 2 + [_packed(case.get("desc_exit", case["desc"]))]
        self._heap = _HEAP
        self.pages: list[int] = []
        self.pools: list[int] = []
        """Sizes in order: the first memory map, the extension if there is one, the last memory map."""
        self.system_table = self._tables(machine)

    def take(self, size: int) -> int:
        at, self._heap = self._heap, self._heap + round_up(size, PAGE_SIZE)
        return at

    def _tables(self, machine: Machine) -> int:
        system_table, boot, runtime = (
            self.take(layout.sizeof()) for layout in (EFI_SYSTEM_TABLE, EFI_BOOT_SERVICES, EFI_RUNTIME_SERVICES)
        )
        record = GuestRecord(machine.memory, system_table, EFI_SYSTEM_TABLE)
        record["BootServices"], record["RuntimeServices"] = boot, runtime
        pointers = GuestRecord(machine.memory, boot, EFI_BOOT_SERVICES)
        for name, nargs in BOOT_SERVICES:
            method = "_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
            if hasattr(self, method):
                pointers[name] = address = self.take(1)
                machine.gates.install(address, CallGate(name, nargs, getattr(self, method)))
        return system_table

    def _allocate_pages(self, type: int, memory_type: int, pages: int, at: int) -> int:
        self.pages.append(pages)
        self._memory.write_uint(at, self.take(pages << PAGE_SHIFT), 8)
        return EfiStatus.EFI_SUCCESS

    def _allocate_pool(self, memory_type: int, size: int, at: int) -> int:
        self.pools.append(size)
        self._memory.write_uint(at, self.take(size), 8)
        return EfiStatus.EFI_SUCCESS

    def _free_pool(self, buffer: int) -> int:
        return EfiStatus.EFI_SUCCESS

    def _get_memory_map(self, size_at: int, buffer: int, key: int, stride: int, version: int) -> int:
        data = self._maps[0]
        room = self._memory.read_uint(size_at, 8)
        self._memory.write_uint(size_at, len(data), 8)
        self._memory.write_uint(stride, OVMF_DESCRIPTOR_SIZE, 8)
        self._memory.write_uint(version, EFI_MEMORY_DESCRIPTOR_VERSION, 4)
        if room < len(data):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        self._memory.write(buffer, data)
        if len(self._maps) > 1:
            self._maps = self._maps[2:]
        return EfiStatus.EFI_SUCCESS

    def _exit_boot_services(self, image: int, key: int) -> int:
        return EfiStatus.EFI_SUCCESS


class _Case:
    """One case, run through our stages."""

    def __init__(self, case: dict[str, Any]) -> None:
        self._case = case
        self._host = _Host(case["lvl"])
        clock = VirtualClock()
        self._machine = Machine.build(PhysicalMemory(), self._host, Trace(clock), clock)
        self._firmware = _Firmware(self._machine, case)
        self._ranges: list[int] = []
        self._accept = PlatformAccept(self._machine)

    def run(self) -> Iterator[tuple[str, object, object]]:
        """(field, ours, recorded) of everything that was recorded."""
        case, firmware, memory = self._case, self._firmware, self._machine.memory
        gpa = firmware.take(BOOT_PARAMS_SIZE)
        self._machine.regs.rsp = firmware.take(PAGE_SIZE) + PAGE_SIZE
        efi = EfiCalls(self._machine, firmware.system_table)
        status = ExitBoot(self._machine, efi, gpa, self._arch_accept, V9, bool(case["sp"])).run(0)
        params = GuestRecord(memory, gpa, BOOT_PARAMS)
        bitmap_gpa = params["unaccepted_memory"]
        yield "status", status, case["status"]
        size = self._cleared_at(bitmap_gpa)
        yield "bm", [size, firmware.pages[-1]] if bitmap_gpa else None, case["bm"]
        bitmap = GuestBitmap(memory, bitmap_gpa) if bitmap_gpa else None
        yield "bits", _bits(bitmap, 0, size * BITS_PER_BYTE), case["bits"]
        yield from self._tables(params)
        yield "acc", self._ranges, case["acc"]
        yield from _log("log", self._host.log, case["log"])
        for number, op in enumerate(case.get("ops", [])):
            yield from self._operation(f"ops[{number}] {op[0]}", op, bitmap)

    def _cleared_at(self, gpa: int) -> int:
        """Bytes of the first write at ``gpa``; 0 if there was none, or if ``gpa`` is null."""
        sizes = (end - start for _, start, end in self._machine.memory.writes if start == gpa)
        return next(sizes, 0) if gpa else 0

    def _tables(self, params: GuestRecord) -> Iterator[tuple[str, object, object]]:
        """The e820 table, its extension, and what the booting kernel makes of them."""
        case, memory = self._case, self._machine.memory
        count = params["e820_entries"]
        offset, _ = field_extents(BOOT_PARAMS)["e820_table"]
        table = memory.read(params.gpa + offset, 20 * count)
        ext, node = b"", params["hdr.setup_data"]
        if node:
            header = GuestRecord(memory, node, SETUP_DATA)
            yield "ext type", header["type"], 1
            yield "ext next", header["next"], 0
            ext = memory.read(node + SETUP_DATA.sizeof(), header["len"])
        yield "n", count, case["n"]
        yield "e820", table.hex(), case["e820"]
        yield "ext", ext.hex() if node else None, case["ext"]
        yield "ext_pool", sum(self._firmware.pools[1:-1]), case["ext_pool"]
        ram_pfn = _end_of_ram_pfn(parse_e820_table(table), parse_e820_table(ext))
        yield "ram_pfn", ram_pfn, case["ram_pfn"]
        if case["bm"] is not None:
            rsv = DIV_ROUND_UP(ram_pfn << PAGE_SHIFT, PMD_SIZE * BITS_PER_BYTE)
            yield "rsv", rsv, case["rsv"]

    def _operation(self, name: str, op: list[Any], bitmap: GuestBitmap | None) -> Iterator[tuple[str, object, object]]:
        kind, start, end = op[:3]
        if not 0 <= start <= end:
            raise ValueError(f"operation on [{start:#x}, {end:#x})")
        kernel = UnacceptedMemory(bitmap, self._arch_accept)
        if kind == "R":
            yield name, int(kernel.range_contains_unaccepted_memory(start, end)), op[3]
            return
        self._host.log, self._ranges = [], []
        high = DIV_ROUND_UP(end, PMD_SIZE) + 1
        before = _bits(bitmap, 0, high)
        if kind == "K":
            kernel.accept_memory(start, end)
        elif bitmap is not None:
            accept_memory(bitmap, self._arch_accept, start, end)
        yield name + " cleared", _difference(before, _bits(bitmap, 0, high)), op[3]
        yield name + " accepted", self._ranges, op[4]
        yield from _log(name + " log", self._host.log, op[5])

    def _arch_accept(self, start: int, end: int) -> None:
        self._ranges += [start, end]
        self._accept(start, end)


def run_case(case: dict[str, Any]) -> list[str]:
    """The differences between our stages and the recorded case, one line each; empty if they agree."""
    differences = []
    for field, ours, recorded in _Case(case).run():
        if ours != recorded:
            differences.append(f"{field}: found {ours!r}, expected {recorded!r}")
    return differences


def _packed(descriptors: list[list[int]]) -> bytes:
    return pack_map(MemoryDescriptor(*fields) for fields in descriptors)


def _bits(bitmap: GuestBitmap | None, start: int, end: int) -> list[int]:
    """Set bits as flat ranges."""
    return [] if bitmap is None else [bound for run in bitmap.runs(start, end) for bound in run]


def _difference(before: list[int], after: list[int]) -> list[int]:
    """The bits of ``before`` that are not in ``after``; both and the result as flat ranges."""
    return sorted(set(before) ^ set(after))


def _end_of_ram_pfn(table: list[BootE820Entry], ext: list[BootE820Entry]) -> int:
    """e820__end_of_ram_pfn() of a kernel that boots with this table."""
    _, e820 = memory_setup(table, ALT_MEM_K, 0)
    if ext:
        e820.append_table(ext)
        e820.update_table()
    return e820.end_of_ram_pfn(PHYSICAL_ADDRESS_END >> PAGE_SHIFT)


def _log(field: str, ours: list[list[Any]], recorded: Any) -> Iterator[tuple[str, object, object]]:
    """Compare a call log with the recorded one, by its run-length form or by its hash."""
    count = sum(item[3] if item[0] == "a" else 1 for item in ours)
    if recorded == 0:
        yield field, count, 0
        return
    yield field + " n", count, recorded["n"]
    if "rle" in recorded:
        yield field, ours, recorded["rle"]
    elif count == recorded["n"]:
        yield field + " sha256", _log_hash(ours), recorded["sha256"]


def _log_hash(log: list[list[Any]]) -> str:
    """SHA-256 of the canonical JSON of the log with every run written out."""
    digest = hashlib.sha256()
    separator = "["
    for item in log:
        if item[0] == "m":
            text = f'["map_gpa",{item[1]},{item[2]}]'
        else:
            _, rcx, ok, count = item
            step = LEVEL_SIZE[rcx & 7]
            text = ",".join(f'["accept",{n},{ok}]' for n in range(rcx, rcx + count * step, step))
        digest.update((separator + text).encode())
        separator = ","
    digest.update(b"]")
    return digest.hexdigest()
