"""The real kernel where KASLR puts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootstub.bzimage import parse_bzimage
from guest.errors import GuestPanic
from guest.trace import Print
from guest.units import SZ_1G, SZ_2M, round_up
from tests.relocation_model import BASE, moved_segments
from tools.pipeline import REAL_KERNEL_CMDLINE, Boot, BootConfig
from tools.postmortem import postmortem

KASLR = REAL_KERNEL_CMDLINE.removeprefix("nokaslr ")


def booted(kernel: Path, run: str, until: str, **options: object) -> Boot:
    """A boot of real code with KASLR, as far as a stage or a line."""
    if run == "kernel":
        options["until"] = until
    config = BootConfig(kernel.read_bytes(), memory=6 * SZ_1G, cmdline=KASLR, run=run, **options)  # type: ignore[arg-type]
    boot = Boot(config)
    boot.run(until if run == "stub" else None)
    return boot


def place_of(boot: Boot) -> tuple[int, int]:
    """Physical and virtual address that KASLR chose, the latter from the start of the kernel's mapping."""
    assert boot.real_code is not None
    assert boot.real_code.unpacked_for is not None
    return boot.real_code.unpacked_for


@pytest.mark.parametrize("seed", [1, 2])
def test_relocations_are_those_of_the_elf_file(debian_kernel: Path, seed: int) -> None:
    """An answered run leaves the kernel that another reading of the lists gives, to the byte."""
    boot = booted(debian_kernel, "stub", "efi-stub", seed=seed)
    output, virtual = place_of(boot)
    expected = moved_segments(debian_kernel, virtual - BASE)
    assert virtual != BASE
    assert {start: boot.physical.read(output + start, len(data)) for start, data in expected.items()} == expected


def test_an_answered_run_leaves_what_the_real_code_leaves(debian_kernel: Path) -> None:
    """The memory that the stub allocated for the kernel, and all registers, are the same where it unpacked itself."""
    answered, executed = (booted(debian_kernel, "stub", "efi-stub", seed=3, full=full) for full in (False, True))
    (output, virtual), size = place_of(answered), parse_bzimage(debian_kernel.read_bytes()).init_size
    assert place_of(executed) == (output, virtual)
    assert executed.physical.read(output, size) == answered.physical.read(output, size)
    assert executed.machine.regs == answered.machine.regs


def test_the_seed_decides_where_the_kernel_goes(debian_kernel: Path) -> None:
    """Other seeds give other physical and virtual addresses, the same seed the same ones."""
    places = [place_of(booted(debian_kernel, "stub", "efi-stub", seed=seed)) for seed in (0, 1, 2, 3, 1)]
    assert places[4] == places[1]
    assert len({physical for physical, _ in places}) == len({virtual for _, virtual in places}) == 4


def test_the_moved_kernel_reaches_its_zones(debian_kernel: Path) -> None:
    """A kernel that KASLR moved runs as one that stays, and a report on it names its functions."""
    boot = booted(debian_kernel, "kernel", "Zone ranges:", seed=1)
    printed = [record.event.text for record in boot.trace.records if isinstance(record.event, Print)]
    assert printed[-1].endswith("Zone ranges:")
    lines = postmortem(boot, GuestPanic("kernel", "stopped by this test"), None)
    trace = lines[lines.index("Call Trace:") + 1 :]
    assert any(line.startswith(" ? setup_arch+0x") for line in trace)
    assert any(line.startswith(" ? start_kernel+0x") for line in trace)


def test_a_moved_kernel_in_our_stages(debian_kernel: Path) -> None:
    """Our kernel stages run on what the real stub left where KASLR put it."""
    boot = booted(debian_kernel, "stub", "runtime", seed=2)
    assert boot.done[-1] == "runtime"
    assert boot.kernel is not None
    output, _ = place_of(boot)
    size = round_up(parse_bzimage(debian_kernel.read_bytes()).init_size, SZ_2M)
    assert output != BASE
    assert boot.kernel.image == (output, output + size)
    assert all(boot.kernel.memblock.is_reserved(at) for at in (output, output + size - 1))
