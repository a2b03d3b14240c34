"""A kernel's segments and relocation lists by another reading than ours: word by word, from the end, as in C."""

from __future__ import annotations

import io
from pathlib import Path

from elftools.elf.elffile import ELFFile

from bootstub.bzimage import parse_bzimage
from bootstub.payload import decompress

BASE = 0x100_0000


def moved_segments(kernel: Path, distance: int) -> dict[int, bytes]:
    """The kernel's segments by their offset in memory, moved up by ``distance`` in virtual memory."""
    bzimage = kernel.read_bytes()
    vmlinux = decompress(parse_bzimage(bzimage).payload(bzimage))
    segments = list(ELFFile(io.BytesIO(vmlinux)).iter_segments("PT_LOAD"))
    image = bytearray(max(segment["p_paddr"] + segment["p_filesz"] for segment in segments) - BASE)
    ends = {segment["p_paddr"] - BASE: segment["p_paddr"] - BASE + segment["p_filesz"] for segment in segments}
    for segment, (start, end) in zip(segments, ends.items(), strict=True):
        image[start:end] = segment.data()
    at = len(vmlinux)
    for size, sign in ((4, 1), (4, -1), (8, 1)):
        while word := int.from_bytes(vmlinux[(at := at - 4) : at + 4], "little", signed=True):
            place = word + 0x8000_0000 - BASE
            value = int.from_bytes(image[place : place + size], "little") + sign * distance
            image[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return {start: bytes(image[start:end]) for start, end in ends.items()}
