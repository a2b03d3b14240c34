"""Run the decompressor of a real kernel image on the set-up of a recorded case, and write down what came of it.

The decompressor is entered at startup_64, as by a boot loader that has ended boot services: the memory map is in
boot_params, the table of unaccepted memory is a configuration table. The run ends where the kernel is unpacked.
"""

from __future__ import annotations

from typing import Any

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from bootstub.bzimage import parse_bzimage
from bootstub.kaslr import boot_seed, build_string
from bootstub.kernel_layout import STARTUP_64_OFFSET
from bootstub.setup_header import LoadFlags
from cpu.run import RealCode, RunOptions
from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import EFI_MEMORY_DESCRIPTOR_VERSION, OVMF_DESCRIPTOR_SIZE, MemoryDescriptor, pack_map
from firmware.memory_map import MemoryMap
from firmware.paging import build_identity_map
from firmware.tables import EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE, EFI_SYSTEM_TABLE_SIGNATURE
from guest.records import GuestRecord, field_extents
from guest.trace import Print
from guest.units import PAGE_SIZE, SZ_1M, round_up
from tdx.events import TdCall
from tdx.instructions import Instructions
from tools.conformance.efi_names import guid_of
from tools.conformance.kaslr_seed import physical_slot, tsc_for, virtual_slot
from tools.conformance.record_stub import TIMEOUT_INSTRUCTIONS
from tools.conformance.recorded_td import RecordedTd
from tools.conformance.unaccepted_table import build_table, read_table

_SETUP_HEADER_AT, _SETUP_HEADER_LENGTH_AT = 0x1F1, 0x201
_EL64 = 0x3436_4C45
_TABLE_VERSION = 1
_LOADFLAGS_AT, _ = field_extents(BOOT_PARAMS)["hdr.loadflags"]

SET_UP = ("id", "cmdline", "descs", "memmap", "max_level", "tsc0", "load", "cmdline_pa", "boot_params_pa")
"""Fields of a case that say what is run, and ``table`` without its ``bits_after``; the others say what came of it."""


def run_decompressor(case: dict[str, Any], image: bytes) -> dict[str, Any]:
    """Run the decompressor of ``image``; returns the fields of a recorded case that say what came of it.

    Where the recorded run read the TSC to choose a place, the TSC is set so that the choice is the recorded one. With
    ``chosen_by_tsc`` the case says that ``tsc0`` leads there, as it does where boot_params are the same to the byte.
    """
    run = _Run(case, image)
    if not case.get("chosen_by_tsc"):
        run.choose_as_recorded()
    return run.results()


def record(case: dict[str, Any], image: bytes) -> dict[str, Any]:
    """A case with the set-up of ``case`` and what came of it here; KASLR chooses by the TSC of the set-up."""
    out = _Run(case, image).results()
    table, bits_after = case["table"], out.pop("bits_after")
    set_up = {name: case[name] for name in SET_UP if name in case} | {"init_size": parse_bzimage(image).init_size}
    serial = "".join(f"{line}\r\n" for line in out.pop("serial"))
    set_up["chosen_by_tsc"] = True
    return set_up | out | {"table": table and table | {"bits_after": bits_after}, "serial": serial}


class _Run:
    def __init__(self, case: dict[str, Any], image: bytes) -> None:
        self._case, self._image, self._bzimage = case, image, parse_bzimage(image)
        self._map = [MemoryDescriptor(*fields) for fields in case["memmap"]]
        self._td = RecordedTd(self._map, case["max_level"], tsc0=case["tsc0"])
        self._td.add_memory([(0, SZ_1M)])  # where the decompressor looks for ACPI tables
        self._machine, self._memory = self._td.machine, self._td.machine.memory
        self._machine.trace.stage = "decompress"
        self._load()
        options = RunOptions(skip=True, timeout=TIMEOUT_INSTRUCTIONS)
        self._code = RealCode(self._machine, self._td.physical, image, options)
        self._td.host.instructions = Instructions(self._code.devices)
        self._code.vcpu.tsc = self._td.rdtsc

    def choose_as_recorded(self) -> None:
        """Let KASLR choose the places that it chose in the recorded run."""
        tscs = iter(self._tscs_of_the_choice())

        def rdtsc() -> int:
            self._td.rdtsc()
            return next(tscs, 0)

        self._code.vcpu.tsc = rdtsc

    def results(self) -> dict[str, Any]:
        self._code.decompressor()
        case, accepts = self._case, self._td.accepts()
        output, virtual = self._code.unpacked_for or (None, None)
        table = read_table(self._td.physical, case["table"]["pa"]) if case["table"] else None
        return {
            "output": output,
            "virt": virtual,
            "bits_after": table["bits"] if table else None,
            "loadflags_after": GuestRecord(self._memory, case["boot_params_pa"], BOOT_PARAMS)["hdr.loadflags"],
            "accept": accepts,
            "accept_calls": sum(count for *_, count in accepts),
            "tdcalls": sum(r.event.count for r in self._td.trace.records if isinstance(r.event, TdCall)),
            "serial": [r.event.text for r in self._td.trace.records if isinstance(r.event, Print)],
            "exceptions": {str(vector): count for vector, count in sorted(self._code.vcpu.exceptions.items())},
            "rdtsc": self._td.rdtscs,
        }

    def _load(self) -> None:
        """Put image, command line, tables, boot_params and page tables where the recorded loader put them."""
        case, memory, regs = self._case, self._memory, self._machine.regs
        memory.write(case["load"], self._image[self._bzimage.protected_mode_offset :])
        memory.write(case["cmdline_pa"], case["cmdline"].encode() + b"\0")
        self._write_boot_params()
        regs.cr3 = build_identity_map(memory, Arena(memory, MemoryMap(self._map, [])))
        regs.rip, regs.rsi = case["load"] + STARTUP_64_OFFSET, case["boot_params_pa"]

    def _write_boot_params(self) -> None:
        """What the decompressor needs to find: the setup header, the command line, the memory map, EFI's tables."""
        gpa, header_end = (
            self._case["boot_params_pa"],
            _SETUP_HEADER_LENGTH_AT + 1 + self._image[_SETUP_HEADER_LENGTH_AT],
        )
        self._memory.write(gpa + _SETUP_HEADER_AT, self._image[_SETUP_HEADER_AT:header_end])
        params, memory_map = GuestRecord(self._memory, gpa, BOOT_PARAMS), pack_map(self._map)
        map_at = self._free_pages(len(memory_map))
        self._memory.write(map_at, memory_map)
        for name, value in {
            "hdr.cmd_line_ptr": self._case["cmdline_pa"],
            "efi_info.efi_loader_signature": _EL64,
            "efi_info.efi_systab": self._system_table(),
            "efi_info.efi_memdesc_size": OVMF_DESCRIPTOR_SIZE,
            "efi_info.efi_memdesc_version": EFI_MEMORY_DESCRIPTOR_VERSION,
            "efi_info.efi_memmap": map_at,
            "efi_info.efi_memmap_size": len(memory_map),
        }.items():
            params[name] = value

    def _free_pages(self, size: int) -> int:
        """Where the recorded loader put the memory map: below what it had put in place before."""
        table = self._case["table"]
        return int(table["pa"] if table else self._case["cmdline_pa"]) - round_up(size, PAGE_SIZE)

    def _system_table(self) -> int:
        """A system table with the table of unaccepted memory, if there is one; returns its address."""
        table, memory = self._case["table"], self._memory
        at = next(d.start for d in self._map if d.type == EfiMemoryType.EfiRuntimeServicesData)
        record = GuestRecord(memory, at, EFI_SYSTEM_TABLE)
        record["Hdr.Signature"] = EFI_SYSTEM_TABLE_SIGNATURE
        record["ConfigurationTable"] = entries = at + EFI_SYSTEM_TABLE.sizeof()
        if table is not None:
            data = build_table(
                _TABLE_VERSION, table["unit_size"], table["phys_base"], table["size"], table["bits_before"]
            )
            memory.write(table["pa"], data)
            entry = {"VendorGuid": guid_of("LINUX_UNACCEPTED_MEM_TABLE"), "VendorTable": table["pa"]}
            memory.write(entries, EFI_CONFIGURATION_TABLE.build(entry))
            record["NumberOfTableEntries"] = 1
        return at

    def _tscs_of_the_choice(self) -> list[int]:
        """The values of the TSC that make the recorded choice: for the physical place, then for the virtual one."""
        case, align = self._case, self._bzimage.kernel_alignment
        params = bytearray(self._td.physical.read(case["boot_params_pa"], BOOT_PARAMS_SIZE))
        params[_LOADFLAGS_AT] |= LoadFlags.KASLR_FLAG
        size = round_up(self._bzimage.init_size, align)
        slots = physical_slot(self._map, size, align, case["output"]), virtual_slot(align, case["virt"])
        seed = boot_seed(build_string(self._image), bytes(params))
        return [tsc_for(seed, slot) for slot in slots][2 - case["rdtsc"] :]
