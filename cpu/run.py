"""Real machine code in place of our stages: the EFI stub, the decompressor, the kernel.

Each starts from the registers and memory that the stage before it left, ours or a real one, and leaves the same
for the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bootstub.bzimage import parse_bzimage
from bootstub.kernel_layout import LOAD_PHYSICAL_ADDR, STARTUP_64_OFFSET
from cpu.answer import entry_offset, find_payload_users, unpack_kernel
from cpu.binding import RAX, RDI, RSI, RSP, self_test
from cpu.counter import InstructionCounter
from cpu.counter import self_test as counter_self_test
from cpu.devices import Devices
from cpu.exits import NO_VE, VeConfig
from cpu.fill import Fills
from cpu.stores import OnStore, watched_stores
from cpu.vcpu import Vcpu
from firmware.efi_types import EfiStatus
from firmware.pe import parse_pe
from guest.errors import GuestPanic
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.trace import Print, Record, ServiceCall
from guest.units import PAGE_SHIFT, PMD_SIZE, round_up
from tdx.events import TdCall
from tdx.leaves import Leaf

TICK_INSTRUCTIONS = 1 << 24
UNTIL_ACCEPT = "accept"
PANIC_END = "---[ end Kernel panic"
END_LINES = ("unaccepted-init: done", "reboot: System halted", "reboot: Power down")
"""What is put out when there is nothing more to come."""


class _Reached(Exception):
    """The run came to where it was to stop."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How far to run the real code.

    ``full``: run the decompression and the clearing of large memory too, instead of answering them from outside.
    ``skip``: leave the decompression out; then there is no kernel behind the door, and the decompressor stops where
    it would unpack it. ``until``: stop when the kernel puts out a line with this text, or, if it is ``accept``, when
    it accepts memory. ``timeout``: instructions. ``seed``: of all that is random, see ``Vcpu``. ``ve``: what raises
    #VE. The host needs ``Instructions`` with ``devices`` and ``vcpu.interrupts`` of these.
    """

    full: bool = False
    until: str | None = None
    timeout: int | None = None
    ve: VeConfig = NO_VE
    skip: bool = False
    seed: int = 0


class RealCode:
    """A vCPU that runs the code of ``image``, a bzImage that the firmware has loaded.

    ``progress`` is called with the number of instructions every few million of them.
    """

    def __init__(
        self, machine: Machine, physical: PhysicalMemory, image: bytes, options: RunOptions,
        progress: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self_test()
        counter_self_test()
        self._machine, self._image, self._options, self._progress = machine, image, options, progress
        self._physical = physical
        self.devices = Devices(machine.print)
        self.vcpu = Vcpu(machine, physical, self.devices, options.ve, options.seed)
        self.counter = InstructionCounter(self.vcpu.engine, _tick_interval(options.timeout), self._tick)
        self.running = False
        """Whether the vCPU runs now; then its registers are the guest's, not those of the machine."""
        self.unpacked_for: tuple[int, int] | None = None
        """Physical and virtual address that the image was about to unpack the kernel for."""
        self.fills: Fills | None = None
        self.on_store: OnStore | None = None
        """Called with each store of stub and decompressor, if somebody wants to know."""
        self._boot_params: int | None = None
        self._entry: int | None = None

    def stub(self) -> None:
        """Run the EFI stub from its PE entry point to the kernel's door.

        Newer stubs unpack the kernel themselves; an older one goes on into the decompressor, in the memory that it
        allocated for that.
        """
        trace = self._machine.trace
        trace.watchers.append(self._on_allocation)
        try:
            base = self._machine.regs.rip - parse_pe(self._image).entry_point
            self._run_to_the_door(base, answer=not self._options.full)
        finally:
            trace.watchers.remove(self._on_allocation)

    def decompressor(self) -> None:
        """Run the decompressor from startup_64 to the kernel's door; it unpacks the kernel itself."""
        startup_32 = self._machine.regs.rip - STARTUP_64_OFFSET
        if self._options.skip:
            self._run_to_unpacking(self._moved(startup_32))
        else:
            self._boot_params = self._machine.regs.rsi
            self._run_to_the_door(self._moved(startup_32), answer=not self._options.full)

    def kernel(self) -> None:
        """Run the kernel from its entry point, until it is told to stop or stops itself."""
        trace = self._machine.trace
        if self.unpacked_for is not None and not self._options.full:
            self.fills = Fills(self.vcpu, self._machine, self._physical, *self.unpacked_for)
        trace.watchers.append(self._watch)
        self.vcpu.interrupts.start(self.counter)
        try:
            self._run()
        except _Reached:
            self._machine.note(f"stopped at {self._options.until!r}")
        finally:
            trace.watchers.remove(self._watch)

    def _run(self) -> None:
        """Run from where the machine stands until a hook stops the vCPU; the machine then stands where that did."""
        self.running = True
        try:
            self.vcpu.run(self._machine.regs.rip)
        finally:
            self.running = False
            self._machine.regs = self.vcpu.registers()

    def _run_to_unpacking(self, base: int) -> None:
        """Run the image at ``base`` up to ``decompress_kernel()``."""

        def stop() -> None:
            self.unpacked_for = self.vcpu.state.regs[RDI], self.vcpu.state.regs[RSI]
            self.vcpu.engine.stop()

        self.vcpu.break_at(base + find_payload_users(self._image)[0], stop)
        self.vcpu.start(self._machine.regs)
        self._run()
        if self.unpacked_for is None:
            raise self._machine.panic(f"halted at {self._machine.regs.rip:#x}")

    def _run_to_the_door(self, base: int, answer: bool) -> None:
        """Run the image at ``base`` up to the kernel's entry point, which the unpacking function gives away."""
        self._break_at_unpacking(base, answer)
        self.vcpu.start(self._machine.regs)
        with watched_stores(self.vcpu, self.on_store):
            self._run()
        if self._entry is None or self._machine.regs.rip != self._entry:
            raise self._machine.panic(f"halted at {self._machine.regs.rip:#x}")
        self._machine.note(f"kernel entered at {self._entry:#x} after {self.counter.count} instructions")

    def _moved(self, startup_32: int) -> int:
        """Where the image lies once the decompressor at ``startup_32`` has moved itself out of its own way.

        That is the end of the memory that it unpacks into. Source: arch/x86/boot/compressed/head_64.S, startup_64.
        """
        header = parse_bzimage(self._image)
        output = max(round_up(startup_32, header.kernel_alignment), LOAD_PHYSICAL_ADDR)
        return output + header.init_size - parse_pe(self._image).size_of_image

    def _on_allocation(self, record: Record) -> None:
        """The stub allocated room for the kernel: if it goes on into the decompressor, that will be there."""
        match record.event:
            case ServiceCall("AllocatePages", (_, _, pages, at), EfiStatus.EFI_SUCCESS):
                if pages << PAGE_SHIFT >= parse_bzimage(self._image).init_size:
                    address = self._machine.memory.read_uint(at, 8)
                    self._break_at_unpacking(self._moved(address), answer=False)

    def _break_at_unpacking(self, base: int, answer: bool) -> None:
        for offset in find_payload_users(self._image):
            self.vcpu.break_at(base + offset, lambda: self._on_unpacking(answer))

    def _on_unpacking(self, answer: bool) -> None:
        """A function that unpacks the kernel was entered.

        decompress_kernel() has RDI = output, RSI = virtual address. extract_kernel() has RDI = boot_params; it is not
        answered, since it chooses the place and accepts it too.
        """
        regs = self.vcpu.state.regs
        output, virtual = regs[RDI], regs[RSI]
        if output != self._boot_params:
            self.unpacked_for = output, virtual
            if answer:
                self._answer(output, virtual)
                return
        return_address = int.from_bytes(self.vcpu.read(regs[RSP], 8), "little")
        self.vcpu.break_at(return_address, lambda: self._expect_entry(self._entry_of(output, regs[RAX])))

    def _answer(self, output: int, virtual: int) -> None:
        """Do what decompress_kernel() does, and return from it.

        The decompressor's page tables grow by page faults, 2 MiB at a time. Where its code would have one, it gets
        one; its handler goes back to where the function begins. Source: arch/x86/boot/compressed/ident_map_64.c,
        do_boot_page_fault().
        """
        image = self._image
        if self._options.skip:
            offset = entry_offset(image)
        else:
            pages = range(output, output + parse_bzimage(image).init_size, PMD_SIZE)
            missing = next((page for page in pages if not self.vcpu.peek(page, 1)), None)
            if missing is not None:
                self.vcpu.page_fault(missing)
                return
            offset = unpack_kernel(self._machine.memory, image, output, virtual)
        self._expect_entry(output + offset)
        self.vcpu.return_from_function(offset)

    @staticmethod
    def _entry_of(output: int, value: int) -> int:
        """decompress_kernel() returns the entry's offset, extract_kernel() its address."""
        return value if value >= LOAD_PHYSICAL_ADDR else output + value

    def _expect_entry(self, entry: int) -> None:
        def stop() -> None:
            del self.vcpu.breakpoints[entry]
            self.vcpu.engine.stop()

        self._entry = entry
        self.vcpu.break_at(entry, stop)

    def _watch(self, record: Record) -> None:
        """Stop where the user said, and where the kernel says that it goes no further."""
        event, until = record.event, self._options.until
        if until == UNTIL_ACCEPT:
            if isinstance(event, TdCall) and event.leaf == Leaf.TDG_MEM_PAGE_ACCEPT.spec_name:
                raise _Reached
            until = None  # no text: the word is part of "unaccepted"
        if not isinstance(event, Print):
            return
        if PANIC_END in event.text:
            raise GuestPanic(record.stage, event.text.partition(PANIC_END)[2].strip(" -:[]"))
        if any(text in event.text for text in (until, *END_LINES) if text is not None):
            raise _Reached

    def _tick(self) -> None:
        if self._progress is not None:
            self._progress(self.counter.count)
        if self._options.timeout is not None and self.counter.count >= self._options.timeout:
            raise self._machine.panic(f"stopped after {self.counter.count} instructions (--timeout)")


def _tick_interval(timeout: int | None) -> int:
    """Instructions from tick to tick: at most ``TICK_INSTRUCTIONS``, and such that one is at ``timeout``."""
    return -(-timeout // -(-timeout // TICK_INSTRUCTIONS)) if timeout else TICK_INSTRUCTIONS
