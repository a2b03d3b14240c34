"""What all UEFI services share: the memory map, handles, events, variables, and how a call reaches a service.

The services themselves are in one file per family (``service_table`` names them). They are reached through the
function pointers of the tables in guest memory; arguments and results travel as the specification has them:
pointers into guest memory, EFI_STATUS as the return value.
Source: UEFI 2.10, chapters 7 and 8; behaviour of edk2 where the specification leaves a choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias
from uuid import UUID

from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType, EfiStatus, guid_bytes
from firmware.events import Events
from firmware.memory_descriptor import OVMF_DESCRIPTOR_SIZE
from firmware.memory_map import MemoryMap
from firmware.protocols import HandleDatabase
from firmware.tables import BOOT_SERVICES, NARROW_ARGUMENTS, VARIADIC
from firmware.variables import VariableStore
from guest.gates import CallGate
from guest.machine import Machine
from guest.units import PHYSICAL_ADDRESS_END

Handler: TypeAlias = Callable[..., int]

_GATE_SIZE = 16
_UD2 = b"\x0f\x0b"  # what an emulated CPU finds at a gate: it stops there
_GONE_AFTER_A_FAILED_EXIT = frozenset(name for name, _ in BOOT_SERVICES) - {"GetMemoryMap", "ExitBootServices", "Exit"}
_ALLOCATES = frozenset({"AllocatePages", "FreePages", "AllocatePool", "FreePool"})


class Phase(Enum):
    """How far an image has come with leaving boot services."""

    BOOT = auto()
    EXIT_FAILED = auto()
    """ExitBootServices() failed: the firmware may have shut down in part (UEFI 2.10, section 7.4.6).

    Only the map may be asked for then, and the exit be tried again. UEFI 2.9 and later let a loader allocate memory,
    too, but no loader can rely on it: this firmware is one of UEFI 2.7, as OVMF is.
    """
    EXITING = auto()
    """The functions of the exit's event group run; they must not allocate (UEFI 2.10, section 7.1.2)."""
    RUNTIME = auto()


@dataclass(frozen=True, slots=True)
class Image:
    """An image that LoadImage() brought in; ``size`` is that of its pages, in bytes. It can be started once."""

    base: int
    size: int
    size_of_image: int
    entry: int
    started: bool = False


@dataclass(slots=True)
class EfiServices:
    """State behind the services. ``handlers`` answer them, by name; ``build_system_table`` fills in those missing."""

    machine: Machine
    memory_map: MemoryMap
    arena: Arena
    variables: VariableStore = field(default_factory=VariableStore)
    handlers: dict[str, Handler] = field(default_factory=dict)
    handles: HandleDatabase = field(default_factory=HandleDatabase)
    images: dict[int, Image] = field(default_factory=dict)
    events: Events = field(init=False)
    system_table: int = 0
    phase: Phase = Phase.BOOT
    watchdog: int | None = None
    """Virtual time at which the watchdog timer ends the guest, in ns."""
    top: int = PHYSICAL_ADDRESS_END
    """Nothing is allocated from here on."""
    descriptor_size: int = OVMF_DESCRIPTOR_SIZE
    _pools: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.events = Events(self.machine)

    def install_gates(
        self, names: Iterable[tuple[str, int]], code: EfiMemoryType, handler: Handler | None = None
    ) -> list[int]:
        """A call gate in memory of type ``code`` for each (name, number of arguments); returns their addresses.

        ``handler`` answers them; by default the service of that name does. Gates in boot services code answer
        until ExitBootServices().
        """
        named = list(names)
        at = self.arena.put(code, _UD2.ljust(_GATE_SIZE, b"\xcc") * len(named))
        addresses = [at + _GATE_SIZE * number for number in range(len(named))]
        for address, (name, nargs) in zip(addresses, named, strict=True):
            answer = self._guarded(name, code, _narrowed(name, handler or self.handlers[name]))
            self.machine.gates.install(address, CallGate(name, nargs, answer, name in VARIADIC))
        return addresses

    def new_object(self, signature: bytes = b"hndl") -> int:
        """The address of an object that only the firmware looks into: an EFI_HANDLE, as in edk2, or an EFI_EVENT."""
        return self.arena.put(EfiMemoryType.EfiBootServicesData, signature)

    def install_protocol(self, handle: int, guid: UUID, interface: int) -> None:
        """Let ``handle`` carry the protocol ``guid`` whose structure is at ``interface``; tell who waits for one."""
        for event in self.handles.install(handle, guid_bytes(guid), interface):
            self.events.signal(event)

    def allocate_pool(self, memory_type: int, size: int) -> int | None:
        """Memory for ``size`` bytes; None if there is none. Every pool buffer has pages of its own here."""
        address = self.memory_map.allocate(memory_type, max(size, 1), self.top)
        if address is not None:
            self._pools[address] = max(size, 1)
        return address

    def free_pool(self, address: int) -> bool:
        """Give a pool buffer back; False if it is none."""
        size = self._pools.pop(address, None)
        return size is not None and self.memory_map.free(address, size)

    def hand_out(self, data: bytes, pointer: int) -> EfiStatus:
        """Put ``data`` into a pool buffer that the caller is to free, and its address into ``*pointer``."""
        buffer = self.allocate_pool(EfiMemoryType.EfiBootServicesData, len(data))
        if buffer is None:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        self.machine.memory.write(buffer, data)
        self.machine.memory.write_uint(pointer, buffer, 8)
        return EfiStatus.EFI_SUCCESS

    def _guarded(self, name: str, code: EfiMemoryType, handler: Handler) -> Handler:
        """``handler``, refusing to run where a boot service is not there any more."""

        def boot_service(*args: int) -> int:
            self._check_phase(name)
            if self.watchdog is not None and self.machine.clock.ns >= self.watchdog:
                raise self.machine.panic("the watchdog timer expired")
            self.events.expire()
            return handler(*args)

        return boot_service if code == EfiMemoryType.EfiBootServicesCode else handler

    def _check_phase(self, name: str) -> None:
        if self.phase is Phase.RUNTIME:
            raise self.machine.panic(f"boot service {name} called after ExitBootServices")
        if self.phase is Phase.EXIT_FAILED and name in _GONE_AFTER_A_FAILED_EXIT:
            raise self.machine.panic(f"boot service {name} called after ExitBootServices failed")
        if self.phase is Phase.EXITING and name in _ALLOCATES:
            raise self.machine.panic(f"boot service {name} called by an event of ExitBootServices")


def _narrowed(name: str, handler: Handler) -> Handler:
    """``handler``, which sees of each argument the bits that the service ``name`` has for it."""
    masks = NARROW_ARGUMENTS.get(name)
    if masks is None:
        return handler

    def narrowed(*args: int) -> int:
        return handler(*(arg & masks[number] if number in masks else arg for number, arg in enumerate(args)))

    return narrowed
