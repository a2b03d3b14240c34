"""The firmware of a recorded run: ours, set up as the recorded one was, with a kernel image loaded.

What the firmware did in a recorded run follows from the case: ``descs``, the platform's memory map before the
firmware took memory for itself, and settings that are explained where they are used.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from firmware.arena import Arena
from firmware.boot_services import EfiServices
from firmware.efi_types import EFI_LOADED_IMAGE_PROTOCOL_GUID, EfiMemoryType, EfiStatus, guid_bytes
from firmware.file_system import FileSystem
from firmware.image_services import ImageServices
from firmware.load_image import FwCfg, LoadedImage, install_initrd, load_image
from firmware.memory_descriptor import OVMF_DESCRIPTOR_SIZE, MemoryDescriptor
from firmware.memory_map import MemoryMap
from firmware.memory_services import MemoryServices
from firmware.paging import build_identity_map
from firmware.platform_init import build_stack
from firmware.rng import install_rng, repeating
from firmware.setup import Setup, install_offers
from firmware.system_table import build_system_table
from firmware.tables import EFI_LOADED_IMAGE_PROTOCOL
from firmware.variables import Variable, VariableStore
from guest.ranges import Range
from guest.records import GuestRecord
from guest.units import PAGE_SHIFT, PAGE_SIZE, SZ_4G
from tools.conformance.efi_names import guid_of
from tools.conformance.recorded_td import RecordedTd
from tools.conformance.unaccepted_table import build_table

# What the firmware takes for itself from the top of the RAM below 4 GiB downwards: type and pages.
_OWN_MEMORY = (
    (EfiMemoryType.EfiRuntimeServicesCode, 2),
    (EfiMemoryType.EfiRuntimeServicesData, 4),
    (EfiMemoryType.EfiBootServicesData, 39),
)


class _Map(MemoryMap):
    """A memory map that is listed by address, or, with ``shuffle``, in an order that this seed gives."""

    def __init__(self, descriptors: list[MemoryDescriptor], shuffle: int | None) -> None:
        super().__init__((d for d in descriptors if d.pages), (d for d in descriptors if not d.pages))
        self._shuffle = shuffle

    def descriptors(self) -> list[MemoryDescriptor]:
        """The map as GetMemoryMap() lists it."""
        listed = sorted(super().descriptors(), key=lambda d: d.start)
        if self._shuffle is not None:
            random.Random(self._shuffle).shuffle(listed)
        return listed


@dataclass(slots=True, kw_only=True)
class RecordedServices(EfiServices):
    """Services that keep the maps that they handed out, and refuse to end as often as the case says.

    ``ebs_fail`` calls of ExitBootServices() fail; at the first, the ranges of ``ebs_mutate``, ``[0, start, pages,
    type]``, get another type, as event handlers of the firmware may do it, which accept memory where needed.
    """

    td: RecordedTd
    ebs_fail: int
    ebs_mutate: list[list[int]]
    maps: list[list[MemoryDescriptor]] = field(default_factory=list)
    exit_status: int | None = None
    _memory_services: MemoryServices = field(init=False)
    _image_services: ImageServices = field(init=False)

    def __post_init__(self) -> None:
        EfiServices.__post_init__(self)
        self._memory_services, self._image_services = MemoryServices(self), ImageServices(self)
        self.handlers = {
            "GetMemoryMap": self._get_memory_map,
            "ExitBootServices": self._exit_boot_services,
            "Exit": self._exit,
        }

    def _get_memory_map(self, *args: int) -> int:
        """GetMemoryMap(), whose answer is kept."""
        status = self._memory_services.get_memory_map(*args)
        if status == EfiStatus.EFI_SUCCESS:
            self.maps.append(self.memory_map.descriptors())
        return status

    def _exit_boot_services(self, image: int, key: int) -> int:
        """ExitBootServices(), after the failures that the case wants."""
        if not self.ebs_fail:
            return self._image_services.exit_boot_services(image, key)
        self.ebs_fail -= 1
        for _, start, pages, kind in self.ebs_mutate:
            end = start + (pages << PAGE_SHIFT)
            self.memory_map.convert(start, end, kind)
            self.td.add_memory([(start, end)])
        self.ebs_mutate = []
        return EfiStatus.EFI_INVALID_PARAMETER

    def _exit(self, image: int, status: int, size: int, data: int) -> int:
        """Exit(), whose status is kept."""
        self.exit_status = status
        return self._image_services.exit(image, status, size, data)


def start_firmware(
    td: RecordedTd, case: dict[str, Any], image: bytes, initrd: bytes = b""
) -> tuple[RecordedServices, LoadedImage]:
    """Bring the machine of ``td`` to the entry point of ``image``."""
    services = _services(td, case)
    services.variables = VariableStore(
        Variable(name, UUID(vendor), attributes, bytes.fromhex(data))
        for name, vendor, attributes, data in case.get("variables", ())
    )
    regs = td.machine.regs
    regs.rdx = build_system_table(services)
    loaded = load_image(services, FwCfg(image, cmdline=case["cmdline"]))
    services.top = case.get("alloc_limit", SZ_4G)
    if "load_options" in case:
        _set_load_options(services, loaded, bytes.fromhex(case["load_options"]))
    if "initrd" in case:
        initrd = random.Random(case["initrd"]).randbytes(case["initrd"])
    if initrd or "initrd" in case:
        install_initrd(services, initrd)
    regs.cr3 = build_identity_map(td.machine.memory, services.arena)
    regs.rsp = build_stack(services)
    if "rng" in case:
        install_rng(services, repeating(bytes.fromhex(case["rng"])))
    if "files" in case:
        files = {name: random.Random(size).randbytes(size) for name, size in case["files"].items()}
        FileSystem(services, files).install(loaded.device)
    install_offers(services, Setup(offers=tuple(case.get("offers", ()))))
    if "pretable" in case:
        _install_table(services, "LINUX_UNACCEPTED_MEM_TABLE", build_table(**case["pretable"]))
    if "seed_table" in case:
        _install_table(services, "LINUX_RANDOM_SEED", bytes.fromhex(case["seed_table"]))
    regs.rcx, regs.rip = loaded.handle, loaded.entry
    return services, loaded


def _services(td: RecordedTd, case: dict[str, Any]) -> RecordedServices:
    """The services on the map that is left when the firmware has its own memory."""
    memory_map = _Map([MemoryDescriptor(*fields) for fields in case["descs"]], case.get("shuffle"))
    rooms: dict[EfiMemoryType, Range] = {}
    for kind, pages in _OWN_MEMORY:
        at = memory_map.allocate(kind, pages << PAGE_SHIFT, SZ_4G)
        if at is None:
            raise td.machine.panic("no room below 4 GiB for the firmware")
        rooms[kind] = Range(at, at + (pages << PAGE_SHIFT))
    code = rooms[EfiMemoryType.EfiRuntimeServicesCode]
    rooms[EfiMemoryType.EfiBootServicesCode] = Range(code.start + PAGE_SIZE, code.end)
    return RecordedServices(
        machine=td.machine, memory_map=memory_map, arena=Arena(td.machine.memory, memory_map, rooms), td=td, top=SZ_4G,
        descriptor_size=case.get("desc_size", OVMF_DESCRIPTOR_SIZE),
        ebs_fail=case.get("ebs_fail", 0), ebs_mutate=case.get("ebs_mutate", []),
    )  # fmt: skip


def _set_load_options(services: RecordedServices, loaded: LoadedImage, options: bytes) -> None:
    """``load_options``: what the image's loader hands over, in place of a command line that ends."""
    interface = services.handles.interfaces(loaded.handle)[guid_bytes(EFI_LOADED_IMAGE_PROTOCOL_GUID)]
    record = GuestRecord(services.machine.memory, interface.address, EFI_LOADED_IMAGE_PROTOCOL)
    record["LoadOptions"] = services.arena.put(EfiMemoryType.EfiBootServicesData, options) if options else 0
    record["LoadOptionsSize"] = len(options)


def _install_table(services: RecordedServices, name: str, table: bytes) -> None:
    """Somebody before the image has installed a table: ``pretable``, ``seed_table``."""
    at = services.allocate_pool(EfiMemoryType.EfiACPIReclaimMemory, len(table))
    if at is None:
        raise services.machine.panic(f"no room for the table {name}")
    services.machine.memory.write(at, table)
    guid = services.arena.put(EfiMemoryType.EfiBootServicesData, guid_of(name))
    services.handlers["InstallConfigurationTable"](guid, at)
