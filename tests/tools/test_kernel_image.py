"""Kernels that ``boot --kernel`` takes: every compression, a bare vmlinux, and one that knows no unaccepted memory."""

from __future__ import annotations

import struct

import pytest

from bootstub.events import KernelPlaced
from bootstub.pack_payload import PACKERS
from bootstub.protocol import MAINLINE, V9, Protocol
from bootstub.sample_kernel import POINTERS, build_bzimage, build_vmlinux
from guest.trace import Note
from tools.pipeline import Boot, BootConfig

LOST = "lost: 2097152 KiB of unaccepted memory are not in the kernel's e820 table\n"
WITHOUT = "# CONFIG_UNACCEPTED_MEMORY is not set\n"
NOTE = "unaccepted: note: the kernel does not know unaccepted memory and will lose it: "


SEGMENTS = (("text", 0), ("data", 0x200000), ("percpu", 0x210000), ("init", 0x220000))
SEGMENT_SIZE = 0x10000


def placed(image: bytes, protocol: Protocol, last_stage: str) -> bytes:
    """The segments of the kernel, when they are in place."""
    boot = Boot(BootConfig(image, protocol=protocol))
    boot.run(last_stage)
    (at,) = (record.event.physical for record in boot.trace.records if isinstance(record.event, KernelPlaced))
    return b"".join(boot.physical.read(at + offset, SEGMENT_SIZE) for _, offset in SEGMENTS)


@pytest.mark.parametrize(("protocol", "stage"), [(V9, "decompress"), (MAINLINE, "efi-stub")], ids=["v9", "mainline"])
def test_every_compression_boots_to_the_same_bytes(protocol, stage):
    """An image of each compression leaves the same kernel in memory: the segments of the file that was packed."""
    vmlinux = build_vmlinux()
    offsets = (0x200000, 0x400000, 0x600000, 0x620000)  # of the segments in the file
    expected = b"".join(vmlinux[at : at + SEGMENT_SIZE] for at in offsets)
    for number, (name, _) in enumerate(SEGMENTS):
        assert expected[number * SEGMENT_SIZE + 0x1000 :].startswith(name.encode())
    for compression in PACKERS:
        assert placed(build_bzimage(vmlinux, compression=compression), protocol, stage) == expected, compression


def test_bare_vmlinux_boots(command, file):
    """A bare vmlinux is packed into a bzImage of ours, which is said, and boots as the sample made of it does."""
    answer = command("boot", "--kernel", file("vmlinux", build_vmlinux()))
    assert answer.status == 0
    assert answer.err.startswith(
        "unaccepted: note: a bare vmlinux has no boot stub: packed into a bzImage of ours, code32_start 0x100000, "
    )
    assert answer.out == command("boot").out


BARE = build_vmlinux()[: -3 * (1 + POINTERS) * 4]
"""The file without the three lists behind it."""


@pytest.mark.parametrize("protocol", ["v9", "mainline"])
def test_vmlinux_without_relocations(command, file, protocol):
    """Without relocations behind it, it boots with nokaslr, which is said."""
    answer = command("boot", "--kernel", file("vmlinux", BARE), "--protocol", protocol)
    assert (answer.status, answer.err.count("; without relocations it needs nokaslr\n")) == (0, 1)


def test_vmlinux_without_relocations_cannot_move(command, file):
    """With KASLR it is refused by the table that it does not have."""
    words = ("--protocol", "mainline", "--cmdline", "quiet", "--until", "efi-stub")
    answer = command("boot", "--kernel", file("vmlinux", BARE), *words)
    assert answer.status == 1
    assert answer.err.splitlines()[-1].startswith("unaccepted: error: relocation table at")


def test_sections_are_left_out(command, file):
    """What lies behind the last segment, as symbols do, is not packed: the boot is that of the file without it."""
    with_sections = bytearray(BARE + bytes(1 << 20) + bytes(64))
    struct.pack_into("<Q", with_sections, 40, len(BARE) + (1 << 20))  # e_shoff
    struct.pack_into("<HH", with_sections, 58, 64, 1)  # e_shentsize, e_shnum
    answer = command("boot", "--kernel", file("vmlinux", bytes(with_sections)))
    plain = command("boot", "--kernel", file("bare", BARE))
    assert (answer.out, answer.err) == (plain.out, plain.err)


def test_vmlinux_has_no_code_to_run(refused, file):
    """A bare vmlinux is no image that runs as real code."""
    error = refused("boot", "--kernel", file("vmlinux", build_vmlinux()), "--run", "stub")
    assert error.startswith("--run: found a bare vmlinux, expected a bzImage")


@pytest.mark.parametrize("protocol", ["v9", "mainline"])
def test_a_kernel_without_support_loses_memory(command, file, protocol):
    """A kernel whose own configuration has no UNACCEPTED_MEMORY: it is said before and after, with the amount."""
    image = file("vmlinuz", build_bzimage(build_vmlinux(config=WITHOUT)))
    answer = command("boot", "--kernel", image, "--protocol", protocol)
    assert answer.status == 0
    assert answer.err == f"{NOTE}CONFIG_UNACCEPTED_MEMORY is not set\n"
    assert answer.out.endswith(f"{LOST}no bitmap of unaccepted memory; 2097152 KiB are unaccepted\n")
    warning = "EFI stub: WARNING: The system has unaccepted memory,  but kernel does not support it\n"
    assert (warning in answer.out) == (protocol == "v9")


def test_the_configuration_decides(command, file):
    """A configuration beside the image wins, for a kernel of one's own and for the sample."""
    beside, image = file("config", WITHOUT), file("vmlinuz", build_bzimage(build_vmlinux(config=WITHOUT)))
    assert LOST in command("boot", "--kernel-config", beside).out
    supported = file("supported", "CONFIG_UNACCEPTED_MEMORY=y\n")
    answer = command("boot", "--kernel", image, "--kernel-config", supported)
    assert answer.err == ""
    assert answer.out == command("boot").out


def test_debian_6_1_loses_memory(command, debian_kernel_6_1):
    """Debian's 6.1 is recognised by its strings, and its real stub and ours lose the same."""
    answer = command("boot", "--kernel", debian_kernel_6_1)
    assert answer.err == f"{NOTE}it has no nr_unaccepted\n"
    assert LOST in answer.out
    real = command("boot", "--kernel", debian_kernel_6_1, "--run", "stub")
    assert real.err == ""
    assert LOST in real.out


def test_the_stub_without_support():
    """Type 15 is in no table: no bitmap, no accept, no entry; what is lost is noted. Everything else is as before."""
    for protocol in (V9, MAINLINE):
        sound, boot = (Boot(BootConfig(build_bzimage(build_vmlinux()), protocol=p))
                       for p in (protocol, protocol.without_support()))  # fmt: skip
        sound.run("efi-stub")
        boot.run("efi-stub")
        assert boot.boot_params[0x78:0x80] == bytes(8)
        assert boot.boot_params[0x1E8] == sound.boot_params[0x1E8] - 1
        notes = [r.event.text for r in boot.trace.records if isinstance(r.event, Note)]
        assert "2097152 KiB of unaccepted memory are left out of the e820 table" in notes


def test_a_kernel_that_is_too_large(refused, file):
    """A vmlinux that fits no kernel's room is refused before it is packed."""
    data = bytearray(build_vmlinux())
    data[64 + 3 * 56 + 40 : 64 + 3 * 56 + 48] = (1 << 33).to_bytes(8, "little")  # p_memsz of the last segment
    assert refused("boot", "--kernel", file("vmlinux", bytes(data))).startswith("vmlinux, _end - _text: found 0x")


BROKEN = {"empty": b"", "magic alone": b"\x7fELF", "ELF header cut": build_vmlinux()[:200]}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel_is_one_line(refused, file, data):
    """What is wrong with a kernel file is one line, as for every input."""
    assert refused("boot", "--kernel", file("vmlinuz", data))


def test_a_payload_that_is_no_kernel(command, file):
    """A payload without an ELF file is the decompressor's to refuse: the boot goes as far as that."""
    answer = command("boot", "--kernel", file("vmlinuz", build_bzimage(b"no ELF file")))
    assert answer.status == 1
    assert answer.err.startswith("unaccepted: error: Kernel is not a valid ELF file: e_ident")
