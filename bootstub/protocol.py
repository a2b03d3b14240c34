"""What differs between the ways in which Linux learned to handle unaccepted memory: one table of facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol as Interface

from bootstub.efi_call import EfiCalls
from bootstub.unaccepted_memory import Accept, BitmapOfStub
from bootstub.unaccepted_table import TableOfStub
from firmware.memory_descriptor import MemoryDescriptor
from guest.machine import Machine
from guest.records import GuestRecord
from tdx.guest import tdx_accept_memory, tdx_accept_memory_v9


class UnacceptedRecord(Interface):
    """Where a stub writes down what memory is unaccepted."""

    def allocate(self, descriptors: Iterable[MemoryDescriptor]) -> None:
        """Make room for a record of what is unaccepted in this memory map, while boot services run."""
        ...

    def process(self, start: int, end: int) -> None:
        """Put ``[start, end)`` on record, and accept at once what the record cannot describe."""
        ...


@dataclass(frozen=True, slots=True)
class Protocol:
    """Facts of one version of the boot code.

    ``efi_mmap_nr_slack_slots``: descriptors that the stub keeps room for because its own calls may split the map
    (drivers/firmware/efi/libstub/efistub.h, EFI_MMAP_NR_SLACK_SLOTS). ``unpacks_in_stub``: the stub itself unpacks
    the kernel, while boot services run; there is no decompressor behind it. ``record``: how unaccepted memory is
    handed on. ``accept``: how a TD accepts a range. ``warns``: a kernel without support says so when it loses memory.
    ``cc_measurement``: without a TPM the stub looks for EFI_CC_MEASUREMENT_PROTOCOL, as since 6.9.
    ``unaccepted_memory``: CONFIG_UNACCEPTED_MEMORY, the kernel has that support.
    """

    name: str
    efi_mmap_nr_slack_slots: int
    unpacks_in_stub: bool
    record: Callable[[Machine, EfiCalls, GuestRecord, Accept], UnacceptedRecord]
    accept: Callable[[Machine, int, int], bool]
    warns: bool
    cc_measurement: bool
    unaccepted_memory: bool = True

    def without_support(self) -> Protocol:
        """The same code, built without CONFIG_UNACCEPTED_MEMORY."""
        return replace(self, unaccepted_memory=False)


V9 = Protocol("v9", 8, False, BitmapOfStub, tdx_accept_memory_v9, warns=True, cc_measurement=False)
"""[PATCHv9 00/14] Implement support for unaccepted memory, on 6.3-rc."""

MAINLINE = Protocol("mainline", 32, True, TableOfStub, tdx_accept_memory, warns=False, cc_measurement=True)
"""What was merged for 6.5, in the shape of 6.12."""

PROTOCOLS = {protocol.name: protocol for protocol in (V9, MAINLINE)}
