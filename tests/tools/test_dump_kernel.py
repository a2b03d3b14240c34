"""``unaccepted dump kernel``: every part of an image, by numbers that other tools read; and what is refused."""

from __future__ import annotations

import gzip
import json
import re
import struct

import pytest

from bootstub.pack_payload import PACKERS
from bootstub.payload import decompress
from bootstub.sample_kernel import KERNEL_TOTAL_SIZE, KERNEL_VERSION, POINTERS, build_bzimage, build_vmlinux

CONFIG = "CONFIG_UNACCEPTED_MEMORY=y\n# CONFIG_NUMA is not set\nCONFIG_PHYSICAL_ALIGN=0x200000\nCONFIG_KERNEL_ZSTD=y\n"


def dumped(command, *words) -> str:
    answer = command("dump", "kernel", *words)
    assert (answer.status, answer.err) == (0, "")
    return answer.out


def test_debian(command, exact_debian_kernel):
    """Debian's 6.12 kernel, by the numbers of file(1), objdump, readelf and the relocation table's length."""
    lines = dumped(command, exact_debian_kernel).splitlines()
    assert lines[0] == "bzImage, boot protocol 2.15, 11655104 bytes"
    assert lines[1].startswith("version Linux version 6.12.117+deb12-cloud-amd64 (debian-kernel@lists.debian.org)")
    assert "  0x206 version                 0x020f  2.15" in lines
    assert "  0x260 init_size               0x037dc000  57200 KiB" in lines
    assert "0x52cc payload, 11409810 bytes of zstd, 57575404 bytes unpacked" in lines
    assert "  .data       0xb1c000     0x67000    0xb1c000      0x1200  0xc0000040" in lines
    assert "  LOAD       0x2716000 0xffffffff83316000   0x3316000    0xeea000    0xeea000 rwx" in lines
    assert "relocations: 146103 of 64 bits, 13099 inverse of 32 bits, 78012 of 32 bits" in lines
    assert lines[-2:] == [
        "no configuration inside (IKCONFIG); --config FILE names one",
        "knows unaccepted memory: it has nr_unaccepted",
    ]


def test_init_size_is_explained(command, exact_debian_kernel):
    """Unpacking in place and the decompressor add up to init_size; the latter is the PE image behind its setup."""
    data = json.loads(dumped(command, exact_debian_kernel, "--json"))
    init_size, payload = data["bzimage"]["setup_header"]["init_size"], data["payload"]
    of_decompressor = init_size - payload["extract_offset"]
    assert init_size > payload["total_size"]
    assert of_decompressor == data["pe"]["size_of_image"] - 0x5000
    text = dumped(command, exact_debian_kernel)
    assert f"{payload['extract_offset']:#x} to unpack in place, and {of_decompressor:#x} of the decompressor <-" in text


def test_init_size_of_a_large_kernel(command, file):
    """Where the kernel in the end is larger than what unpacks it, that is said."""
    size = 32 << 20
    image = build_bzimage(build_vmlinux(kernel_total_size=size), kernel_total_size=size)
    text = dumped(command, file("vmlinuz", image))
    assert f"  {size:#x}: the kernel in the end, _end - _text <-\n" in text


def test_init_size_that_is_too_small(command, file):
    """A header that promises less memory than unpacking takes is shown as such."""
    image = damaged(0x260, "<I", 0x500000, build_bzimage(build_vmlinux()))
    assert re.search(
        r"\ninit_size 0x500000 is too small: 0x600000 for the kernel, 0x\w+ to unpack",
        dumped(command, file("vmlinuz", image)),
    )


def test_debian_6_1(command, debian_kernel_6_1):
    """Debian's 6.1 kernel is packed by lz4 and does not know unaccepted memory."""
    text = dumped(command, debian_kernel_6_1)
    assert re.search(r"payload, \d+ bytes of lz4, \d+ bytes unpacked", text)
    assert text.splitlines()[-1] == "does not know unaccepted memory: it has no nr_unaccepted"


@pytest.mark.parametrize("compression", PACKERS)
def test_every_compression(command, file, compression):
    """The compression is named, and what is inside is the same for each."""
    vmlinux = build_vmlinux(config=CONFIG)
    data = json.loads(dumped(command, file("vmlinuz", build_bzimage(vmlinux, compression=compression)), "--json"))
    assert data["payload"]["compression"] == compression.removesuffix("-without-bcj")
    assert data["payload"]["output_len"] == len(vmlinux)
    assert data["elf"]["total_size"] == KERNEL_TOTAL_SIZE
    assert [header["p_type"] for header in data["elf"]["program_headers"]] == [1, 1, 1, 1, 4]
    assert data["relocations"] == {"words64": POINTERS, "inverse32": POINTERS, "words32": POINTERS}
    assert data["config"]["PHYSICAL_ALIGN"] == "0x200000"
    assert data["unaccepted_memory"] == {"known": True, "reason": "CONFIG_UNACCEPTED_MEMORY is y"}
    assert data["bzimage"]["kernel_version"] == KERNEL_VERSION
    assert data["pe"]["subsystem"] == 10


@pytest.mark.parametrize("pack", [str.encode, lambda text: gzip.compress(text.encode())], ids=["plain", "gzip"])
def test_configuration_beside_the_kernel(command, file, pack):
    """A file beside the image wins over what is inside; plain, or packed as /proc/config.gz is."""
    image = file("vmlinuz", build_bzimage(build_vmlinux(config=CONFIG)))
    lines = dumped(command, image).splitlines()
    assert "configuration inside (IKCONFIG), 4 options" in lines
    assert {"  CONFIG_NUMA is not set", "  CONFIG_PHYSICAL_ALIGN=0x200000", "  CONFIG_KERNEL_ZSTD=y"} <= set(lines)
    beside = file("config", pack("# CONFIG_UNACCEPTED_MEMORY is not set\nCONFIG_X86_5LEVEL=y\n"))
    lines = dumped(command, image, "--config", beside).splitlines()
    assert "configuration of the file beside it, 2 options" in lines
    assert lines[-1] == "does not know unaccepted memory: CONFIG_UNACCEPTED_MEMORY is not set"


@pytest.mark.parametrize(("version", "fields"), [(0x202, 16), (0x207, 9), (0x20A, 3), (0x20F, 0)])
def test_old_headers(command, file, version, fields):
    """Fields that came later are shown as such, with what holds instead."""
    text = dumped(command, file("vmlinuz", build_bzimage(build_vmlinux(), version=version)))
    assert len(re.findall("not before 2", text)) == fields
    assert ("cmdline_size            not before 2.06; 0xff\n" in text) == (version < 0x206)
    assert ("no payload_offset" in text) == (version < 0x208)


def test_bare_vmlinux(command, file):
    """An ELF file has no setup header; its segments and relocations are the same."""
    text = dumped(command, file("vmlinux", build_vmlinux()))
    assert text.startswith(f"bare vmlinux, {len(build_vmlinux())} bytes\nvmlinux: e_entry 0x1000000, ")
    assert "relocations: 16 of 64 bits, 16 inverse of 32 bits, 16 of 32 bits\n" in text
    assert text.endswith("may know unaccepted memory: it is no Linux that tells\n")
    data = json.loads(dumped(command, file("vmlinux", build_vmlinux()), "--json=short"))
    assert (data["bzimage"], data["pe"], data["config"]) == (None, None, None)


def test_hex(command, file):
    """--hex prints the headers, and nothing else, at their places in the file."""
    lines = dumped(command, file("vmlinuz", build_bzimage(build_vmlinux())), "--hex").splitlines()
    assert lines[0].startswith("00000040: 5045 0000 6486 0100")
    assert "000001f1: 07" in "\n".join(lines)
    lines = dumped(command, file("vmlinux", build_vmlinux()), "--hex").splitlines()
    assert len(lines) == (64 + 5 * 56 + 8) // 16
    assert lines[0].startswith("00000000: 7f45 4c46 0201 0100")


def damaged(at: int, form: str, value: int, image: bytes) -> bytes:
    data = bytearray(image)
    struct.pack_into(form, data, at, value)
    return bytes(data)


IMAGE = build_bzimage(build_vmlinux(config=CONFIG), compression="gzip")
VMLINUX = build_vmlinux(config=CONFIG)
BROKEN = {
    "empty": (b"", "setup_header"),
    "no header": (bytes(4096), "setup_header.boot_flag at 0x1fe: found 0x0000"),
    "old": (build_bzimage(VMLINUX, version=0x202)[:0x206] + b"\1\2" + IMAGE[0x208:], "setup_header.version"),
    "payload": (damaged(0x12C0, "<Q", 0, IMAGE), "payload magic at 0x12c0: found 000000000000"),
    "cut payload": (IMAGE[:-0x1000], "setup_header.syssize at 0x1f4"),
    "kernel_info": (damaged(0x268, "<I", 0x40, IMAGE), "kernel_info at 0x1040: found"),
    "PE": (damaged(0x40, "<I", 0, IMAGE), "COFF header Signature at 0x40"),
    "ELF": (damaged(18, "<H", 3, VMLINUX), "e_machine at 0x12: found EM_386"),
    "segment": (damaged(64 + 48, "<Q", 4096, VMLINUX), "Alignment of LOAD segment isn't multiple of 2MB"),
    "relocations": (VMLINUX + b"\1", "relocation table at"),
    "IKCONFIG": (damaged(VMLINUX.index(b"IKCFG_ST") + 18, "<Q", (1 << 64) - 1, VMLINUX), "IKCONFIG at"),
}


@pytest.mark.parametrize("data, error", BROKEN.values(), ids=BROKEN)
def test_broken_input_is_one_line(refused, file, data, error):
    """Each part that cannot be right is refused in one line."""
    assert refused("dump", "kernel", file("vmlinuz", data)).startswith(error)


CONFIGS = {
    "no option": (b"hello\n", "kernel configuration: found no option"),
    "gzip": (b"\x1f\x8b\x08" + b"x" * 20, ""),
    "bomb": (gzip.compress(bytes(64 << 20)), ""),
}


@pytest.mark.parametrize("data, error", CONFIGS.values(), ids=CONFIGS)
def test_broken_configuration_is_one_line(refused, file, data, error):
    """A file that is no configuration is refused in one line; one that grows without end is not followed."""
    text = refused("dump", "kernel", file("vmlinuz", IMAGE), "--config", file("config", data))
    assert text.startswith(error)


def test_the_dumped_payload_is_the_kernel(command, file):
    """Offset and length of the payload lead to the kernel."""
    payload = json.loads(dumped(command, file("vmlinuz", IMAGE), "--json"))["payload"]
    assert decompress(IMAGE[payload["offset"] :][: payload["length"]]) == VMLINUX
