"""Answering ``decompress_kernel()`` from outside: the slow part of a boot that holds no surprise.

The function is found in the image itself. It is the only code that takes the address of the compressed payload,
relative to RIP, and it begins at the last call target before that instruction.
Source: arch/x86/boot/compressed/misc.c, decompress_kernel().
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache

from bootstub.bzimage import parse_bzimage
from bootstub.kernel_layout import LOAD_PHYSICAL_ADDR
from bootstub.payload import decompress
from bootstub.relocations import load_kernel
from bootstub.vmlinux import load_segments
from guest.memory import GuestMemory

_LEA_RIP_RELATIVE = re.compile(rb"[\x48\x4c]\x8d[\x05\x0d\x15\x1d\x25\x2d\x35\x3d]")
_LEA_SIZE, _CALL_SIZE = 7, 5
_HEAD = range(16)
"""A decompressor that was inlined may start behind the magic of its own format."""


@lru_cache(maxsize=4)
def find_payload_users(bzimage: bytes) -> tuple[int, ...]:
    """Offsets in the image of the functions that use the payload, ascending; in a PE image they are RVAs too.

    The first is ``decompress_kernel()``; a second one is ``extract_kernel()`` where the compiler put the first
    into it.
    """
    header = parse_bzimage(bzimage)
    code = [(header.protected_mode_offset, header.payload_offset)]
    code.append((header.payload_offset + header.payload_length, len(bzimage)))
    uses = [
        match.start()
        for start, end in code
        for match in _LEA_RIP_RELATIVE.finditer(bzimage, start, end - _LEA_SIZE)
        if match.start() + _LEA_SIZE + _displacement(bzimage, match.start() + 3) - header.payload_offset in _HEAD
    ]
    targets = {
        match.start() + _CALL_SIZE + _displacement(bzimage, match.start() + 1)
        for start, end in code
        for match in re.finditer(rb"\xe8", bzimage[: end - _CALL_SIZE])
        if match.start() >= start
    }
    functions = {max((target for target in targets if target <= use), default=use) for use in uses}
    return tuple(sorted(functions))


def unpack_kernel(memory: GuestMemory, bzimage: bytes, output: int, virtual: int) -> int:
    """Do the function's work: unpack at ``output``, place the segments, move them to ``virtual``; the entry's offset.

    ``virtual`` is counted from the start of the kernel's mapping, as the function's own argument is.
    """
    vmlinux = decompress(parse_bzimage(bzimage).payload(bzimage))
    kernel = load_segments(vmlinux)
    load_kernel(memory, vmlinux, kernel, output, virtual)
    return kernel.entry - LOAD_PHYSICAL_ADDR


@lru_cache(maxsize=1)
def entry_offset(bzimage: bytes) -> int:
    """What the function returns: the distance of the kernel's entry point from where the kernel is."""
    return load_segments(decompress(parse_bzimage(bzimage).payload(bzimage))).entry - LOAD_PHYSICAL_ADDR


def _displacement(data: bytes, at: int) -> int:
    displacement: int = struct.unpack_from("<i", data, at)[0]
    return displacement
