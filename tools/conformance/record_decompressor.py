"""Run the decompressor of a real kernel image on the set-up of a recorded case, and write down what came of it.

The run ends where the kernel is unpacked, or behind that. Our own decompressor can run in its place.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from bootstub.bzimage import parse_bzimage
from bootstub.cmdline import find_option
from bootstub.decompressor import MAINLINE_DECOMPRESSOR, decompress
from bootstub.events import KernelPlaced
from bootstub.kaslr import boot_seed, build_string
from bootstub.setup_header import LoadFlags
from bootstub.unpack import unpack
from cpu.run import RealCode, RunOptions
from firmware.efi_types import LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, guid_bytes
from guest.errors import GuestPanic, MemoryFault
from guest.records import GuestRecord, field_extents
from guest.trace import Print
from guest.units import round_up
from tdx.events import TdCall
from tdx.instructions import Instructions
from tools.conformance.decompressor_set_up import SET_UP, DecompressorSetUp
from tools.conformance.kaslr_seed import physical_slot, tsc_for, virtual_slot
from tools.conformance.record_stub import TIMEOUT_INSTRUCTIONS, death, sparse
from tools.conformance.unaccepted_table import read_table

_LOADFLAGS_AT, _ = field_extents(BOOT_PARAMS)["hdr.loadflags"]
_FULL_TIMEOUT = 1 << 36
_DEBUG_TEXTS = ("Decompressing Linux", "Booting the kernel")
"""How lines begin that a kernel without CONFIG_X86_VERBOSE_BOOTUP leaves out."""


def run_decompressor(case: dict[str, Any], image: bytes, ours: bool = False, full: bool = False) -> dict[str, Any]:
    """Run the decompressor of ``image``; returns the fields of a recorded case that say what came of it.

    Where the recorded run read the TSC to choose a place, the TSC is set so that the choice is the recorded one. With
    ``chosen_by_tsc`` the case says that ``tsc0`` leads there, as it does where boot_params are the same to the byte.
    With ``ours`` our decompressor runs in its place. With ``full`` the kernel is unpacked by the real one too, and
    ``image`` stands for the memory that it was unpacked to. ``died`` says how a guest died, if it did.
    """
    run = _OurRun(case, image, full) if ours else _RealRun(case, image, full)
    if not case.get("chosen_by_tsc"):
        run.choose_as_recorded()
    return run.results()


def record(case: dict[str, Any], image: bytes, full: bool = False) -> dict[str, Any]:
    """A case with the set-up of ``case`` and what came of it here; KASLR chooses by the TSC of the set-up."""
    out = _RealRun(case, image, full).results()
    table, bits_after = case["table"], out.pop("bits_after")
    set_up = {name: case[name] for name in SET_UP if name in case} | {"init_size": parse_bzimage(image).init_size}
    serial = "".join(f"{line}\r\n" for line in out.pop("serial"))
    set_up["chosen_by_tsc"] = True
    return set_up | out | {"table": table and table | {"bits_after": bits_after}, "serial": serial}


class _Run(ABC):
    """A run of a decompressor on the set-up of ``case``."""

    def __init__(self, case: dict[str, Any], image: bytes, full: bool) -> None:
        self._case, self._image, self._full = case, image, full
        self._set_up = DecompressorSetUp(case, image)
        self._td, self._machine = self._set_up.td, self._set_up.machine

    @abstractmethod
    def _run(self) -> None:
        """Run to the end; ``BootError`` if it does not come there."""

    @abstractmethod
    def _read_tsc(self, rdtsc: Callable[[], int]) -> None:
        """Let the decompressor read the TSC from ``rdtsc``."""

    @property
    @abstractmethod
    def _unpacked_for(self) -> tuple[int | None, int | None]:
        """Physical and virtual address that the kernel was unpacked for."""

    def choose_as_recorded(self) -> None:
        """Let KASLR choose the places that it chose in the recorded run."""
        tscs = iter(self._tscs_of_the_choice())

        def rdtsc() -> int:
            self._td.rdtsc()
            return next(tscs, 0)

        self._read_tsc(rdtsc)

    def results(self) -> dict[str, Any]:
        """Run, and say what came of it."""
        died = None
        try:
            self._run()
        except MemoryFault as fault:
            died = death(fault)
        except GuestPanic:
            died = "halted"
        case, accepts, physical = self._case, self._td.accepts(), self._td.physical
        output, virtual = self._unpacked_for
        table = read_table(physical, case["table"]["pa"]) if case["table"] else None
        params = physical.read(case["boot_params_pa"], BOOT_PARAMS_SIZE)
        return {
            "output": output,
            "virt": virtual,
            "bits_after": table["bits"] if table else None,
            "loadflags_after": GuestRecord(self._machine.memory, case["boot_params_pa"], BOOT_PARAMS)["hdr.loadflags"],
            "accept": accepts,
            "accept_calls": sum(count for *_, count in accepts),
            "tdcalls": sum(r.event.count for r in self._td.trace.records if isinstance(r.event, TdCall)),
            "serial": [r.event.text for r in self._td.trace.records if isinstance(r.event, Print)],
            "rdtsc": self._td.rdtscs,
            "boot_params": sparse(params),
            "died": died,
        } | ({"image": self._kernel_hash(output)} if self._full and output is not None else {})

    def _kernel_hash(self, output: int) -> str:
        """SHA-256 of the kernel in memory: all that was unpacked."""
        size = len(unpack(self._set_up.bzimage.payload(self._image)).vmlinux)
        return hashlib.sha256(self._td.physical.read(output, size)).hexdigest()

    def _tscs_of_the_choice(self) -> list[int]:
        """The values of the TSC that make the recorded choice: for the physical place, then for the virtual one."""
        case, bzimage = self._case, self._set_up.bzimage
        align = bzimage.kernel_alignment
        params = bytearray(self._td.physical.read(case["boot_params_pa"], BOOT_PARAMS_SIZE))
        params[_LOADFLAGS_AT] |= LoadFlags.KASLR_FLAG
        size = round_up(bzimage.init_size, align)
        slots = (
            physical_slot(self._set_up.descriptors, size, align, case["output"]),
            virtual_slot(align, case["virt"]),
        )
        seed = boot_seed(build_string(self._image), bytes(params))
        return [tsc_for(seed, slot) for slot in slots][2 - case["rdtsc"] :]


class _RealRun(_Run):
    """The image's own machine code."""

    def __init__(self, case: dict[str, Any], image: bytes, full: bool) -> None:
        super().__init__(case, image, full)
        options = RunOptions(skip=not full, full=full, timeout=_FULL_TIMEOUT if full else TIMEOUT_INSTRUCTIONS)
        self._code = RealCode(self._machine, self._td.physical, image, options)
        self._td.host.instructions = Instructions(self._code.devices)
        self._read_tsc(self._td.rdtsc)

    def _run(self) -> None:
        self._code.decompressor()

    def _read_tsc(self, rdtsc: Callable[[], int]) -> None:
        self._code.vcpu.tsc = rdtsc

    @property
    def _unpacked_for(self) -> tuple[int | None, int | None]:
        return self._code.unpacked_for or (None, None)

    def results(self) -> dict[str, Any]:
        exceptions = self._code.vcpu.exceptions
        return super().results() | {"exceptions": {str(vector): n for vector, n in sorted(exceptions.items())}}


class _Chance:
    """A TSC, and no RDRAND."""

    def __init__(self, rdtsc: Callable[[], int]) -> None:
        self.rdtsc = rdtsc

    def rdrand(self) -> int:
        raise ValueError("RDRAND on a processor without it")


class _OurRun(_Run):
    """Our decompressor, built as that of the image is."""

    def __init__(self, case: dict[str, Any], image: bytes, full: bool) -> None:
        super().__init__(case, image, full)
        self._read_tsc(self._td.rdtsc)

    def _run(self) -> None:
        kind = MAINLINE_DECOMPRESSOR
        if not knows_unaccepted_memory(self._image):
            kind = kind.without_support()
        decompress(self._machine, kind)

    def _read_tsc(self, rdtsc: Callable[[], int]) -> None:
        self._machine.entropy = _Chance(rdtsc)

    @property
    def _unpacked_for(self) -> tuple[int | None, int | None]:
        placed = (r.event for r in self._td.trace.records if isinstance(r.event, KernelPlaced))
        return next(((event.physical, event.virtual) for event in placed), (None, None))

    def results(self) -> dict[str, Any]:
        """What is said is what the real one says, which has a console only if it is told of it."""
        out = super().results()
        heard = _names_a_port(self._case["cmdline"].encode())
        return out | {"serial": [line for line in out["serial"] if heard and not line.startswith(_DEBUG_TEXTS)]}


def _names_a_port(line: bytes) -> bool:
    """Whether a line makes the real decompressor speak (arch/x86/boot/early_serial_console.c, console_init())."""
    earlyprintk, console = (find_option(line, name) or b"" for name in (b"earlyprintk", b"console"))
    return earlyprintk.startswith((b"serial", b"ttyS", b",ttyS")) or console.startswith((b"uart8250,io,", b"uart,io,"))


def knows_unaccepted_memory(image: bytes) -> bool:
    """Whether the code of ``image`` looks for the table of unaccepted memory: it has the first half of its GUID."""
    return guid_bytes(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID)[:8] in image
