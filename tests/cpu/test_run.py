"""Real machine code of Debian's kernel in place of our stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootstub.boot_params import e820_table_of
from bootstub.bzimage import parse_bzimage
from bootstub.efi_stub import LOAD_PHYSICAL_ADDR
from bootstub.payload import decompress
from cpu.answer import find_payload_users
from cpu.postmortem import report
from cpu.symbols import read_kallsyms
from guest.errors import GuestPanic, MemoryFault
from guest.trace import Print, ServiceCall
from guest.units import SZ_1G, SZ_4G
from tdx.events import TdCall
from tdx.ve import ExitReason
from tools.pipeline import REAL_KERNEL_CMDLINE, Boot, BootConfig
from tools.report import ACCEPT
from tools.verdict import lost_memory, unaccepted_by_bitmap, unaccepted_by_module

MEMORY = 6 * SZ_1G
KERNEL_MAP = 0xFFFF_FFFF_8000_0000


def printed(boot: Boot, stage: str) -> list[str]:
    """What a stage printed."""
    return [r.event.text for r in boot.trace.records if isinstance(r.event, Print) and r.stage == stage]


def real_boot(kernel: Path, run: str, **options: object) -> Boot:
    """A boot that runs the kernel's own code."""
    config: dict[str, object] = {"memory": MEMORY, "cmdline": REAL_KERNEL_CMDLINE} | options
    return Boot(BootConfig(kernel.read_bytes(), run=run, **config))  # type: ignore[arg-type]


def test_the_unpacking_functions_are_found_in_the_image(exact_debian_kernel: Path) -> None:
    """decompress_kernel() and extract_kernel() of this build begin where a disassembler shows them."""
    assert find_payload_users(exact_debian_kernel.read_bytes()) == (0xB02570, 0xB028F0)


def test_the_real_stub_hands_over_to_our_kernel(debian_kernel: Path) -> None:
    """The real EFI stub runs on our firmware; our kernel stages go on with the boot_params and table it left."""
    boot = real_boot(debian_kernel, "stub")
    boot.run()
    assert boot.boot_params is not None
    assert max(entry.addr + entry.size for entry in e820_table_of(boot.boot_params)) == SZ_4G + MEMORY - 2 * SZ_1G
    assert any(line.startswith("efi: ") and "Unaccepted=0x" in line for line in printed(boot, "setup-arch"))
    assert boot.kernel is not None
    assert boot.kernel.allocator is not None
    unaccepted = sum(zone.nr_unaccepted for zone in boot.kernel.allocator.zones) << 12
    accepted = boot.sept.mapped(SZ_4G, SZ_4G + MEMORY).total()
    blocks = 4 << 20
    assert 0 < unaccepted < MEMORY - 2 * SZ_1G
    assert MEMORY - 2 * SZ_1G <= unaccepted + accepted <= MEMORY - 2 * SZ_1G + blocks  # a guard is counted twice
    assert unaccepted_by_bitmap(boot) == unaccepted_by_module(boot)
    assert not lost_memory(boot)


def test_the_real_stub_calls_the_services_it_is_known_to_call(exact_debian_kernel: Path) -> None:
    """The boot services that the stub of this build calls between loading and leaving, in order."""
    boot = real_boot(exact_debian_kernel, "stub")
    boot.run("efi-stub")
    calls = [r.event.service for r in boot.trace.records if isinstance(r.event, ServiceCall) and r.stage == "efi-stub"]
    assert calls[:4] == ["HandleProtocol", "AllocatePages", "LocateProtocol", "LocateProtocol"]
    assert calls[-3:] == ["InstallConfigurationTable", "GetMemoryMap", "ExitBootServices"]
    assert calls.count("InstallConfigurationTable") == 2


def test_the_real_kernel_reaches_its_zones(debian_kernel: Path) -> None:
    """The real kernel boots as a TD: it sees our map, accepts memory by TDCALL, and prints its zones."""
    boot = real_boot(debian_kernel, "kernel", until="Zone ranges:")
    boot.run()
    lines = printed(boot, "kernel")
    assert lines[0].endswith("tdx: Guest detected")
    assert any("BIOS-e820: [mem 0x0000000100000000-0x00000001ffffffff] usable" in line for line in lines)
    assert lines[-1].endswith("Zone ranges:")
    accepts = [r.event for r in boot.trace.records if isinstance(r.event, TdCall) and r.event.leaf == ACCEPT]
    assert any(r.rcx >= SZ_4G for r in accepts)


def test_the_real_decompressor_runs_after_our_stub(debian_kernel: Path) -> None:
    """Bytes are the only interface: the real decompressor starts from what our stub left, and our kernel goes on."""
    boot = real_boot(debian_kernel, "decompressor")
    boot.run()
    assert boot.next_stage is None
    assert boot.real_code is not None
    assert boot.real_code.unpacked_for == (LOAD_PHYSICAL_ADDR, LOAD_PHYSICAL_ADDR)
    assert boot.kernel is not None
    assert boot.kernel.image.start == LOAD_PHYSICAL_ADDR
    assert boot.kernel.allocator is not None
    assert any(zone.nr_unaccepted for zone in boot.kernel.allocator.zones)
    assert unaccepted_by_bitmap(boot) == unaccepted_by_module(boot)


def test_a_timeout_ends_real_code(debian_kernel: Path) -> None:
    """With ``full`` the decompressor unpacks the kernel itself, which a timeout cuts short."""
    boot = real_boot(debian_kernel, "decompressor", timeout=5_000_000, full=True)
    with pytest.raises(GuestPanic, match="instructions"):
        boot.run()
    assert boot.done == ["host", "firmware", "efi-stub"]
    assert boot.real_code is not None
    assert boot.real_code.counter.count >= 5_000_000


def test_a_kernel_with_one_byte_changed_dies_of_it(exact_debian_kernel: Path) -> None:
    """A kernel whose accept loop is never entered touches unaccepted memory: address, state, RIP, symbol are named."""
    boot = real_boot(exact_debian_kernel, "kernel")
    boot.run("efi-stub")
    symbols = read_kallsyms(decompress(parse_bzimage(boot.config.kernel).payload(boot.config.kernel)))
    assert symbols is not None
    accept = symbols.address("tdx_accept_memory")
    assert accept is not None
    code = boot.physical.read(accept - KERNEL_MAP, 32)
    jump = code.index(b"\x48\x39\xf7\x73") + 3  # cmp rdi, rsi; jae done
    boot.physical.write(accept - KERNEL_MAP + jump, b"\xeb")  # jmp done: it "succeeds"
    with pytest.raises(MemoryFault) as death:
        boot.run()
    assert (death.value.stage, death.value.state) == ("kernel", "FREE (not accepted)")
    assert SZ_4G <= death.value.gpa < SZ_4G + MEMORY
    assert boot.real_code is not None
    lines = report(boot.real_code.vcpu, boot.trace, symbols)
    assert lines[0].startswith("RIP: 0010:")
    assert "+0x" in lines[0]


def test_ve_for_io_and_cpuid_reaches_the_zones(debian_kernel: Path) -> None:
    """With #VE on port I/O and CPUID, as a real TD has it, the kernel gets as far as without."""
    boot = real_boot(debian_kernel, "kernel", until="Zone ranges:", ve=("io", "cpuid"))
    boot.run()
    assert printed(boot, "kernel")[-1].endswith("Zone ranges:")
    assert boot.real_code is not None
    assert all(boot.real_code.vcpu.ve_reasons[reason] > 100 for reason in (ExitReason.CPUID, ExitReason.IO_INSTRUCTION))
