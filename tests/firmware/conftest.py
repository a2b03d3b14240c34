"""A launched TD, its firmware's services, a caller that finds them by pointers, and writers of hostile images.

Nothing here knows the parsers: offsets are typed from the specifications.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from uuid import UUID

import pytest

from firmware.accept_policy import accept_resources
from firmware.arena import Arena
from firmware.boot_services import EfiServices
from firmware.hob import Resource, read_hob_list
from firmware.launch import launch_td
from firmware.memory_descriptor import MemoryDescriptor
from firmware.memory_map import MemoryMap
from firmware.ovmf_layout import BUILT_IN, accepted_ram, low_memory, mmio
from firmware.system_table import build_system_table
from firmware.variables import Variable, VariableStore
from guest.clock import CostTable, VirtualClock
from guest.gates import CallGate
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.ranges import RangeSet
from guest.trace import Print, Trace
from tdx.events import TdCall
from tdx.machine_type import MachineType
from tdx.module import TdConfig, TdxModule
from tdx.sept import SecureEpt
from tdx.vmm import Host

SCRATCH = 0x10_0000
"""Conventional memory that no test allocates: room for arguments."""


@dataclass
class Lab:
    """A machine in a TD, and the host under it."""

    machine: Machine
    host: Host

    def prints(self) -> list[str]:
        """The lines that were put out."""
        return [r.event.text for r in self.machine.trace.records if isinstance(r.event, Print)]

    def accepts(self) -> list[tuple[int, int, int]]:
        """The accepts that succeeded: (address, level, count)."""
        events = [r.event for r in self.machine.trace.records if isinstance(r.event, TdCall)]
        found = [e for e in events if e.leaf == "TDG.MEM.PAGE.ACCEPT" and e.status == 0]
        return [(e.rcx & ~0xFFF, e.rcx & 7, e.count) for e in found]


def build_lab(ram: RangeSet | int, *, page_level: int = 1, running: bool = False) -> Lab:
    physical, sept, clock, costs = PhysicalMemory(), SecureEpt(), VirtualClock(), CostTable()
    trace = Trace(clock)
    trace.stage = "firmware"
    ram = MachineType().ram(ram) if isinstance(ram, int) else ram
    host = Host(physical, sept, trace, clock, costs, ram, page_level)
    if running:
        host.finalize()
    module = TdxModule(physical, sept, host, trace, clock, costs, TdConfig())
    return Lab(Machine.build(physical, module, trace, clock), host)


BOOT_SERVICES = {
    "RaiseTPL": 24, "RestoreTPL": 32, "AllocatePages": 40, "FreePages": 48, "GetMemoryMap": 56, "AllocatePool": 64,
    "FreePool": 72, "CreateEvent": 80, "SetTimer": 88, "WaitForEvent": 96, "SignalEvent": 104, "CloseEvent": 112,
    "CheckEvent": 120, "InstallProtocolInterface": 128, "ReinstallProtocolInterface": 136,
    "UninstallProtocolInterface": 144, "HandleProtocol": 152, "Reserved": 160, "RegisterProtocolNotify": 168,
    "LocateHandle": 176, "LocateDevicePath": 184, "InstallConfigurationTable": 192, "LoadImage": 200,
    "StartImage": 208, "Exit": 216, "UnloadImage": 224, "ExitBootServices": 232, "GetNextMonotonicCount": 240,
    "Stall": 248, "SetWatchdogTimer": 256, "ConnectController": 264, "DisconnectController": 272, "OpenProtocol": 280,
    "CloseProtocol": 288, "OpenProtocolInformation": 296, "ProtocolsPerHandle": 304, "LocateHandleBuffer": 312,
    "LocateProtocol": 320, "InstallMultipleProtocolInterfaces": 328, "UninstallMultipleProtocolInterfaces": 336,
    "CalculateCrc32": 344, "CopyMem": 352, "SetMem": 360, "CreateEventEx": 368,
}  # fmt: skip
RUNTIME_SERVICES = {
    "GetTime": 24, "SetTime": 32, "GetWakeupTime": 40, "SetWakeupTime": 48, "SetVirtualAddressMap": 56,
    "ConvertPointer": 64, "GetVariable": 72, "GetNextVariableName": 80, "SetVariable": 88,
    "GetNextHighMonotonicCount": 96, "ResetSystem": 104, "UpdateCapsule": 112, "QueryCapsuleCapabilities": 120,
    "QueryVariableInfo": 128,
}  # fmt: skip
"""Offsets of function pointers in the tables (UEFI 2.10, sections 4.4 and 4.5)."""


class Efi:
    """The services of a system table, as a boot loader reaches them."""

    def __init__(self, lab: Lab, services: EfiServices) -> None:
        self.lab, self.services, self.machine = lab, services, lab.machine
        self.memory = lab.machine.memory
        self._next = SCRATCH + 0x2_0000
        self.system_table = services.system_table
        self.runtime_services = self.memory.read_uint(self.system_table + 88, 8)
        self.boot_services = self.memory.read_uint(self.system_table + 96, 8)

    def call(self, name: str, *args: int) -> int:
        """Call a service through the pointer in its table."""
        table = self.boot_services if name in BOOT_SERVICES else self.runtime_services
        pointer = self.memory.read_uint(table + (BOOT_SERVICES | RUNTIME_SERVICES)[name], 8)
        return self.machine.call(pointer, *args)

    def put(self, data: bytes) -> int:
        """Put bytes into memory of the image's own; returns their address."""
        at = self._next
        self._next += -(-len(data) // 16) * 16
        self.memory.write(at, data)
        return at

    def word(self, value: int = 0) -> int:
        """A 64-bit variable; returns its address."""
        return self.put(value.to_bytes(8, "little"))

    def load(self, at: int, size: int = 8) -> int:
        """The integer at an address."""
        return self.memory.read_uint(at, size)

    def id(self, guid: str) -> int:
        """A GUID in memory of its own; returns its address."""
        return self.put(UUID(guid).bytes_le)

    def function(self, answer: Callable[..., int], nargs: int = 2) -> int:
        """A function of the image, which the firmware can call; returns its address."""
        at = self.put(bytes(16))
        self.machine.gates.install(at, CallGate("function", nargs, answer))
        return at

    def guid(self, guid: str) -> int:
        """Put a GUID where a service can read it; returns its address."""
        self.memory.write(SCRATCH + 0x800, UUID(guid).bytes_le)
        return SCRATCH + 0x800

    def allocate_pages(self, type: int, memory_type: int, pages: int, address: int = 0) -> tuple[int, int]:
        """AllocatePages(): status and what stands in ``*Memory`` afterwards."""
        return self._with_pointer(address, "AllocatePages", type, memory_type, pages)

    def allocate_pool(self, memory_type: int, size: int) -> tuple[int, int]:
        """AllocatePool(): status and what stands in ``*Buffer`` afterwards."""
        return self._with_pointer(0, "AllocatePool", memory_type, size)

    def _with_pointer(self, value: int, name: str, *args: int) -> tuple[int, int]:
        """Call a service whose last argument points to a 64-bit ``value``, between bytes that must stay."""
        around = b"\xa5" * 8
        self.memory.write(SCRATCH, around + value.to_bytes(8, "little") + around)
        status = self.call(name, *args, SCRATCH + 8)
        found = self.memory.read(SCRATCH, 24)
        assert found[:8] == found[16:] == around
        return status, int.from_bytes(found[8:16], "little")

    def memory_map(self, room: int = 0x8000) -> tuple[int, int, int, int, int, bytes]:
        """GetMemoryMap(): status, size, key, DescriptorSize, DescriptorVersion and the buffer."""
        size, key, stride, version, buffer = (SCRATCH + n for n in (0, 8, 16, 24, 0x1000))
        self.memory.write(SCRATCH, bytes(32))
        self.memory.write(buffer, b"\xa5" * 0x8000)
        self.memory.write_uint(size, room, 8)
        status = self.call("GetMemoryMap", size, buffer, key, stride, version)
        size, key, stride, version = struct.unpack("<QQQI", self.memory.read(SCRATCH, 28))
        return status, size, key, stride, version, self.memory.read(buffer, 0x8000)

    def key(self) -> int:
        """The map key of now."""
        return self.memory_map()[2]

    def tables(self) -> list[tuple[str, int]]:
        """The configuration table, by the pointer and count in the system table."""
        count = self.memory.read_uint(self.system_table + 104, 8)
        at = self.memory.read_uint(self.system_table + 112, 8)
        rows = [struct.unpack("<16sQ", self.memory.read(at + 24 * n, 24)) for n in range(count)]
        return [(str(UUID(bytes_le=guid)), table) for guid, table in rows]


def type_at(efi: Efi, address: int) -> int:
    """Type of the page at ``address`` in the map that the firmware hands out."""
    (kind,) = [d.type for d in efi.services.memory_map.descriptors() if d.start <= address < d.end]
    return kind


def install(efi: Efi, guid: str, interface: int, handle: int = 0) -> int:
    """InstallProtocolInterface(); returns the handle."""
    at = efi.word(handle)
    assert efi.call("InstallProtocolInterface", at, efi.id(guid), 0, interface) == 0
    return efi.load(at)


def build_efi(memory: int = 4 << 30, variables: Iterable[Variable] = (), unaccepted: bool = False) -> Efi:
    """``unaccepted``: the map lists what the firmware has not accepted."""
    lab = build_lab(memory)
    launch_td(lab.host, BUILT_IN, [], lab.machine.regs)
    resources: list[Resource] = read_hob_list(lab.machine.memory, lab.machine.regs.rcx)
    left = accept_resources(lab.machine, resources)
    fixed = [MemoryDescriptor.of_range(15, r.start, r.end, 0) for r in left if unaccepted]
    memory_map = MemoryMap(low_memory(accepted_ram(resources)), [*mmio(True), *fixed])
    arena = Arena(lab.machine.memory, memory_map)
    services = EfiServices(lab.machine, memory_map, arena, VariableStore(variables))
    build_system_table(services)
    return Efi(lab, services)


def write_tdvf(rows: list[tuple[int, ...]], *, size: int = 0x8000, other_entries: int = 1) -> bytearray:
    """A firmware image of ``size`` bytes with TDVF metadata at its offset 0x100.

    ``rows`` are DataOffset, RawDataSize, MemoryAddress, MemoryDataSize, Type, Attributes. The GUIDed table has
    ``other_entries`` entries that nobody looks for on each side of the one for TDX.
    """
    image = bytearray(n * 7 & 0xFF for n in range(size))
    struct.pack_into("<4sIII", image, 0x100, b"TDVF", 16 + 32 * len(rows), 1, len(rows))
    for n, row in enumerate(rows):
        struct.pack_into("<IIQQII", image, 0x110 + 32 * n, *row)
    tdx = struct.pack("<IH", size - 0x100, 22) + UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
    other = struct.pack("<QH", 0, 26) + UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294").bytes_le
    entries = other * other_entries + tdx + other * other_entries
    footer = struct.pack("<H", len(entries) + 18) + UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    table = entries + footer
    image[size - 0x20 - len(table) : size - 0x20] = table
    return image


def write_pe(sections: list[tuple[int, int, int, bytes]], **fields: int) -> bytearray:
    """A PE32+ image with 0x400 bytes of headers.

    ``sections`` are VirtualSize, VirtualAddress, SizeOfRawData and the data, which lie one behind the other in the
    file. ``fields`` are ImageBase, AddressOfEntryPoint, SizeOfImage.
    """
    image = bytearray(0x400)
    image[:2] = b"MZ"
    struct.pack_into("<I", image, 0x3C, 0x80)
    struct.pack_into("<4sHH12xHH", image, 0x80, b"PE", 0x8664, len(sections), 112, 0x206)
    struct.pack_into("<H", image, 0x98, 0x20B)
    struct.pack_into("<I", image, 0x98 + 16, fields.get("AddressOfEntryPoint", 0x1000))
    struct.pack_into("<Q", image, 0x98 + 24, fields.get("ImageBase", 0x100_0000))
    struct.pack_into("<I", image, 0x98 + 32, 0x1000)
    struct.pack_into("<II", image, 0x98 + 56, fields.get("SizeOfImage", 0x4000), 0x400)
    for n, (virtual_size, virtual_address, raw_size, data) in enumerate(sections):
        row = (virtual_size, virtual_address, raw_size, len(image))
        struct.pack_into("<8xIIII", image, 0x98 + 112 + 40 * n, *row)
        image += data
    return image


@pytest.fixture(scope="session")
def make_lab() -> Callable[..., Lab]:
    """A function that makes a TD with ``ram`` (a RangeSet, or bytes of a q35 machine), running or still to be built."""
    return build_lab


@pytest.fixture(scope="session")
def make_efi() -> Callable[..., Efi]:
    """A function that makes a machine of ``memory`` bytes with the firmware's services running."""
    return build_efi


@pytest.fixture
def efi() -> Efi:
    """The services of a machine with 4 GiB."""
    return build_efi()


@pytest.fixture(scope="session")
def tdvf_image() -> Callable[..., bytearray]:
    """A writer of firmware images with TDVF metadata."""
    return write_tdvf


@pytest.fixture(scope="session")
def pe_image() -> Callable[..., bytearray]:
    """A writer of PE32+ images."""
    return write_pe
