"""Our kernel stages on the set-up of a recorded boot of a real kernel.

They begin where the recorded stub ended: with its memory map, its e820 table and its table of unaccepted memory. What
the kernel does up to its page allocator is compared: the log's lines about memory, each accept_memory() of memblock in
order, and what the TD had to accept for them. From there to ``/init`` the real kernel allocates for itself; how much is
accepted by then is compared to 5 %, with allocations that are counted, not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE, EFI64_LOADER_SIGNATURE, build_e820_table
from bootstub.efi_e820 import e820_entries
from bootstub.unaccepted_table import EFI_UNACCEPTED_MEMORY, TABLE_VERSION, UnacceptedTable
from firmware.efi_types import LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, EfiMemoryType, guid_bytes
from firmware.memory_descriptor import OVMF_DESCRIPTOR_SIZE, MemoryDescriptor, pack_map
from firmware.tables import EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE
from guest.machine import Machine
from guest.records import GuestRecord, field_extents
from guest.trace import Print
from guest.units import PAGE_SHIFT, PAGE_SIZE
from kernel.kernel import Kernel
from kernel.mm_init import mm_init
from kernel.setup_arch import setup_arch
from kernel.version import V6_12
from tdx.guest import tdx_accept_memory
from tools.conformance.left_out import LeftOut
from tools.conformance.recorded_td import RecordedTd
from tools.conformance.stub import first_difference

_LOADER_PAGES = 5
"""boot_params, command line, memory map (two pages), system table: what the stub has in EfiLoaderData."""
_MEMBLOCK = {"memblock_alloc_range_nid", "memblock_double_array"}
"""Callers of accept_memory() that are memblock's."""
_TOLERANCE = 0.05
_CALLS_BEFORE_WATERMARKS, _CALLS_PER_SECTION = 65, 0.9
"""Order-0 requests between page_alloc_init_late() and init_per_zone_wmark_min(), each of which accepts a block: fitted
to the recorded boots. Those for each section of 128 MiB are for its device in /sys (memory_dev_init())."""
_FIRST_SECTION_BLOCKS = 32
"""Blocks of the first section of a zone, which wait for nobody: all are accepted before deferred pages are freed."""


def compare(case: dict[str, Any]) -> list[str]:
    """The differences, one line each."""
    kernel, lines, pending = _run(case)
    recorded = [[call["start"], call["size"]] for call in case["accept_memory_calls"] if _MEMBLOCK & set(call["by"])]
    pairs: dict[str, tuple[Any, Any]] = {
        "e820": (_starting(lines, "BIOS-e820: "), _stripped(case["e820"])),
        "zones": (_after(lines, "Zone ranges:"), _stripped(case["zones"])),
        "early_nodes": (_after(lines, "Early memory node ranges"), _stripped(case["early_nodes"])),
        "memory total": (_total(lines), _total([case["memory_line"]])),
        "accept_memory of memblock": ([[r.start, r.size] for r in kernel.memblock.accepted], recorded),
    }
    if not kernel.early.lazy_accept:  # nothing is left for later
        pairs["still pending"] = (pending, case["still_pending"])
    accepted, theirs = _accepted_at_init(kernel, case, pending)
    far = abs(accepted - theirs) > theirs * _TOLERANCE
    pairs["accepted at /init, KiB"] = (accepted, theirs) if far else (0, 0)
    return [f"{name}: {first_difference(ours, theirs)}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def _accepted_at_init(kernel: Kernel, case: dict[str, Any], pending: list[list[int]]) -> tuple[int, int]:
    """KiB that are accepted after the stub and before /init, here and there."""
    allocator, meminfo = kernel.allocator, dict(reversed(case["meminfo"]))
    assert allocator is not None
    total = sum(end - start for start, end in case["still_pending"]) >> 10
    total += sum(count << 12 + 9 * level for _, level, status, count in case["accept_kernel"] if not status) >> 10
    used = (meminfo["MemTotal"] - meminfo["MemFree"]) >> PAGE_SHIFT - 10
    sections = len({at for r in kernel.memblock.memory.regions for at in range(r.base >> 27, (r.end - 1 >> 27) + 1)})
    early = _FIRST_SECTION_BLOCKS + _CALLS_BEFORE_WATERMARKS + round(_CALLS_PER_SECTION * sections)
    before = _unaccepted(kernel)
    for _ in range(early):
        allocator.alloc_pages()
    allocator.init_per_zone_wmark_min(transparent_hugepage=True)
    for _ in range(max(used - early, 0)):
        allocator.alloc_pages()
    ours = total - (sum(end - start for start, end in pending) >> 10) + before - _unaccepted(kernel)
    return ours, total - meminfo["Unaccepted"]


def _unaccepted(kernel: Kernel) -> int:
    """KiB that wait on the zones' lists."""
    assert kernel.allocator is not None
    return sum(zone.nr_unaccepted for zone in kernel.allocator.zones) << PAGE_SHIFT - 10


def _run(case: dict[str, Any]) -> tuple[Kernel, list[str], list[list[int]]]:
    """Run the stages; the kernel, its log, and what is not accepted then."""
    td = RecordedTd.of_boot(case)
    machine = td.machine
    descriptors = [MemoryDescriptor(*fields) for fields in case["map_at_exit"]]
    _leave_as_the_stub(machine, case, descriptors)
    kernel = setup_arch(machine, V6_12)
    mm_init(kernel)
    return kernel, [r.event.text for r in machine.trace.records if isinstance(r.event, Print)], td.still_pending()


def _leave_as_the_stub(machine: Machine, case: dict[str, Any], descriptors: list[MemoryDescriptor]) -> None:
    """boot_params and what it leads to, in the loader's data; the table of unaccepted memory at its recorded place."""
    room = next(
        (d for d in descriptors if d.type == EfiMemoryType.EfiLoaderData and d.pages >= _LOADER_PAGES), None
    )  # fmt: skip
    if room is None:
        raise LeftOut("the recorded stub left no loader data")
    params, line, memmap, system = (room.start + PAGE_SIZE * page for page in (0, 1, 2, 4))
    memory = machine.memory
    memory.clear(params, params + BOOT_PARAMS_SIZE)
    memory.write(line, case["cmdline"].encode()[: PAGE_SIZE - 1] + b"\0")
    packed = pack_map(descriptors, OVMF_DESCRIPTOR_SIZE)
    memory.write(memmap, packed)
    _system_table(machine, system, case)
    record = GuestRecord(memory, params, BOOT_PARAMS)
    entries = e820_entries(descriptors)
    memory.write(params + field_extents(BOOT_PARAMS)["e820_table"][0], build_e820_table(entries))
    fields = {
        "e820_entries": len(entries), "hdr.cmd_line_ptr": line, "hdr.type_of_loader": 0x21,
        "efi_info.efi_loader_signature": EFI64_LOADER_SIGNATURE, "efi_info.efi_systab": system,
        "efi_info.efi_memmap": memmap, "efi_info.efi_memmap_size": len(packed),
        "efi_info.efi_memdesc_size": OVMF_DESCRIPTOR_SIZE, "efi_info.efi_memdesc_version": 1,
    }  # fmt: skip
    for name, value in fields.items():
        record[name] = value
    machine.regs.rsi, machine.regs.rip = params, case["kernel_pa"]
    _unaccepted_table(machine, case["table"], descriptors)


def _system_table(machine: Machine, at: int, case: dict[str, Any]) -> None:
    """A system table without services, which names the table of unaccepted memory."""
    memory, tables = machine.memory, at + EFI_SYSTEM_TABLE.sizeof()
    memory.clear(at, tables + EFI_CONFIGURATION_TABLE.sizeof())
    record = GuestRecord(memory, at, EFI_SYSTEM_TABLE)
    if case["table"] is not None:
        guid, address = guid_bytes(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID), case["table"]["pa"].to_bytes(8, "little")
        memory.write(tables, guid + address)
    record["NumberOfTableEntries"] = int(case["table"] is not None)
    record["ConfigurationTable"] = tables
    record["FirmwareVendor"] = tables


def _unaccepted_table(machine: Machine, table: dict[str, Any] | None, descriptors: list[MemoryDescriptor]) -> None:
    """The table as the stub left it: what it could not describe is accepted."""
    if table is None:
        return
    fields = {"version": TABLE_VERSION, **{name: table[name] for name in ("unit_size", "phys_base", "size")}}
    machine.memory.write(table["pa"], EFI_UNACCEPTED_MEMORY.build(fields) + bytes(table["size"]))
    found = UnacceptedTable.at(machine.memory, table["pa"])
    for d in descriptors:
        if d.type == EfiMemoryType.EfiUnacceptedMemoryType:
            found.process(lambda start, end: _accept(machine, start, end), d.start, d.end)


def _accept(machine: Machine, start: int, end: int) -> None:
    if not tdx_accept_memory(machine, start, end):
        raise machine.panic(f"accepting [{start:#x}, {end:#x}) failed")


def _stripped(lines: list[str]) -> list[str]:
    return [line.rstrip() for line in lines]


def _starting(lines: list[str], prefix: str) -> list[str]:
    return [line.rstrip() for line in lines if line.startswith(prefix)]


def _after(lines: list[str], title: str) -> list[str]:
    """The lines behind ``title`` that are its list."""
    found: list[str] = []
    for line in lines[lines.index(title) + 1 :] if title in lines else ():
        if not line.startswith("  "):
            break
        found.append(line.rstrip())
    return found


def _total(lines: Sequence[str | None]) -> str:
    """All present memory, by the ``Memory:`` line."""
    line = next((line for line in lines if line and line.startswith("Memory: ")), "")
    return line.partition("/")[2].partition(" ")[0]
