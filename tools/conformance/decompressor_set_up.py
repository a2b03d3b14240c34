"""The set-up of a recorded run of a decompressor: what a boot loader leaves that has ended boot services.

``memmap`` is EFI's map in boot_params, ``table`` that of unaccepted memory, a configuration table. A case may have
more, each where it says: ``initrd``, start and size; ``setup_data``, nodes ``[address, type, length, indirect]``, the
latter ``[type, length, address]`` or nothing; ``srat``, with ``at`` and ``nodes``, ranges ``[start, size, flags]``; and
``e820``, a table ``[address, size, type]`` of a loader that knows nothing of EFI.
"""

from __future__ import annotations

import struct
from typing import Any

from bootstub.boot_params import BOOT_E820_ENTRY, BOOT_PARAMS, E820_MAX_ENTRIES_ZEROPAGE
from bootstub.bzimage import parse_bzimage
from bootstub.kernel_layout import STARTUP_64_OFFSET
from bootstub.setup_data import SETUP_DATA
from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import EFI_MEMORY_DESCRIPTOR_VERSION, OVMF_DESCRIPTOR_SIZE, MemoryDescriptor, pack_map
from firmware.memory_map import MemoryMap
from firmware.paging import build_identity_map
from firmware.tables import EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE, EFI_SYSTEM_TABLE_SIGNATURE
from guest.records import GuestRecord, field_extents
from guest.units import PAGE_SIZE, SZ_1M, round_up
from tools.conformance.efi_names import guid_of
from tools.conformance.recorded_td import RecordedTd
from tools.conformance.unaccepted_table import build_table

_SETUP_HEADER_AT, _SETUP_HEADER_LENGTH_AT = 0x1F1, 0x201
_EL64 = 0x3436_4C45
_TABLE_VERSION = 1
_SRAT_MEMORY, _SRAT_ENABLED = 1, 1

SET_UP = (
    "id", "profile", "cmdline", "descs", "memmap", "max_level", "tsc0", "load", "cmdline_pa", "boot_params_pa",
    "initrd", "setup_data", "srat", "e820",
)  # fmt: skip
"""Fields of a case that say what is run, and ``table`` without its ``bits_after``; the others say what came of it."""


class DecompressorSetUp:
    """A TD that stands at startup_64 of ``image``, as the case wants it."""

    def __init__(self, case: dict[str, Any], image: bytes) -> None:
        self.case, self.image, self.bzimage = case, image, parse_bzimage(image)
        self.descriptors = [MemoryDescriptor(*fields) for fields in case["memmap"]]
        self.td = RecordedTd(self.descriptors, case["max_level"], tsc0=case["tsc0"])
        self.td.add_memory([(0, SZ_1M)])  # where the decompressor looks for ACPI tables
        self.machine, self._memory = self.td.machine, self.td.machine.memory
        self.machine.trace.stage = "decompress"
        self._load()

    def _load(self) -> None:
        """Put image, command line, tables, boot_params and page tables where the recorded loader put them."""
        case, memory, regs = self.case, self._memory, self.machine.regs
        memory.write(case["load"], self.image[self.bzimage.protected_mode_offset :])
        memory.write(case["cmdline_pa"], case["cmdline"].encode() + b"\0")
        self._write_boot_params()
        regs.cr3 = build_identity_map(memory, Arena(memory, MemoryMap(self.descriptors, [])))
        regs.rip, regs.rsi = case["load"] + STARTUP_64_OFFSET, case["boot_params_pa"]

    def _write_boot_params(self) -> None:
        """What the decompressor needs to find: the setup header, the command line, the memory map, EFI's tables."""
        gpa, header_end = (
            self.case["boot_params_pa"],
            _SETUP_HEADER_LENGTH_AT + 1 + self.image[_SETUP_HEADER_LENGTH_AT],
        )
        self._memory.write(gpa + _SETUP_HEADER_AT, self.image[_SETUP_HEADER_AT:header_end])
        params = GuestRecord(self._memory, gpa, BOOT_PARAMS)
        params["hdr.cmd_line_ptr"] = self.case["cmdline_pa"] & 0xFFFF_FFFF
        params["ext_cmd_line_ptr"] = self.case["cmdline_pa"] >> 32
        for name, value in zip(("image", "size"), self.case.get("initrd", (0, 0)), strict=True):
            params[f"hdr.ramdisk_{name}"], params[f"ext_ramdisk_{name}"] = value & 0xFFFF_FFFF, value >> 32
        params["hdr.setup_data"] = self._setup_data()
        if "e820" in self.case:
            self._e820(params)
        else:
            self._efi_info(params)

    def _e820(self, params: GuestRecord) -> None:
        entries = [dict(zip(("addr", "size", "type"), row, strict=True)) for row in self.case["e820"]]
        params["e820_entries"] = min(len(entries), E820_MAX_ENTRIES_ZEROPAGE)
        data = b"".join(map(BOOT_E820_ENTRY.build, entries[:E820_MAX_ENTRIES_ZEROPAGE]))
        self._memory.write(params.gpa + field_extents(BOOT_PARAMS)["e820_table"][0], data)
        params["acpi_rsdp_addr"] = self._srat()

    def _efi_info(self, params: GuestRecord) -> None:
        memory_map = pack_map(self.descriptors)
        map_at = self._free_pages(len(memory_map))
        self._memory.write(map_at, memory_map)
        for name, value in {
            "efi_loader_signature": _EL64,
            "efi_systab": self._system_table(),
            "efi_memdesc_size": OVMF_DESCRIPTOR_SIZE,
            "efi_memdesc_version": EFI_MEMORY_DESCRIPTOR_VERSION,
            "efi_memmap": map_at,
            "efi_memmap_size": len(memory_map),
        }.items():
            params[f"efi_info.{name}"] = value

    def _free_pages(self, size: int) -> int:
        """Where the recorded loader put the memory map: below what it had put in place before."""
        table = self.case["table"]
        return int(table["pa"] if table else self.case["cmdline_pa"]) - round_up(size, PAGE_SIZE)

    def _system_table(self) -> int:
        """A system table with the table of unaccepted memory and ACPI's, if there are any; returns its address."""
        table, memory = self.case["table"], self._memory
        at = next(d.start for d in self.descriptors if d.type == EfiMemoryType.EfiRuntimeServicesData)
        record = GuestRecord(memory, at, EFI_SYSTEM_TABLE)
        record["Hdr.Signature"] = EFI_SYSTEM_TABLE_SIGNATURE
        record["ConfigurationTable"] = entries = at + EFI_SYSTEM_TABLE.sizeof()
        tables = {"ACPI_20_TABLE": self._srat()}
        if table is not None:
            data = build_table(
                _TABLE_VERSION, table["unit_size"], table["phys_base"], table["size"], table["bits_before"]
            )
            memory.write(table["pa"], data)
            tables["LINUX_UNACCEPTED_MEM_TABLE"] = table["pa"]
        present = {guid_of(name): address for name, address in tables.items() if address}
        fields = [{"VendorGuid": guid, "VendorTable": address} for guid, address in present.items()]
        memory.write(entries, b"".join(map(EFI_CONFIGURATION_TABLE.build, fields)))
        record["NumberOfTableEntries"] = len(fields)
        return at

    def _setup_data(self) -> int:
        """The list of nodes; returns the address of the first, 0 without any."""
        nodes = self.case.get("setup_data", [])
        following = [*(node[0] for node in nodes), 0][1:]
        for (at, kind, length, indirect), after in zip(nodes, following, strict=True):
            data = struct.pack("<IIQQ", indirect[0], 0, *indirect[1:]) if indirect else b""
            self._memory.write(at, SETUP_DATA.build({"next": after, "type": kind, "len": length}) + data)
        return int(nodes[0][0]) if nodes else 0

    def _srat(self) -> int:
        """RSDP, XSDT and SRAT in a page; returns the address of the RSDP, 0 without a SRAT."""
        if "srat" not in self.case:
            return 0
        at, nodes = self.case["srat"]["at"], self.case["srat"]["nodes"]
        affinity = [
            struct.pack("<BBIHQQII8x", _SRAT_MEMORY, 40, 0, 0, start, size, 0, flags | _SRAT_ENABLED)
            for start, size, flags in nodes
        ]
        xsdt, srat = at + 64, at + 128
        self._memory.write(at, struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"JUDGE", 2, 0, 36, xsdt, 0))
        self._memory.write(xsdt, struct.pack("<4sI28xQ", b"XSDT", 44, srat))
        self._memory.write(srat, struct.pack("<4sI40x", b"SRAT", 48 + 40 * len(nodes)) + b"".join(affinity))
        return int(at)
