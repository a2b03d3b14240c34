"""The protocols by which an image and the firmware agree on unaccepted memory.

EDKII_MEMORY_ACCEPT_PROTOCOL accepts a range for the image; OVMF has it in a TD. OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL,
which OVMF has under SEV-SNP, lets an image say that it accepts memory itself: without its call the firmware accepts
all of it when boot services end, the memory map changes, and the first ExitBootServices() fails.
Source: edk2 MdePkg/Include/Protocol/MemoryAccept.h, OvmfPkg/Include/Protocol/SevMemoryAcceptance.h, TdxDxe, AmdSevDxe.
"""

from __future__ import annotations

import construct as c

from firmware.accept_policy import accept_range
from firmware.boot_services import EfiServices
from firmware.efi_types import (
    CACHEABLE,
    EDKII_MEMORY_ACCEPT_PROTOCOL_GUID,
    EFI_EVENT_GROUP_BEFORE_EXIT_BOOT_SERVICES,
    OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL_GUID,
    EfiMemoryType,
    EfiStatus,
)
from guest.machine import Machine
from guest.registers import Registers
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, PMD_SIZE, round_down, round_up
from tdx.leaves import Leaf
from tdx.sept import LEVEL_2M, LEVEL_4K, LEVEL_SIZE
from tdx.status import TDX_PAGE_ALREADY_ACCEPTED, TDX_PAGE_SIZE_MISMATCH

EDKII_MEMORY_ACCEPT_PROTOCOL = c.Struct("AcceptMemory" / c.Int64ul)
OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL = c.Struct("AllowUnacceptedMemory" / c.Int64ul)
_DETAILS = 0xFFFF_FFFF


def install_memory_accept(services: EfiServices) -> None:
    """Offer EDKII_MEMORY_ACCEPT_PROTOCOL. The memory map stays as it is: it says what the firmware knows."""

    def accept_memory(this: int, start: int, size: int) -> int:
        end = start + size
        if start % PAGE_SIZE or size % PAGE_SIZE or end > PHYSICAL_ADDRESS_END:
            return EfiStatus.EFI_INVALID_PARAMETER
        done = accept_what_is_left(services.machine, start, end)
        return EfiStatus.EFI_SUCCESS if done else EfiStatus.EFI_DEVICE_ERROR

    code = EfiMemoryType.EfiBootServicesCode
    (gate,) = services.install_gates((("AcceptMemory", 3),), code, accept_memory)
    data = EDKII_MEMORY_ACCEPT_PROTOCOL.build({"AcceptMemory": gate})
    protocol = services.arena.put(EfiMemoryType.EfiBootServicesData, data)
    services.install_protocol(services.new_object(), EDKII_MEMORY_ACCEPT_PROTOCOL_GUID, protocol)


def install_memory_acceptance(services: EfiServices) -> None:
    """Offer OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL, and accept all memory at the exit if nobody calls it."""
    allowed = False

    def allow_unaccepted_memory(this: int) -> int:
        nonlocal allowed
        allowed = True
        return EfiStatus.EFI_SUCCESS

    def before_exit() -> None:
        if not allowed:
            accept_all(services)

    services.events.on_group(EFI_EVENT_GROUP_BEFORE_EXIT_BOOT_SERVICES, before_exit)
    code = EfiMemoryType.EfiBootServicesCode
    (gate,) = services.install_gates((("AllowUnacceptedMemory", 1),), code, allow_unaccepted_memory)
    data = OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL.build({"AllowUnacceptedMemory": gate})
    protocol = services.arena.put(EfiMemoryType.EfiBootServicesData, data)
    services.install_protocol(services.new_object(), OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL_GUID, protocol)


def accept_all(services: EfiServices) -> None:
    """Accept every unaccepted range of the map, which becomes ordinary free memory."""
    for d in services.memory_map.descriptors():
        if d.type == EfiMemoryType.EfiUnacceptedMemoryType:
            accept_range(services.machine, d.start, d.end)
            services.memory_map.add(d, EfiMemoryType.EfiConventionalMemory, CACHEABLE)


def accept_what_is_left(machine: Machine, start: int, end: int) -> bool:
    """Accept what is not accepted yet of ``[start, end)``: 2 MiB pages where they fit, else 4 KiB.

    False if a page was refused for another reason; what came before stays accepted.
    Source: edk2 OvmfPkg/TdxDxe TdxMemoryAccept(), MdePkg/Library/TdxLib TdAcceptPages().
    """
    border = min(round_up(start, PMD_SIZE), end)
    tail = max(border, round_down(end, PMD_SIZE))
    pieces = ((start, border, LEVEL_4K), (border, tail, LEVEL_2M), (tail, end, LEVEL_4K))
    return all(_accept(machine, low, high, level) for low, high, level in pieces)


def _accept(machine: Machine, start: int, end: int, level: int) -> bool:
    """Accept whole pages of ``level``, or of 4 KiB where the host has no larger ones."""
    size, gpa = LEVEL_SIZE[level], start
    while gpa < end:
        regs = Registers(rax=Leaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa | level)
        gpa += machine.platform.tdcall_run(regs, size, (end - gpa) // size) * size
        if gpa == end:
            break
        status = regs.rax & ~_DETAILS
        if status == TDX_PAGE_SIZE_MISMATCH and level == LEVEL_2M:
            if not _accept(machine, gpa, gpa + size, LEVEL_4K):
                return False
        elif status != TDX_PAGE_ALREADY_ACCEPTED:
            return False
        gpa += size
    return True
