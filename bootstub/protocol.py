"""What differs between the ways in which Linux learned to handle unaccepted memory: one table of facts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Protocol:
    """Facts of one version of the boot code.

    ``efi_mmap_nr_slack_slots``: descriptors that the stub keeps room for because its own calls may split the map
    (drivers/firmware/efi/libstub/efistub.h, EFI_MMAP_NR_SLACK_SLOTS).
    """

    name: str
    efi_mmap_nr_slack_slots: int


V9 = Protocol(name="v9", efi_mmap_nr_slack_slots=8)
"""[PATCHv9 00/14] Implement support for unaccepted memory, on 6.3-rc."""

PROTOCOLS = {protocol.name: protocol for protocol in (V9,)}
