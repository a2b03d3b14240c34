"""Leaving UEFI: bitmap, ExitBootServices(), and the e820 table out of the last memory map.

Source: drivers/firmware/efi/libstub/x86-stub.c (6.3) with v9 05/14, 07/14 and 11/14: allocate_e820(), exit_boot(),
setup_e820(); efi_exit_boot_services() in efi-stub-helper.c.
"""

from __future__ import annotations

from bootstub.boot_params import (
    BOOT_E820_ENTRY,
    BOOT_PARAMS,
    E820_MAX_ENTRIES_ZEROPAGE,
    EFI64_LOADER_SIGNATURE,
    BootE820Entry,
    build_e820_table,
)
from bootstub.efi_call import BootMemmap, EfiCalls, EfiError
from bootstub.efi_e820 import continues, e820_type_of
from bootstub.protocol import Protocol
from bootstub.setup_data import SETUP_DATA, SetupDataType, walk_setup_data
from bootstub.unaccepted_memory import Accept
from firmware.efi_types import EFI_PCI_IO_PROTOCOL_GUID, EfiMemoryType, EfiStatus
from firmware.memory_descriptor import MemoryDescriptor, unpack_map
from guest.machine import Machine
from guest.records import GuestRecord, field_extents

_ENTRY_SIZE = BOOT_E820_ENTRY.sizeof()
_SETUP_DATA_SIZE = SETUP_DATA.sizeof()
ALT_MEM_K = 32 * 1024


class ExitBoot:
    """exit_boot() for the boot_params page at ``boot_params``.

    ``accept`` accepts a range now. ``soft_reserve``: memory with EFI_MEMORY_SP becomes soft reserved
    (CONFIG_EFI_SOFT_RESERVE, not ``efi=nosoftreserve``). ``disable_pci_dma``: bridges are looked for first; there is
    none here that could be told to be no bus master.
    """

    def __init__(
        self, machine: Machine, efi: EfiCalls, boot_params: int, accept: Accept, protocol: Protocol,
        soft_reserve: bool = True, disable_pci_dma: bool = False,
    ) -> None:  # fmt: skip
        self._machine, self._efi = machine, efi
        self._boot_params = GuestRecord(machine.memory, boot_params, BOOT_PARAMS)
        self._protocol = protocol
        self._record = protocol.record(machine, efi, self._boot_params, accept)
        self._slack = protocol.efi_mmap_nr_slack_slots
        self._soft_reserve, self._disable_pci_dma = soft_reserve, disable_pci_dma
        self._e820ext = self._e820ext_size = 0

    def run(self, image_handle: int) -> int:
        """Do it all; returns the EFI_STATUS. After EFI_BUFFER_TOO_SMALL, accepts that were made stay made."""
        try:
            self._allocate_e820()
            self._exit_boot_services(image_handle)
            self._boot_params["alt_mem_k"] = ALT_MEM_K
            self._setup_e820()
        except EfiError as error:
            return error.status
        return EfiStatus.EFI_SUCCESS

    def _allocate_e820(self) -> None:
        """Room for entries beyond 128, and the bitmap, both sized by the memory map of this moment."""
        memmap = self._efi.get_memory_map(self._slack)
        try:
            beyond = memmap.nr_desc - E820_MAX_ENTRIES_ZEROPAGE + self._slack
            if beyond > 0:
                self._e820ext_size = _SETUP_DATA_SIZE + _ENTRY_SIZE * beyond
                self._e820ext = self._efi.allocate_pool(self._e820ext_size)
            if self._protocol.unaccepted_memory:
                self._record.allocate(self._efi.descriptors(memmap))
        finally:
            self._efi.free_pool(memmap.pool)

    def _exit_boot_services(self, image_handle: int) -> None:
        """Two tries: a changed map makes the first fail, and then nothing may be allocated any more."""
        if self._disable_pci_dma:
            self._efi.locate_handles(EFI_PCI_IO_PROTOCOL_GUID)
        memmap = self._efi.get_memory_map(self._slack, install=True)
        self._record_memmap(memmap)
        if self._efi.boot("ExitBootServices", image_handle, memmap.map_key) == EfiStatus.EFI_SUCCESS:
            return
        memmap = self._efi.refresh_memory_map(memmap.gpa, memmap.buff_size)
        self._record_memmap(memmap)
        status = self._efi.boot("ExitBootServices", image_handle, memmap.map_key)
        if status != EfiStatus.EFI_SUCCESS:
            raise EfiError(status)

    def _record_memmap(self, memmap: BootMemmap) -> None:
        """exit_boot_func(): efi_info names the map that the kernel will read."""
        params, system_table = self._boot_params, self._efi.system_table.gpa
        params["efi_info.efi_loader_signature"] = EFI64_LOADER_SIGNATURE
        params["efi_info.efi_systab"] = system_table & 0xFFFF_FFFF
        params["efi_info.efi_systab_hi"] = system_table >> 32
        params["efi_info.efi_memdesc_size"] = memmap.desc_size
        params["efi_info.efi_memdesc_version"] = memmap.desc_ver
        params["efi_info.efi_memmap"] = memmap.gpa & 0xFFFF_FFFF
        params["efi_info.efi_memmap_hi"] = memmap.gpa >> 32
        params["efi_info.efi_memmap_size"] = memmap.map_size

    def _setup_e820(self) -> None:
        """Translate the final map, descriptor by descriptor, in its order."""
        params = self._boot_params
        at = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
        stride = params["efi_info.efi_memdesc_size"]
        data = self._machine.memory.read(at, params["efi_info.efi_memmap_size"])
        descriptors = unpack_map(data, stride, at=at)
        entries: list[BootE820Entry] = []
        lost = 0
        for number, d in enumerate(descriptors):
            kind = e820_type_of(d, self._soft_reserve)
            if kind is None:
                continue
            if d.type == EfiMemoryType.EfiUnacceptedMemoryType:
                if not self._protocol.unaccepted_memory:
                    lost += d.end - d.start
                    continue
                self._record.process(d.start, d.end)
            self._append(entries, d, kind, len(descriptors) - number)
        self._store(entries)
        if lost:
            self._tell_of_loss(lost)

    def _tell_of_loss(self, lost: int) -> None:
        """A kernel without CONFIG_UNACCEPTED_MEMORY skips unaccepted memory.

        v9's says so by efi_warn_once(), on a console that is gone with boot services; 6.12's is silent.
        """
        if self._protocol.warns:
            self._machine.print("EFI stub: WARNING: The system has unaccepted memory,  but kernel does not support it")
            self._machine.print("Consider enabling CONFIG_UNACCEPTED_MEMORY")
        self._machine.note(f"{lost >> 10} KiB of unaccepted memory are left out of the e820 table")

    def _append(self, entries: list[BootE820Entry], d: MemoryDescriptor, kind: int, left: int) -> None:
        """Add an entry, or let the previous one grow if it ends here and has the same type."""
        last = entries[-1] if entries else None
        if last is not None and continues(last, d, kind):
            entries[-1] = BootE820Entry(last.addr, last.size + d.end - d.start, kind)
            return
        if len(entries) == E820_MAX_ENTRIES_ZEROPAGE and self._e820ext_size < left * _ENTRY_SIZE + _SETUP_DATA_SIZE:
            raise EfiError(EfiStatus.EFI_BUFFER_TOO_SMALL)
        entries.append(BootE820Entry(d.start, d.end - d.start, kind))

    def _store(self, entries: list[BootE820Entry]) -> None:
        """128 entries go into boot_params, the rest behind them as SETUP_E820_EXT."""
        table, beyond = entries[:E820_MAX_ENTRIES_ZEROPAGE], entries[E820_MAX_ENTRIES_ZEROPAGE:]
        offset, _ = field_extents(BOOT_PARAMS)["e820_table"]
        self._machine.memory.write(self._boot_params.gpa + offset, build_e820_table(table))
        self._boot_params["e820_entries"] = len(table)
        if beyond:
            self._add_e820ext(build_e820_table(beyond))

    def _add_e820ext(self, table: bytes) -> None:
        """Link the extension behind the last node of setup_data."""
        memory = self._machine.memory
        fields = {"next": 0, "type": SetupDataType.SETUP_E820_EXT, "len": len(table)}
        memory.write(self._e820ext, SETUP_DATA.build(fields) + table)
        nodes = list(walk_setup_data(memory.read, self._boot_params["hdr.setup_data"]))
        if nodes:
            memory.write_uint(nodes[-1].gpa, self._e820ext, 8)
        else:
            self._boot_params["hdr.setup_data"] = self._e820ext
