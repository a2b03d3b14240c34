"""The profile td-shim: what it hands over, held against its rules typed out anew, and whole boots to the end."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstub.sample_kernel import sample_bzimage
from firmware.accept_policy import AcceptPolicy
from guest.errors import FormatError, GuestPanic
from guest.ranges import RangeSet
from guest.trace import Print
from tools.pipeline import Boot, BootConfig, stages_of
from tools.verdict import verdict_lines

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HOB, BITMAP, CMDLINE, PAYLOAD, FREE = 0x80_0000, 0x82_0000, 0x86_0000, 0x86_1000, 0x886_1000
UNIT = 2 * MIB
KERNEL = sample_bzimage()
TOP = ((4, MIB), (4, 0x2000), (2, 128 * KIB), (3, MIB))
"""e820 type and size of the event log, mailbox, page tables and ACPI tables, from the top downwards."""


def shim(memory: int = 4 * GIB, size: int = 256 * MIB, **options: object) -> Boot:
    """A boot whose td-shim ran."""
    boot = Boot(BootConfig(KERNEL, memory, profile="td-shim", accept=AcceptPolicy(size=size), **options))
    boot.run("firmware")
    return boot


def slow_model(memory: int, size: int) -> tuple[list[tuple[int, int]], int, RangeSet]:
    """Ranges that are left after the first ``size`` bytes; top of what is accepted below 4 GiB; accepted memory."""
    low = memory if memory < 2816 * MIB else 2 * GIB
    ranges = [(0, HOB), (BITMAP, CMDLINE), (FREE, low)]
    if memory > low:
        ranges.append((4 * GIB, 4 * GIB + memory - low))
    left, top, accepted = [], FREE, RangeSet([(HOB, BITMAP), (CMDLINE, FREE)])
    for start, end in ranges:
        stop = min(end, start + size)
        size -= stop - start
        if start < stop:
            accepted.add(start, stop)
            top = max(top, stop if stop < 4 * GIB else 0)
        if stop < end:
            left.append((stop, end))
    return left, top, accepted


def e820(page: bytes) -> list[tuple[int, int, int]]:
    """(start, end, type) of the entries in boot_params."""
    entries = struct.iter_unpack("<QQI", page[0x2D0 : 0x2D0 + 20 * page[0x1E8]])
    return [(start, start + size, kind) for start, size, kind in entries]


@settings(deadline=None, max_examples=25)
@given(st.integers(150, 8192).map(lambda n: n * MIB), st.integers(3000, 400_000).map(lambda n: n * 4 * KIB))
def test_table_and_bitmap_say_what_is_accepted(memory, size):
    """All RAM is in the table; each unit of 2 MiB is accepted, or its bit is set, and never both."""
    left, top, accepted = slow_model(memory, size)
    if top - sum(size for _, size in TOP) < FREE:
        with pytest.raises(GuestPanic, match="no accepted memory for its regions"):
            shim(memory, size)
        return
    boot = shim(memory, size)
    page = boot.physical.read(boot.machine.regs.rsi, 4096)
    assert int.from_bytes(page[0x78:0x80], "little") == BITMAP
    bits = boot.physical.read(BITMAP, 256 * KIB)
    found = {n * 8 + b for n, byte in enumerate(bits) if byte for b in range(8) if byte >> b & 1}
    wanted = set()
    for start, end in left:
        units = {n for n in range(start // UNIT, end // UNIT + 1) if start <= n * UNIT and (n + 1) * UNIT <= end}
        wanted |= units
        accepted.add(start, end)
    for unit in wanted:
        accepted.remove(unit * UNIT, unit * UNIT + UNIT)
    assert found == wanted
    assert boot.sept.mapped() == accepted
    special, end = [], top
    for kind, length in TOP:
        special.append((end - length, end, kind))
        end -= length
    merged = [(special[1][0], special[0][1], 4), *special[2:]]
    table = e820(page)
    assert [entry for entry in table if entry[2] != 1] == merged[::-1]
    assert RangeSet((start, end) for start, end, _ in table) == boot.host.ram


def test_the_kernel_is_entered_by_the_boot_protocol():
    """The header is the file's but for the loader's fields; RSI, RIP and the command line are where they belong."""
    boot = shim(cmdline="nokaslr quiet")
    page = boot.physical.read(boot.machine.regs.rsi, 4096)
    startup_32 = PAYLOAD + (KERNEL[0x1F1] + 1) * 512
    assert boot.physical.read(PAYLOAD, len(KERNEL)) == KERNEL
    assert boot.machine.regs.rip == startup_32 + 0x200
    assert boot.machine.regs.rdx == 0
    header = bytearray(KERNEL[0x1F1:0x26C])
    header[0x210 - 0x1F1] = 0xFF
    header[0x214 - 0x1F1 : 0x218 - 0x1F1] = struct.pack("<I", startup_32)
    header[0x228 - 0x1F1 : 0x22C - 0x1F1] = struct.pack("<I", CMDLINE)
    assert page[0x1F1:0x26C] == header
    assert boot.physical.read(CMDLINE, 14) == b"nokaslr quiet\0"
    assert page[0x1C0:0x1E0] == bytes(32)  # no EFI
    rsdp = int.from_bytes(page[0x70:0x78], "little")
    assert boot.physical.read(rsdp, 8) == b"RSD PTR "
    (acpi,) = [(start, end) for start, end, kind in e820(page) if kind == 3]
    assert acpi[0] <= rsdp < acpi[1]
    (reserved,) = [(start, end) for start, end, kind in e820(page) if kind == 2]
    assert reserved[0] <= boot.machine.regs.rsi < reserved[1]
    prints = [r.event.text for r in boot.trace.records if isinstance(r.event, Print)]
    assert prints == ["Jump to kernel..."]


@pytest.mark.parametrize("memory, size", [(4, 256), (2, 256), (64, 1024), (6, 3000)])
def test_the_boot_goes_through_without_a_stub(memory, size):
    """The stages are those of v9 less the stub; in the end bitmap and Secure EPT agree."""
    boot = shim(memory * GIB, size * MIB)
    assert tuple(boot.stages) == ("host", "firmware", "decompress", "setup-arch", "mm-init", "runtime")
    boot.run()
    *holes, line = verdict_lines(boot)
    assert all(hole.startswith("known hole guard-bit: ") for hole in holes)
    assert line.startswith("bitmap and Secure EPT agree: ")


def test_a_memory_that_the_bitmap_cannot_hold_ends_it():
    """Bits reach up to 4 TiB; a unit behind that is an index out of bounds."""
    assert shim(4094 * GIB).done == ["host", "firmware"]
    with pytest.raises(GuestPanic) as died:
        shim(4096 * GIB)
    assert died.value.text == "index out of bounds: the len is 262144 but the index is 262144"


@pytest.mark.parametrize("at, value", [(0x202, 0), (0x207, 1), (0x211, 0)])
def test_what_is_no_bzimage_ends_it(at, value):
    """Magic, a protocol of at least 2.00 and LOADED_HIGH are asked for, and nothing else."""
    kernel = bytearray(KERNEL)
    kernel[at] = value
    boot = Boot(BootConfig(bytes(kernel), profile="td-shim"))
    with pytest.raises(GuestPanic) as died:
        boot.run("firmware")
    assert died.value.text == "td-shim: InvalidBzImage"


@pytest.mark.parametrize(
    "options, what",
    [({"cmdline": "x" * 4096}, "command line"), ({"kernel": bytes(128 * MIB + 1)}, "kernel")],
)
def test_what_has_no_room_is_refused(options, what):
    """The command line has a page with its NUL, the kernel 128 MiB."""
    with pytest.raises(FormatError) as refused:
        Boot(BootConfig(**({"kernel": KERNEL, "profile": "td-shim"} | options))).run("host")
    assert refused.value.what == what


def test_debians_kernel_is_unpacked_under_td_shim(command, debian_kernel):
    """A real bzImage as the payload is decompressed and started; the table of stages has no stub."""
    answer = command("boot", "--profile", "td-shim", "--kernel", debian_kernel, "--accept-cpus", "4")
    assert answer.status == 0
    assert "\nefi-stub " not in answer.out
    assert answer.out.splitlines()[-1].startswith("bitmap and Secure EPT agree: ")


@pytest.mark.parametrize(
    "words, error",
    [
        (["--profile", "seabios"], "--profile: found 'seabios', expected ovmf or td-shim"),
        (["--profile", "td-shim", "--protocol", "mainline"], "--protocol: found with --profile td-shim, expected v9: "),
        (["--profile", "td-shim", "--firmware", "x"], "--firmware: found with --profile td-shim, expected one of the "),
        (["--profile", "td-shim", "--initrd", "x"], "--initrd: found with --profile td-shim, expected one of the two"),
        (["--profile", "td-shim", "--offer", "rng"], "--offer: found with --profile td-shim, expected one of the two"),
        (["--profile", "td-shim", "--variable", "a=0"], "--variable: found with --profile td-shim, expected one of th"),
        (["--profile", "td-shim", "--run", "kernel"], "--run: found with --profile td-shim, expected one of the two"),
        (
            ["--profile", "td-shim", "--efi-map", "x"],
            "--efi-map: found with --profile td-shim, expected one of the two",
        ),
        (
            ["--profile", "td-shim", "--fault", "busy@stage=efi-stub"],
            "fault 'busy@stage=efi-stub': found stage=efi-stub",
        ),
    ],
)
def test_what_td_shim_cannot_do_is_refused(refused, words, error):
    """One line that says what does not go together."""
    assert refused("boot", *words).startswith(error)


def test_the_profile_has_no_stage_efi_stub():
    """The table of stages is that of the profile."""
    assert "efi-stub" in stages_of(BootConfig(KERNEL))
    assert "efi-stub" not in stages_of(BootConfig(KERNEL, profile="td-shim"))
