"""Cases recorded by running the C code of the boot stub and the kernel helpers: the host and firmware around them.

The recorded host has no memory of its own: it accepts a page if the page's level is not above ``lvl``, and it keeps no
page states. The firmware hands out the map ``desc``, and at the end ``desc_exit``. A family adds what it alone has.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE, BootE820Entry
from bootstub.efi_call import EfiCalls
from bootstub.exit_boot import ALT_MEM_K, ExitBoot
from bootstub.protocol import Protocol
from bootstub.setup_data import SETUP_DATA
from firmware.efi_types import EfiMemoryType, EfiStatus
from firmware.memory_descriptor import (
    EFI_MEMORY_DESCRIPTOR_VERSION,
    OVMF_DESCRIPTOR_SIZE,
    MemoryDescriptor,
    pack_map,
)
from firmware.tables import (
    BOOT_SERVICES,
    EFI_BOOT_SERVICES,
    EFI_CONFIGURATION_TABLE,
    EFI_RUNTIME_SERVICES,
    EFI_SYSTEM_TABLE,
    MAX_CONFIGURATION_TABLES,
)
from guest.bitmap import GuestBitmap
from guest.clock import VirtualClock
from guest.gates import CallGate
from guest.machine import Machine
from guest.memory import AccessKind, PhysicalMemory
from guest.records import GuestRecord, field_extents
from guest.registers import Registers
from guest.trace import Trace
from guest.units import PAGE_SHIFT, PAGE_SIZE, PHYSICAL_ADDRESS_END, round_up
from kernel.e820 import memory_setup
from tdx.guest import PlatformAccept
from tdx.leaves import Leaf
from tdx.sept import LEVEL_SIZE
from tdx.status import TDX_OPERAND_INVALID, TDX_SUCCESS

Comparison = Iterator[tuple[str, object, object]]
"""(field, ours, recorded)."""
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


class RecordedFirmware:
    """The recorded firmware: hands out ``desc``, then ``desc_exit``, and memory from a heap of its own."""

    def __init__(self, machine: Machine, case: dict[str, Any]) -> None:
        self._memory = machine.memory
        self._maps = [_packed(case["desc"])] * 2 + [_packed(case.get("desc_exit", case["desc"]))]
        self._heap = _HEAP
        self.pages: list[int] = []
        self.pools: dict[int, tuple[int, int]] = {}
        """Type and size of each pool buffer by address, in order."""
        self.tables: dict[bytes, int] = {}
        """Configuration tables by GUID."""
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
        record["ConfigurationTable"] = self.take(MAX_CONFIGURATION_TABLES * EFI_CONFIGURATION_TABLE.sizeof())
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
        self.pools[self._heap] = memory_type, size
        self._memory.write_uint(at, self.take(size), 8)
        return EfiStatus.EFI_SUCCESS

    def _free_pool(self, buffer: int) -> int:
        return EfiStatus.EFI_SUCCESS

    def install(self, guid: bytes, table: int) -> None:
        """Put a configuration table into the system table."""
        record, size = GuestRecord(self._memory, self.system_table, EFI_SYSTEM_TABLE), EFI_CONFIGURATION_TABLE.sizeof()
        at = record["ConfigurationTable"] + record["NumberOfTableEntries"] * size
        self._memory.write(at, guid + table.to_bytes(8, "little"))
        record["NumberOfTableEntries"] += 1
        self.tables[guid] = table

    def _install_configuration_table(self, guid: int, table: int) -> int:
        self.install(self._memory.read(guid, 16), table)
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


class RecordedCase(ABC):
    """One case, run through our stages under ``protocol``."""

    protocol: Protocol

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.host = _Host(case["lvl"])
        clock = VirtualClock()
        self.machine = Machine.build(PhysicalMemory(), self.host, Trace(clock), clock)
        self.firmware = RecordedFirmware(self.machine, case)
        self.ranges: list[int] = []
        self._accept = PlatformAccept(self.machine, self.protocol.accept)

    @abstractmethod
    def record(self, params: GuestRecord) -> Comparison:
        """What the stub left of unaccepted memory."""

    @abstractmethod
    def operation(self, name: str, op: list[Any]) -> Comparison:
        """One operation on what :meth:`record` found."""

    def run(self) -> Comparison:
        """Everything that was recorded."""
        case, firmware = self.case, self.firmware
        gpa = firmware.take(BOOT_PARAMS_SIZE)
        self.machine.regs.rsp = firmware.take(PAGE_SIZE) + PAGE_SIZE
        efi = EfiCalls(self.machine, firmware.system_table)
        exit_boot = ExitBoot(self.machine, efi, gpa, self.arch_accept, self.protocol, bool(case["sp"]))
        yield "status", exit_boot.run(0), case["status"]
        params = GuestRecord(self.machine.memory, gpa, BOOT_PARAMS)
        yield from self.record(params)
        yield from self._tables(params)
        yield "acc", self.ranges, case["acc"]
        yield from compare_log("log", self.host.log, case["log"])
        for number, op in enumerate(case.get("ops", [])):
            yield from self.operation(f"ops[{number}] {op[0]}", op)

    def arch_accept(self, start: int, end: int) -> None:
        """arch_accept_memory(), written down."""
        self.ranges += [start, end]
        self._accept(start, end)

    def forget(self) -> None:
        """Begin a new operation: what was accepted before is not part of it."""
        self.host.log, self.ranges = [], []

    def extension(self, params: GuestRecord) -> bytes | None:
        """The e820 entries behind boot_params, None if there are none."""
        memory, node = self.machine.memory, params["hdr.setup_data"]
        return memory.read(node + SETUP_DATA.sizeof(), GuestRecord(memory, node, SETUP_DATA)["len"]) if node else None

    def _tables(self, params: GuestRecord) -> Comparison:
        """The e820 table and its extension."""
        case, node = self.case, params["hdr.setup_data"]
        if node:
            header = GuestRecord(self.machine.memory, node, SETUP_DATA)
            yield "ext type", header["type"], 1
            yield "ext next", header["next"], 0
        ext = self.extension(params)
        yield "n", params["e820_entries"], case["n"]
        yield "e820", e820_bytes(params, self.machine).hex(), case["e820"]
        yield "ext", None if ext is None else ext.hex(), case["ext"]
        loader_data = [size for kind, size in self.firmware.pools.values() if kind == EfiMemoryType.EfiLoaderData]
        yield "ext_pool", sum(loader_data[1:]), case["ext_pool"]


def differences(case: RecordedCase) -> list[str]:
    """The differences between our stages and a recorded case, one line each; empty if they agree."""
    return [
        f"{field}: found {ours!r}, expected {recorded!r}" for field, ours, recorded in case.run() if ours != recorded
    ]


def e820_bytes(params: GuestRecord, machine: Machine) -> bytes:
    """The e820 table in boot_params."""
    offset, _ = field_extents(BOOT_PARAMS)["e820_table"]
    return machine.memory.read(params.gpa + offset, 20 * params["e820_entries"])


def _packed(descriptors: list[list[int]]) -> bytes:
    return pack_map(MemoryDescriptor(*fields) for fields in descriptors)


def bit_runs(bitmap: GuestBitmap | None, start: int, end: int) -> list[int]:
    """Set bits as flat ranges."""
    return [] if bitmap is None else [bound for run in bitmap.runs(start, end) for bound in run]


def changed(before: list[int], after: list[int]) -> list[int]:
    """The bits of ``before`` that are not in ``after``; both and the result as flat ranges."""
    return sorted(set(before) ^ set(after))


def end_of_ram_pfn(table: list[BootE820Entry], ext: list[BootE820Entry]) -> int:
    """e820__end_of_ram_pfn() of a kernel that boots with this table."""
    _, e820 = memory_setup(table, ALT_MEM_K, 0)
    if ext:
        e820.append_table(ext)
        e820.update_table()
    return e820.end_of_ram_pfn(PHYSICAL_ADDRESS_END >> PAGE_SHIFT)


def compare_log(field: str, ours: list[list[Any]], recorded: Any) -> Comparison:
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
