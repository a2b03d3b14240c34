"""Which service is answered by what: one table for all pointers of both service tables."""

from __future__ import annotations

from firmware.boot_services import EfiServices, Handler
from firmware.counter import MonotonicCounter
from firmware.efi_types import EfiStatus
from firmware.event_services import EventServices
from firmware.image_services import ImageServices
from firmware.locate_services import LocateServices
from firmware.memory_services import MemoryServices
from firmware.misc_services import MiscServices
from firmware.protocol_services import ProtocolServices
from firmware.runtime_services import RuntimeServices
from firmware.variable_services import VariableServices

NOT_OFFERED = (
    "Reserved",
    "GetTime",
    "SetTime",
    "GetWakeupTime",
    "SetWakeupTime",
    "UpdateCapsule",
    "QueryCapsuleCapabilities",
)
"""Services that answer EFI_UNSUPPORTED to everything: there is no clock of the world here, and no capsules.

Parts of others are not offered either: signed variables, images by device path, machine code that the firmware would
have to call (StartImage(), functions of events). They say so where they are called.
"""


def all_handlers(services: EfiServices) -> dict[str, Handler]:
    """What answers each service, by name."""
    counter = MonotonicCounter()
    families = (
        MemoryServices(services),
        EventServices(services),
        ProtocolServices(services),
        LocateServices(services),
        ImageServices(services),
        MiscServices(services, counter),
        VariableServices(services),
        RuntimeServices(services, counter),
    )
    handlers: dict[str, Handler] = dict.fromkeys(NOT_OFFERED, _unsupported)
    for family in families:
        handlers |= family.handlers()
    return handlers


def _unsupported(*args: int) -> int:
    return EfiStatus.EFI_UNSUPPORTED
