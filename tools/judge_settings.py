"""Random settings of a firmware around a stub: command lines, initrds, variables, seeds. See ``tools.judge_maps``."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

from firmware.char16 import char16_bytes
from firmware.device_path import END_NODE, file_path
from firmware.efi_types import EFI_GLOBAL_VARIABLE_GUID
from firmware.variables import KNOWN
from guest.units import PAGE_SIZE, SZ_1M

Profile = Callable[[random.Random, dict[str, Any]], None]
_COMMAND_LINE_SIZE = 2048
_WORDS = (
    "nokaslr", "nokaslr=0", "xnokaslr", "nokaslrx", '"nokaslr"', "quiet", "quiet=1", "noinitrd", "noinitrd=no", "debug",
    "efi=debug", "efi=nosoftreserve", "efi=nochunk,nosoftreserve", "efi=nosoftreservex,debug", "efi=", "efi",
    "efi=disable_early_pci_dma", "efi=no_disable_early_pci_dma", "efi=novamap,disable_early_pci_dma", "no5lvl",
    "mem_encrypt=on", "mem_encrypt=off", "mem_encrypt=on,off", "mem_encrypt", "video=efifb:auto", "mem=8G", "xmem=8G",
    'x="a mem=1G"', "memmap=1M$16M", "memmap", "hugepages=4", "hugepagesz=1G", "--", 'a="b', '"', "=", "root=/dev/vda1",
    "efi =debug", 'efi="nosoftreserve"', '"efi=nosoftreserve"', 'e"f"i=debug', "initrd_=x",
)  # fmt: skip
_BLANKS = (" ", " ", " ", "  ", "\t", "\v", "\f", "\r", "\xa0")
_PIECES = ("a", "b=c", "\xe9", "\u20ac", "\U0001f600", "\ud83d", "\ude00", " ", '"', "\x7f", "\x80", "\u0800", "\uffff")
_INITRDS = (
    "", "", " noinitrd", " initrd=initrd", " initrd=\\initrd.img initrd=b", " xinitrd=a", " quiet initrd=/x",
    " initrd=",
)  # fmt: skip
_FILE_NAMES = (
    "initrd", "initrd", "a", "a", "/a", "\\\\a", "dir/b.img", "dir\\b.img", "none", "", "n" * 255, "n" * 256, '"a"',
)  # fmt: skip
_SP = 0x40000


def _words(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(_WORDS) + rng.choice(_BLANKS) for _ in range(count))


def _cmdline(rng: random.Random, case: dict[str, Any]) -> None:
    """Options in any order, some of them in disguise; memory for a special purpose, which some of them are about."""
    case["cmdline"] = rng.choice(("", " ", "\t")) + _words(rng, rng.randrange(1, 7))
    case["tsc0"] = rng.getrandbits(60)
    for row in case["descs"]:
        if row[0] in (2, 4, 7) and row[1] and rng.random() < 0.2 and row is not case["descs"][-1]:
            row[3] |= _SP if row[2] < 1000 else 0


def _longline(rng: random.Random, case: dict[str, Any]) -> None:
    """Lines around the limit of 2048 bytes, of characters of one to four bytes and halves of pairs."""
    text, goal = _words(rng, rng.randrange(3)), _COMMAND_LINE_SIZE + rng.choice((-40, -4, -3, -2, -1, 0, 1, 2, 9, 3000))
    while len(text.encode(errors="surrogatepass")) < goal:
        text += rng.choice(_PIECES) if rng.random() < 0.3 else rng.choice(("a", "bc ", "\u20ac"))
    options = text.encode("utf-16-le", errors="surrogatepass")
    case["load_options"] = (options + rng.choice((b"", b"\0\0", b"\0\0x\0", b"\n\0x\0"))).hex()


def _loadopts(rng: random.Random, case: dict[str, Any]) -> None:
    """Load options that are no plain line: odd sizes, halves of pairs, and a whole EFI_LOAD_OPTION."""
    text = _words(rng, rng.randrange(4)) + "".join(rng.choice(_PIECES) for _ in range(rng.randrange(6)))
    line = text.encode("utf-16-le", errors="surrogatepass")
    options = rng.choice((line, line[:-1], line + b"\0", line + b"\0\0", b"", b"\0", b"x", b"\0\0", rng.randbytes(20)))
    if rng.random() < 0.5:
        options = _load_option(rng, options)
    case["load_options"] = options.hex()


def _load_option(rng: random.Random, optional_data: bytes) -> bytes:
    """An EFI_LOAD_OPTION (UEFI 2.10, section 3.1.3), sound or not quite."""
    path = file_path("vmlinuz") * rng.randrange(3) + rng.choice((END_NODE, END_NODE, END_NODE, b"", END_NODE * 2))
    attributes = rng.choice((1, 1, 1, 0, 9, 0x101, 0x1F01, 0x2001, 0x8000_0001))
    length = len(path) + rng.choice((0, 0, 0, 0, 2))
    return struct.pack("<IH", attributes, length) + char16_bytes("Linux") + path + optional_data


def _initrd(rng: random.Random, case: dict[str, Any]) -> None:
    """An initrd by LoadFile2, by ``initrd=`` from a device that has no files, both or none."""
    case["cmdline"] = rng.choice(("nokaslr", "", "quiet")) + rng.choice(_INITRDS)
    if rng.random() < 0.6:
        case["initrd"] = rng.choice((0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 100_000, 3_000_000))


def _files(rng: random.Random, case: dict[str, Any]) -> None:
    """Initrds in files of the kernel's device, which a command line names, rightly or not."""
    sizes = (0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 100_000, SZ_1M, 3_000_000)
    case["files"] = {name: rng.choice(sizes) for name in ("initrd", "a", "dir\\b.img", "n" * 255)}
    text = rng.choice(("nokaslr", "quiet", "efi=nochunk", "efi=nochunk efi="))
    for _ in range(rng.randrange(4)):
        text += rng.choice((" ", " ", "  ", "\t", " x")) + f"initrd={rng.choice(_FILE_NAMES)}"
    case["cmdline"] = text + rng.choice(("", " ", " nokaslr", "\nnokaslr", " noinitrd"))
    if rng.random() < 0.2:
        case["initrd"] = PAGE_SIZE


def _variables(rng: random.Random, case: dict[str, Any]) -> None:
    """Variables that the stub asks for, with values and attributes that are and are not to be."""
    case["cmdline"] = rng.choice(("nokaslr", "", "quiet"))
    chosen = []
    for name in ("SecureBoot", "SetupMode", "MokSBStateRT", "MemoryOverwriteRequestControl", "AuditMode"):
        vendor, attributes = KNOWN.get(name, (EFI_GLOBAL_VARIABLE_GUID, 6))
        if rng.random() < 0.7:
            data = rng.choice((b"\1", b"\1", b"\1", b"\0", b"\0", b"\2", b"\1\0"))
            chosen.append([name, str(vendor), rng.choice((int(attributes), int(attributes), 7, 6)), data.hex()])
    case["variables"] = chosen


def _seeds(rng: random.Random, case: dict[str, Any]) -> None:
    """Sources of the kernel's first randomness: the firmware's generator, a variable, and a table from before."""
    case["cmdline"] = rng.choice(("nokaslr", "", "quiet"))
    if rng.random() < 0.5:
        case["rng"] = rng.randbytes(48).hex()
    if rng.random() < 0.6:
        vendor, attributes = KNOWN["RandomSeed"]
        data = rng.randbytes(rng.choice((1, 8, 32, 512, 513, 2000)))
        case["variables"] = [["RandomSeed", str(vendor), int(attributes), data.hex()]]
    if rng.random() < 0.6:
        size = rng.choice((0, 1, 32, 64, 511, 512, 513))
        case["seed_table"] = (struct.pack("<I", size) + rng.randbytes(size)).hex()


def _offers(rng: random.Random, case: dict[str, Any]) -> None:
    """A firmware that asks whether memory may stay unaccepted; another with a protocol that nobody asks for."""
    case["offers"] = rng.choice((["sev-accept"], ["edkii-accept", "sev-accept"], ["edkii-accept"]))


PROFILES: dict[str, Profile] = {
    "cmdline": _cmdline, "longline": _longline, "loadopts": _loadopts, "initrd": _initrd, "files": _files,
    "variables": _variables, "seeds": _seeds, "offers": _offers,
}  # fmt: skip
"""What a profile changes in a set-up."""
