"""Sound inputs, small and built by hand, from which hostile ones are made."""

from __future__ import annotations

import struct
import zlib

from bootstub.make_bzimage import make_bzimage
from bootstub.pack_payload import PACKERS

LOAD, MAP = 0x1000000, 0xFFFFFFFF80000000
_CONFIG = b"CONFIG_UNACCEPTED_MEMORY=y\n# CONFIG_NUMA is not set\n"
_BODY = (
    b"\xf4\xeb\xfd Linux version 6.12 (fuzz)\0nr_unaccepted\0IKCFG_ST" + zlib.compress(_CONFIG, wbits=31) + b"IKCFG_ED"
)


def vmlinux() -> bytes:
    """An ELF file with two segments, a section .brk and the three relocation lists behind it: 5 KiB."""
    names = b"\0.brk\0.shstrtab\0"
    phdrs = b"".join(
        struct.pack("<IIQQQQQQ", 1, flags, offset, MAP + LOAD + at, LOAD + at, 0x400, size, 0x200000)
        for flags, offset, at, size in ((5, 0x400, 0, 0x400), (6, 0x800, 0x200000, 0x10000))
    )
    sections = [(0,) * 10, (1, 8, 3, MAP + LOAD + 0x210000, 0xC00, 0x1000, 0, 0, 1, 0)]
    sections.append((6, 3, 0, 0, 0xC00, len(names), 0, 0, 1, 0))
    table = b"".join(struct.pack("<IIQQQQIIQQ", *section) for section in sections)
    ehdr = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, LOAD, 64, 0xC10, 0, 64, 56, 2, 64, len(sections), 2
    )
    lists = [0, 0x81000020, 0, 0x81000030, 0, 0x81000040, 0x81200010]
    file = (ehdr + phdrs).ljust(0x400, b"\0") + _BODY.ljust(0x400, b"\x90") + bytes(0x400) + names.ljust(16, b"\0")
    return file + table + struct.pack(f"<{len(lists)}I", *lists)


def bzimages() -> list[bytes]:
    """The same kernel in every compression, and in images of some older protocols."""
    kinds = [(name, 0x20F) for name in PACKERS] + [("gzip", version) for version in (0x202, 0x207, 0x20A, 0x20C)]
    return [
        make_bzimage(vmlinux(), "6.12 (fuzz)", compression=name, version=version, kernel_total_size=0x211000)
        for name, version in kinds
    ]


def descriptors() -> list[tuple[int, int, int, int]]:
    """Type, start, pages and attribute of each descriptor of a small TD's map."""
    return [(7, 0, 0xA0, 0xF), (4, 0x100000, 0x700, 0xF), (7, 0x800000, 0x7F800, 0xF), (15, 1 << 32, 0x80000, 0xF)]


def raw_map(stride: int) -> bytes:
    """The map as GetMemoryMap() leaves it."""
    rows = (
        struct.pack("<IIQQQQ", kind, 0, start, 0, pages, attribute) for kind, start, pages, attribute in descriptors()
    )
    return b"".join(row.ljust(stride, b"\0") for row in rows)


def boot_params(*, setup_data: int = 0, efi_map: int = 0) -> bytes:
    """A page with an e820 table, and addresses of a list and of a map in guest memory."""
    page = bytearray(4096)
    struct.pack_into("<II", page, 0x202, 0x53726448, 0x20F)
    struct.pack_into("<Q", page, 0x250, setup_data)
    if efi_map:
        struct.pack_into("<IIIIIIII", page, 0x1C0, 0x34364C45, 0x1000, 48, 1, efi_map, 48 * len(descriptors()), 0, 0)
    rows = [(0, 0xA0000, 1), (0x100000, 0x7FF00000, 1), (1 << 32, 1 << 31, 1), (0xFE000000, 0x1000, 2)]
    page[0x1E8] = len(rows)
    for number, row in enumerate(rows):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * number, *row)
    return bytes(page)


def setup_data() -> bytes:
    """Guest memory from 0 on: a word with the address of a list, then its nodes, one of them indirect, one e820."""
    nodes = [(5, b"apple"), (1, struct.pack("<QQI", 1 << 33, 1 << 20, 1) * 2)]
    nodes.append((1 << 31, struct.pack("<IIQQ", 1 << 31 | 1, 0, 40, 0x100)))
    out, at = bytearray(struct.pack("<Q", 0x40)).ljust(0x40, b"\0"), 0x40
    for number, (kind, data) in enumerate(nodes):
        behind = at + 16 + len(data) + 8
        out += struct.pack("<QII", behind if number < len(nodes) - 1 else 0, kind, len(data)) + data + bytes(8)
        at = behind
    return bytes(out)


def memory_image() -> bytes:
    """Guest memory from 0 on with boot_params at 0, an EFI map at 0x1000 and a list at 0x2040."""
    moved = bytearray(setup_data())
    struct.pack_into("<Q", moved, 0x40, 0x2000 + int.from_bytes(moved[0x40:0x48], "little"))
    page = boot_params(setup_data=0x2040, efi_map=0x1000)
    return page + raw_map(48).ljust(0x1000, b"\0") + bytes(moved)


def hob_list() -> bytes:
    """A handoff, memory of each kind, an extension, and the end, at address 0."""
    resources = [(0, 0x809000, 0x1000), (7, 0, 1 << 31), (7, 1 << 32, 1 << 31), (1, 0xFE000000, 0x1000)]
    body = b"".join(
        struct.pack("<HHI16sIIQQ", 3, 48, 0, bytes(16), kind, 7, start, size) for kind, start, size in resources
    )
    body += struct.pack("<HHI16sQ", 4, 32, 0, bytes(range(16)), 0x1234)
    end = 56 + len(body)
    return struct.pack("<HHIIIQQQQQ", 1, 56, 0, 9, 0, 0, 0, 0, 0, end) + body + struct.pack("<HHI", 0xFFFF, 8, 0)


def tdvf_images() -> list[bytes]:
    """An image with a GUIDed table, TDX and SEV metadata; and one of td-shim's older form."""
    rows = [
        (0x800, 0x800, 0xFFFFF800 & ~0xFFF, 0x1000, 0, 1),
        (0, 0, 0x809000, 0x2000, 2, 0),
        (0, 0, 0x810000, 0x1000, 3, 0),
    ]
    tdvf = struct.pack("<4sIII", b"TDVF", 16 + 32 * len(rows), 1, len(rows))
    tdvf += b"".join(struct.pack("<IIQQII", *row) for row in rows)
    sev = struct.pack("<4sIII", b"ASEV", 28, 1, 1) + struct.pack("<III", 0x80D000, 0x1000, 2)
    image = bytearray(0x1000)
    image[0x100 : 0x100 + len(tdvf)], image[0x300 : 0x300 + len(sev)] = tdvf, sev
    entries = struct.pack("<IH", 0x1000 - 0x100, 22) + bytes.fromhex("35657ae44a989847865e4685a7bf8ec2")
    entries += struct.pack("<IH", 0x1000 - 0x300, 22) + bytes.fromhex("66656edcd42a3045b75ea1d40dd2b0d1"[:32])
    table = entries + struct.pack("<H", len(entries) + 18) + bytes.fromhex("de82b596b21ff745baeaa366c55a082d")
    image[-0x20 - len(table) : -0x20] = table
    shim = bytearray(0x1000)
    shim[0x100 : 0x100 + len(tdvf)] = tdvf
    struct.pack_into("<I", shim, 0x1000 - 0x20, 0x100)
    return [bytes(image), bytes(shim)]
