"""Run the EFI stub of a real kernel image on the set-up of a recorded case, and write down what came of it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE, e820_table_of, parse_e820_table
from bootstub.efi_stub import efi_stub
from bootstub.events import KernelPlaced
from bootstub.protocol import MAINLINE
from bootstub.setup_data import SetupDataType, walk_setup_data
from cpu.run import RealCode, RunOptions
from firmware.boot_services import EfiServices
from firmware.memory_descriptor import MemoryDescriptor
from firmware.pe import parse_pe
from firmware.tables import EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE
from guest.errors import GuestPanic, MemoryFault
from guest.records import GuestRecord, RecordCopy
from guest.units import PAGE_SIZE, round_down, round_up
from tools.conformance.efi_names import guid_name
from tools.conformance.record_calls import RecordingGates
from tools.conformance.recorded_firmware import start_firmware
from tools.conformance.recorded_td import RecordedTd
from tools.conformance.unaccepted_table import read_table

TIMEOUT_INSTRUCTIONS = 1 << 28
_ENTERED = "entered kernel"
_SETTINGS = ("tdx_max_level", "tdx", "already_accepted", "tsc0")
SET_UP = (
    "id", "profile", "cmdline", "descs", "alloc_limit", "desc_size", "shuffle", "rng", "pretable", "ebs_fail",
    "ebs_mutate", "load_options", "initrd", "files", "variables", "seed_table", "offers", *_SETTINGS,
)  # fmt: skip
"""Fields of a case that say what is run; the others say what came of it."""


def run_stub(case: dict[str, Any], image: bytes, ours: bool = False, to_death: bool = False) -> dict[str, Any]:
    """Run the stub of ``image`` up to the kernel's entry point; no kernel is unpacked.

    With ``ours`` our own stub runs in its place, and unpacks the image's kernel. Returns the fields of a recorded
    ``out``, and ``input_map``. A guest that dies in a way that no recorded guest did leaves as ``BootError``; with
    ``to_death`` the fields say what it did up to then, and ``died`` how.
    """
    return (_OurRun if ours else _RealRun)(case, image).run(to_death)


def record(case: dict[str, Any], image: bytes, to_death: bool = False) -> dict[str, Any]:
    """A case with the set-up of ``case`` and what came of it here."""
    out = run_stub(case, image, to_death=to_death)
    set_up = {name: case[name] for name in SET_UP if name in case}
    return set_up | {"firmware": {"image_size": image_size(image)}, "input_map": out.pop("input_map"), "out": out}


def image_size(image: bytes) -> int:
    """Bytes that the loaded image takes, whole pages."""
    return round_up(parse_pe(image).size_of_image, PAGE_SIZE)


class _Run(ABC):
    """A run of a stub on the set-up of ``case``."""

    def __init__(self, case: dict[str, Any], image: bytes) -> None:
        descriptors = [MemoryDescriptor(*fields) for fields in case["descs"]]
        self._td = RecordedTd(descriptors, **{name: case[name] for name in _SETTINGS if name in case})
        self._machine, self._physical = self._td.machine, self._td.physical
        self._machine.trace.stage = "efi-stub"
        self._gates = self._machine.gates = RecordingGates(self._td.trace, self._machine.memory)
        self._services, self._image = start_firmware(self._td, case, image)
        self._death: str | None = None

    @abstractmethod
    def _stub(self) -> None:
        """Run the stub; ``BootError`` if it does not come to the kernel's door."""

    @property
    @abstractmethod
    def _unpacked_for(self) -> tuple[int, int] | None:
        """Physical and virtual address that the kernel was unpacked for, None if it did not come to that."""

    def run(self, to_death: bool) -> dict[str, Any]:
        services = self._services
        out: dict[str, Any] = {
            "input_map": sorted(map_rows(services.memory_map.descriptors()), key=lambda row: row[1]),
            "stop": self._run_to_the_end(to_death),
            "stub_exit_status": services.exit_status,
            "died": self._death,
        }
        if self._unpacked_for is not None:
            out["kernel_pa"], out["kernel_va"] = self._unpacked_for
        if out["stop"] == _ENTERED:
            out |= self._boot_params(self._machine.regs.rsi) | {"kernel_entry": self._machine.regs.rip}
        tables = list(config_tables(self._services))
        table = dict(tables).get("LINUX_UNACCEPTED_MEM_TABLE")
        accepts = self._td.accepts()
        return out | {
            "config_tables": [list(entry) for entry in tables],
            "table": None if table is None else read_table(self._physical, table),
            "accept": accepts,
            "accept_calls": sum(count for *_, count in accepts),
            "still_pending": self._td.still_pending(),
            "map_at_bitmap": map_rows(services.maps[1]) if len(services.maps) > 1 else None,
            "map_at_exit": map_rows(services.maps[-1]) if services.maps else None,
            "calls": self._gates.calls,
            "console": self._gates.console,
            "cpuid": {f"{leaf:#x}": count for leaf, count in self._td.module.cpuids.items()},
            "rdtsc": self._td.rdtscs,
            "variables": [
                [each.name, str(each.vendor), each.attributes, each.data.hex()] for each in services.variables
            ],
            "seed_table": self._seed_table(dict(tables).get("LINUX_RANDOM_SEED")),
        }

    def _seed_table(self, gpa: int | None) -> str | None:
        """The random seed that the kernel is handed."""
        if gpa is None:
            return None
        size = int.from_bytes(self._physical.read(gpa, 4), "little")
        return self._physical.read(gpa, 4 + min(size, PAGE_SIZE)).hex()

    def _run_to_the_end(self, to_death: bool) -> str:
        """Run; returns how it ended."""
        try:
            self._stub()
        except GuestPanic as error:
            if self._services.exit_status is not None:
                return f"BS.Exit({self._services.exit_status:#x})"
            return self._halted(error)
        except MemoryFault as fault:
            if not to_death:
                raise
            self._death = death(fault)
            return "died"
        return _ENTERED

    @abstractmethod
    def _halted(self, error: GuestPanic) -> str:
        """How a stub ended that stopped by itself."""

    def _boot_params(self, gpa: int) -> dict[str, Any]:
        page = self._physical.read(gpa, BOOT_PARAMS_SIZE)
        record = RecordCopy(page, BOOT_PARAMS)
        line, initrd, size = (
            record[f"hdr.{low}"] | record[f"ext_{low}"] << 32
            for low in ("cmd_line_ptr", "ramdisk_image", "ramdisk_size")
        )
        return {
            "command_line": self._physical.read(line, 2 * PAGE_SIZE).partition(b"\0")[0].hex(),
            "initrd": hashlib.sha256(self._physical.read(initrd, size)).hexdigest() if size else None,
            "boot_params_pa": gpa,
            "boot_params": sparse(page),
            "e820": [[e.addr, e.size, e.type] for e in e820_table_of(page)],
            "setup_data": list(self._setup_data(record["hdr.setup_data"])),
        }

    def _setup_data(self, head: int) -> Iterator[dict[str, Any]]:
        read = self._physical.read
        for node in walk_setup_data(read, head):
            row: dict[str, Any] = {"pa": node.gpa, "type": node.type, "len": node.len}
            if node.type == SetupDataType.SETUP_E820_EXT:
                row["e820ext"] = [[e.addr, e.size, e.type] for e in parse_e820_table(read(node.data_gpa, node.len))]
            yield row


def death(fault: MemoryFault) -> str:
    """How a guest died, without what depends on the size of an access."""
    return f"{fault.kind} of page {round_down(fault.gpa, PAGE_SIZE):#x}, which is {fault.state}"


def config_tables(services: EfiServices) -> Iterator[tuple[str, int]]:
    """The configuration tables by name, with their addresses."""
    memory, size = services.machine.memory, EFI_CONFIGURATION_TABLE.sizeof()
    system_table = GuestRecord(memory, services.system_table, EFI_SYSTEM_TABLE)
    for number in range(system_table["NumberOfTableEntries"]):
        entry = EFI_CONFIGURATION_TABLE.parse(memory.read(system_table["ConfigurationTable"] + number * size, size))
        yield guid_name(entry.VendorGuid), entry.VendorTable


class _RealRun(_Run):
    """The image's own machine code."""

    def __init__(self, case: dict[str, Any], image: bytes) -> None:
        super().__init__(case, image)
        options = RunOptions(skip=True, timeout=TIMEOUT_INSTRUCTIONS)
        self._code = RealCode(self._machine, self._physical, image, options)
        self._code.vcpu.tsc = self._td.rdtsc

    def _stub(self) -> None:
        self._code.stub()

    @property
    def _unpacked_for(self) -> tuple[int, int] | None:
        return self._code.unpacked_for

    def _halted(self, error: GuestPanic) -> str:
        if not error.text.startswith("halted at "):
            raise error
        return f"halted at image+{self._machine.regs.rip - self._image.base:#x}"


class _OurRun(_Run):
    """Our stub of the generation that was recorded."""

    def __init__(self, case: dict[str, Any], image: bytes) -> None:
        super().__init__(case, image)
        self._machine.entropy = self._td

    def _stub(self) -> None:
        efi_stub(self._machine, MAINLINE)

    @property
    def _unpacked_for(self) -> tuple[int, int] | None:
        placed = (r.event for r in self._td.trace.records if isinstance(r.event, KernelPlaced))
        return next(((event.physical, event.virtual) for event in placed), None)

    def _halted(self, error: GuestPanic) -> str:
        return f"halted: {error.text}"


def map_rows(descriptors: Iterable[MemoryDescriptor]) -> list[list[int]]:
    """Descriptors as a recorded map has them: ``[type, start, pages, attribute]``."""
    return [[d.type, d.start, d.pages, d.attribute] for d in descriptors]


def sparse(page: bytes, step: int = 8) -> list[list[Any]]:
    """The parts of ``page`` that are not zero, ``[offset, hexadecimal]``."""
    out: list[list[Any]] = []
    for at in range(0, len(page), step):
        piece = page[at : at + step]
        if not any(piece):
            continue
        if out and out[-1][0] + len(out[-1][1]) // 2 == at:
            out[-1][1] += piece.hex()
        else:
            out.append([at, piece.hex()])
    return out
