"""The boot: its stages in order, and a ``Boot`` that runs them one by one.

The order of the stages and what each is called is here and nowhere else. A stage gets the machine; what the user
chose (images, sizes, script) reaches it as arguments, as a host's configuration would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from bootstub.decompressor import V9_DECOMPRESSOR, decompress
from bootstub.efi_stub import efi_stub
from bootstub.protocol import V9, Protocol
from bootstub.td_shim import TD_SHIM_POLICY, td_shim
from bootstub.td_shim_layout import td_shim_sections
from firmware.accept_policy import BELOW_4G, AcceptPolicy
from firmware.efi_types import EfiMemoryType
from firmware.launch import launch_guest, launch_td, sections_for_map
from firmware.load_image import FwCfg
from firmware.memory_descriptor import RAM_TYPES, MemoryDescriptor
from firmware.memory_map import MemoryMap
from firmware.ovmf_layout import BUILT_IN
from firmware.platform_init import firmware
from firmware.setup import DEFAULT_SETUP, Setup
from firmware.srat import Distances, NodeRange
from firmware.tables import EFI_SYSTEM_TABLE
from firmware.tdvf import Tdvf
from firmware.variables import Variable
from guest.clock import CostTable, VirtualClock
from guest.errors import MemoryFault
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.ranges import Range, RangeSet
from guest.records import RecordCopy
from guest.registers import Registers
from guest.trace import StageBegin, StageEnd, Trace
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PHYSICAL_ADDRESS_END, PMD_SIZE, SZ_4G, SZ_64M
from guest.write_journal import WriteJournal
from kernel.build import KernelBuild
from kernel.kernel import Kernel
from kernel.mm_init import mm_init
from kernel.runtime import Shell, default_script
from kernel.script import Command
from kernel.setup_arch import setup_arch
from kernel.version import BY_PROTOCOL
from tdx.backing import Backing
from tdx.faults import Rule
from tdx.inject import Injector
from tdx.machine_type import MachineType
from tdx.module import TdConfig, TdxModule
from tdx.no_tdx import NoTdx
from tdx.sanitizer import Sanitizer
from tdx.sept import LEVEL_2M, SecureEpt
from tdx.vmm import Host
from tools.border import check_border
from tools.handover import peek
from tools.options import DEFAULT_CMDLINE

if TYPE_CHECKING:  # unicorn is an extra
    from cpu.run import RealCode

GPAW = 52
GPAW_ABOVE_2_PIB = 53
"""For maps with RAM above 2^51, where a TD of 52 bits has its shared half: no TDX module has so many bits."""
GPAW_REAL_CODE = 40
"""Guest physical address width where an emulated CPU runs: unicorn has 40 bits of physical address."""
REAL_KERNEL_CMDLINE = f"{DEFAULT_CMDLINE} earlyprintk=serial,ttyS0,115200 console=ttyS0 printk.devkmsg=on"
"""A real kernel prints to the serial port only if it is told to."""

WRITE_FOR_OTHERS = ("bootstub.efi_call", "firmware.arena", "kernel.memblock")
"""Modules whose callers are the authors of what they write."""


@dataclass(frozen=True, slots=True)
class BootConfig:
    """Everything that a boot depends on; two boots of one configuration are equal to the byte."""

    kernel: bytes
    memory: int = SZ_4G
    """Bytes of a ``machine``; an ``efi_map`` takes the place of both."""
    machine: MachineType = field(default_factory=MachineType)
    firmware: Tdvf = BUILT_IN
    profile: str = "ovmf"
    """The firmware's way to work, a key of ``PROFILES``."""
    accept: AcceptPolicy | None = None
    """What the firmware accepts itself, if that is not its own policy, with ``accept_cpus`` processors."""
    accept_cpus: int = 1
    efi_map: tuple[MemoryDescriptor, ...] | None = None
    nodes: tuple[NodeRange, ...] = ()
    """NUMA nodes, which the ACPI tables tell."""
    distances: Distances = ()
    """Between the nodes, if the tables tell them."""
    initrd: bytes = b""
    cmdline: str = DEFAULT_CMDLINE
    protocol: Protocol = V9
    variables: tuple[Variable, ...] = ()
    offers: tuple[str, ...] = DEFAULT_SETUP.offers
    """Protocols of the firmware, keys of ``firmware.setup.OFFERS``."""
    host_level: Backing | int = LEVEL_2M
    """The largest page that the host backs private memory with: 0 is 4 KiB, 1 is 2 MiB; a ``Backing`` says more."""
    host_ahead: bool = False
    """The host backs all memory before the TD runs, and not when an exit asks for it."""
    run: str | None = None
    """How much of the kernel image runs as real code, a key of ``RUNS``; the next three say how far."""
    full: bool = False
    until: str | None = None
    timeout: int | None = None
    ve: tuple[str, ...] = ()
    """Instructions that raise #VE in real code, see ``cpu.exits.VeConfig``."""
    faults: tuple[Rule, ...] = ()
    """What a hostile host does."""
    sanitize: str = "warn"
    """What a finding of the sanitizer does: ``error`` ends the boot, ``warn`` is told; ``off``: no sanitizer."""
    seed: int = 0
    """Decides what is random in firmware and processor, and so in the boot stub and in real code."""
    cpus: int = 1
    tdx: bool = True
    """The guest is a TD; if not, all its memory is there from the start."""
    build: KernelBuild = field(default_factory=KernelBuild)
    """What is left out of our kernel."""
    script: tuple[Command, ...] | None = None
    """What stage runtime does; without it the protocol's own script runs."""
    costs: CostTable = field(default_factory=CostTable)


class Boot:
    """A virtual machine on its way through the stages."""

    def __init__(self, config: BootConfig) -> None:
        self.config = config
        self.clock = VirtualClock()
        self.trace = Trace(self.clock)
        self.physical = PhysicalMemory()
        """The bytes without the gate: for looking on from outside, never for a stage."""
        ram = _ram(config)
        td = TdConfig(_gpaw(config, ram))
        self.sept = SecureEpt(td.gpaw)
        self.host = Host(
            self.physical, self.sept, self.trace, self.clock, config.costs, ram, _backing(config), td.shared_mask
        )
        module = TdxModule(self.physical, self.sept, self.host, self.trace, self.clock, config.costs, td)
        platform = module if config.tdx else NoTdx(module, self.trace)
        self.machine = Machine.build(self.physical, platform, self.trace, self.clock, config.seed)
        self.sept.on_revoke.append(lambda start, end: self.machine.memory.flush())
        if config.faults:
            Injector(config.faults, module.page_accept, self.host, self.trace)
        self.sanitizer: Sanitizer | None = None
        if config.sanitize != "off" and config.tdx:
            self.sanitizer = Sanitizer(self.trace, ram, td.shared_mask, config.sanitize == "error")
        self.stages = stages_of(config)
        self.real_code: RealCode | None = None
        self.progress: Callable[[int], None] = lambda count: None
        """Called with the number of instructions every few million of them; what it raises ends the boot."""
        self.firmware_map: MemoryMap | None = None
        """The firmware's own record of its memory map, once it ran."""
        self.kernel: Kernel | None = None
        self.shell: Shell | None = None
        """What runs the commands of stage runtime, once that stage has begun."""
        self.boot_params: bytes | None = None
        """The zero page as the stub left it, once it ran."""
        self.boot_params_gpa = 0
        """Where it left it."""
        self.boot_params_event = 0
        """Number of the event that came next."""
        self.system_table_gpa = 0
        """Where the firmware left the EFI system table, once it ran."""
        self.system_table: bytes | None = None
        """The EFI system table as the stub left it; None if boot_params do not name it."""
        self.memmap = b""
        """The EFI memory map as the stub left it, of which boot_params have address and size."""
        self.done: list[str] = []
        self.journal: WriteJournal | None = None
        """Who wrote what, once it was asked for."""

    def keep_journal(self) -> WriteJournal:
        """Write down from now on who writes what to guest memory."""
        if self.journal is None:
            self.journal = WriteJournal(self.trace, WRITE_FOR_OTHERS)
            self.physical.on_write = self.journal.record
        return self.journal

    @property
    def next_stage(self) -> str | None:
        """Name of the stage that :meth:`step` would run; None after the last."""
        names = tuple(self.stages)
        return names[len(self.done)] if len(self.done) < len(names) else None

    def step(self) -> str:
        """Run the next stage and return its name. What ends the guest leaves as ``BootError``."""
        name = self.next_stage
        if name is None:
            raise ValueError("step: the boot is over")
        self.trace.stage = name
        self.trace.add(StageBegin())
        try:
            self.stages[name](self)
        except MemoryFault as fault:
            if self.sanitizer is not None:
                self.sanitizer.fault(fault)
            raise
        check_border(self)
        self.trace.add(StageEnd())
        self.done.append(name)
        return name

    def run(self, until: str | None = None) -> None:
        """Run the stages up to and with ``until``; all of them without it."""
        while self.next_stage is not None and until not in self.done:
            self.step()

    def registers(self) -> Registers:
        """The guest's registers as they are now, also while real code runs."""
        if self.real_code is not None and self.real_code.running:
            return self.real_code.vcpu.registers()
        return self.machine.regs

    def tick(self, count: int) -> None:
        """Real code has run that many instructions."""
        self.progress(count)

    def bitmap(self) -> bytes:
        """The unaccepted memory bitmap as it is now, up to the end of RAM; empty if there is none."""
        at = RecordCopy(self.boot_params, BOOT_PARAMS)["unaccepted_memory"] if self.boot_params else 0
        end = max((part.end for part in self.host.ram), default=0)
        return peek(self.physical, at, DIV_ROUND_UP(end, PMD_SIZE * BITS_PER_BYTE)) or b"" if at else b""


def stages_of(config: BootConfig) -> dict[str, Callable[[Boot], None]]:
    """The stages of a boot by name, in order."""
    stages = PROFILES[config.profile] if config.run is None else RUNS[config.run]
    if config.protocol.unpacks_in_stub:
        return {name: stage for name, stage in stages.items() if name != "decompress"}
    return stages


def _host(boot: Boot) -> None:
    config = boot.config
    tdvf, private = config.firmware, []
    if config.efi_map is not None:
        private = _accepted(config.efi_map)
        tdvf = sections_for_map(config.efi_map) if tdvf is BUILT_IN else tdvf
    if config.tdx:
        launch_td(boot.host, tdvf, private, boot.machine.regs, config.faults)
    else:
        launch_guest(boot.host, tdvf, boot.machine.regs)


def _firmware(boot: Boot) -> None:
    config = boot.config
    given_map = None if config.efi_map is None else list(config.efi_map)
    pci_express = config.machine.name != "pc"
    fw_cfg = FwCfg(
        config.kernel, config.initrd, config.cmdline, pci_express, config.nodes, config.cpus, config.distances
    )
    setup = Setup(config.variables, config.offers, config.seed, config.accept or BELOW_4G, config.accept_cpus)
    boot.firmware_map = firmware(boot.machine, fw_cfg, given_map, setup)
    boot.system_table_gpa = boot.machine.regs.rdx


def _td_shim_host(boot: Boot) -> None:
    config = boot.config
    tdvf = td_shim_sections(config.kernel, config.cmdline)
    launch_td(boot.host, tdvf, [], boot.machine.regs, config.faults)


def _td_shim(boot: Boot) -> None:
    config = boot.config
    policy, topology = config.accept or TD_SHIM_POLICY, (config.nodes, config.cpus, config.distances)
    td_shim(boot.machine, policy, config.accept_cpus, *topology)
    _keep_what_the_stub_left(boot)


def _efi_stub(boot: Boot) -> None:
    efi_stub(boot.machine, boot.config.protocol)
    _keep_what_the_stub_left(boot)


def _keep_what_the_stub_left(boot: Boot) -> None:
    """Copies of boot_params, the EFI memory map and the system table, whose pointers become virtual addresses."""
    boot.boot_params_gpa, boot.boot_params_event = boot.machine.regs.rsi, boot.trace.count
    boot.boot_params = peek(boot.physical, boot.boot_params_gpa, BOOT_PARAMS_SIZE)
    if boot.boot_params is None:
        return  # the kernel will find out
    params = RecordCopy(boot.boot_params, BOOT_PARAMS)
    at = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
    boot.memmap = peek(boot.physical, at, min(params["efi_info.efi_memmap_size"], SZ_64M)) or b""
    at = params["efi_info.efi_systab_hi"] << 32 | params["efi_info.efi_systab"]
    boot.system_table = peek(boot.physical, at, EFI_SYSTEM_TABLE.sizeof()) if at else None


def _decompress(boot: Boot) -> None:
    supported = boot.config.protocol.unaccepted_memory
    decompress(boot.machine, V9_DECOMPRESSOR if supported else V9_DECOMPRESSOR.without_support())


def _setup_arch(boot: Boot) -> None:
    boot.kernel = setup_arch(boot.machine, BY_PROTOCOL[boot.config.protocol.name], build=boot.config.build)


def _mm_init(boot: Boot) -> None:
    assert boot.kernel is not None
    mm_init(boot.kernel)


def _runtime(boot: Boot) -> None:
    assert boot.kernel is not None
    script = boot.config.script
    boot.shell = Shell(boot.kernel, lambda start, end: _plug(boot, start, end), boot.config.seed)
    boot.shell.run(default_script(boot.kernel.mainline) if script is None else script)


def _plug(boot: Boot, start: int, end: int) -> None:
    """The host adds RAM to a guest that runs."""
    boot.host.ram.add(start, end)
    if not boot.config.tdx:
        boot.sept.page_add(start, end)


def _real_code(boot: Boot) -> RealCode:
    """The vCPU of this boot, made when the first real code runs."""
    if boot.real_code is None:
        from cpu.exits import VeConfig
        from cpu.run import RealCode, RunOptions
        from tdx.instructions import Instructions

        config = boot.config
        ve = VeConfig(**dict.fromkeys(config.ve, True))
        options = RunOptions(config.full, config.until, config.timeout, ve, seed=config.seed)
        boot.real_code = RealCode(boot.machine, boot.physical, config.kernel, options, boot.tick)
        boot.host.instructions = Instructions(boot.real_code.devices, boot.real_code.vcpu.interrupts)
        boot.sept.on_revoke.append(boot.real_code.vcpu.forget)
        if boot.journal is not None:
            boot.real_code.on_store = boot.journal.record_as
    return boot.real_code


def _real_stub(boot: Boot) -> None:
    _real_code(boot).stub()
    _keep_what_the_stub_left(boot)


def _real_decompressor(boot: Boot) -> None:
    _real_code(boot).decompressor()


def _real_kernel(boot: Boot) -> None:
    _real_code(boot).kernel()


STAGES: dict[str, Callable[[Boot], None]] = {
    "host": _host,
    "firmware": _firmware,
    "efi-stub": _efi_stub,
    "decompress": _decompress,
    "setup-arch": _setup_arch,
    "mm-init": _mm_init,
    "runtime": _runtime,
}
STAGE_NAMES = tuple(STAGES)
PROFILES: dict[str, dict[str, Callable[[Boot], None]]] = {
    "ovmf": STAGES,
    "td-shim": {name: stage for name, stage in STAGES.items() if name != "efi-stub"}
    | {"host": _td_shim_host, "firmware": _td_shim},
}
"""The stages under each firmware. td-shim writes boot_params itself: there is no EFI for a stub."""
RUNS: dict[str, dict[str, Callable[[Boot], None]]] = {
    "stub": {name: stage for name, stage in STAGES.items() if name != "decompress"} | {"efi-stub": _real_stub},
    "decompressor": STAGES | {"decompress": _real_decompressor},
    "kernel": {"host": _host, "firmware": _firmware, "efi-stub": _real_stub, "kernel": _real_kernel},
}
"""The stages where real machine code takes the place of ours. The stub of a newer kernel unpacks it too."""
KERNEL_STAGES = ("setup-arch", "mm-init", "runtime")
"""The stages whose output is the kernel's log."""


def _gpaw(config: BootConfig, ram: RangeSet) -> int:
    if config.run is not None:
        return GPAW_REAL_CODE
    return GPAW_ABOVE_2_PIB if ram.overlaps(1 << GPAW - 1, PHYSICAL_ADDRESS_END) else GPAW


def _ram(config: BootConfig) -> RangeSet:
    if config.efi_map is None:
        return config.machine.ram(config.memory)
    return RangeSet((d.start, d.end) for d in config.efi_map if d.type in RAM_TYPES)


def _backing(config: BootConfig) -> Backing:
    level = config.host_level
    return replace(Backing(level) if isinstance(level, int) else level, ahead=config.host_ahead)


def _accepted(efi_map: tuple[MemoryDescriptor, ...]) -> list[Range]:
    """RAM of a given map that its firmware has accepted."""
    ram = RangeSet((d.start, d.end) for d in efi_map if d.type in RAM_TYPES)
    for d in efi_map:
        if d.type == EfiMemoryType.EfiUnacceptedMemoryType:
            ram.remove(d.start, d.end)
    return list(ram)
