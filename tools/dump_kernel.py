"""What ``unaccepted dump kernel`` shows: a bzImage or a bare vmlinux, from its setup header to its configuration."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from functools import cached_property

from bootstub.bzimage import BzImage, setup_header_fields
from bootstub.kernel_config import Support
from bootstub.payload import detect
from bootstub.relocations import Relocations, read_relocations
from bootstub.setup_header import (
    SETUP_HEADER,
    SETUP_HEADER_OFFSET,
    SINCE,
    LoadFlags,
    XLoadFlags,
    flag_names,
    version_text,
)
from bootstub.vmlinux import Vmlinux, kernel_total_size, load_segments
from guest.errors import FormatError
from guest.records import field_extents
from guest.units import PAGE_SIZE, SZ_64K, round_up, size_text
from tools.dump_kernel_pe import pe_json, pe_text, read_pe_header
from tools.kernel_image import KernelImage
from tools.output import hex_dump

_BANNER = re.compile(rb"Linux version [\x20-\x7e]{1,500}")
_KERNEL_INFO, _KERNEL_INFO_MAGIC = struct.Struct("<4sIII"), b"LToP"
_EHDR_SIZE = 64
_PHDR = struct.Struct("<IIQQQQQQ")
_E_PHOFF, _E_PHNUM = 32, 56
_P_TYPES = {0: "NULL", 1: "LOAD", 2: "DYNAMIC", 3: "INTERP", 4: "NOTE", 6: "PHDR", 7: "TLS"}
OPTIONS = (
    "UNACCEPTED_MEMORY", "INTEL_TDX_GUEST", "AMD_MEM_ENCRYPT", "EFI_STUB", "EFI_HANDOVER_PROTOCOL", "EFI_MIXED",
    "RELOCATABLE", "RANDOMIZE_BASE", "RANDOMIZE_MEMORY", "X86_NEED_RELOCS", "PHYSICAL_START", "PHYSICAL_ALIGN",
    "X86_5LEVEL", "X86_VERBOSE_BOOTUP", "DEFERRED_STRUCT_PAGE_INIT", "NUMA", "MEMORY_HOTREMOVE", "EFI_SOFT_RESERVE",
    "KEXEC_CORE", "KERNEL_GZIP", "KERNEL_BZIP2", "KERNEL_LZMA", "KERNEL_XZ", "KERNEL_LZO", "KERNEL_LZ4", "KERNEL_ZSTD",
)  # fmt: skip
"""The options of a configuration that decide how the boot treats memory."""

Json = dict[str, object]


class Dump:
    """Everything that a kernel file says. What cannot be right is a ``FormatError`` when it is asked for."""

    def __init__(self, image: KernelImage) -> None:
        self.image, self.data, self.bzimage = image, image.file, image.bzimage
        self.header = setup_header_fields(self.data) if self.bzimage is not None else {}
        self.vmlinux = image.vmlinux
        self.elf = load_segments(self.vmlinux) if self.vmlinux is not None else None
        self.relocations = self._relocations()
        self.pe = read_pe_header(self.data)

    @property
    def banner(self) -> str | None:
        """What the kernel will print first."""
        found = _BANNER.search(self.vmlinux or b"")
        return found[0].decode("ascii").rstrip() if found else None

    @property
    def setup_type_max(self) -> int | None:
        """``kernel_info.setup_type_max``: the highest type of setup_data that the kernel knows."""
        if self.bzimage is None or not self.header["kernel_info_offset"]:
            return None
        at = self.bzimage.protected_mode_offset + self.header["kernel_info_offset"]
        raw = self.data[at : at + _KERNEL_INFO.size]
        if len(raw) < _KERNEL_INFO.size or not raw.startswith(_KERNEL_INFO_MAGIC):
            source = "Documentation/arch/x86/boot.rst, The kernel_info"
            raise FormatError("kernel_info", at=at, found=raw[:4], expected=_KERNEL_INFO_MAGIC, source=source)
        return int(_KERNEL_INFO.unpack(raw)[3])

    @cached_property
    def total_size(self) -> int:
        """Bytes of memory from the kernel's ``_text`` to its ``_end``."""
        assert self.vmlinux is not None and self.elf is not None
        return kernel_total_size(self.vmlinux, self.elf)

    def extract_offset(self) -> int:
        """Bytes that the payload must stay ahead of what it is unpacked to (arch/x86/boot/header.S)."""
        assert self.vmlinux is not None and self.bzimage is not None
        output = len(self.vmlinux)
        return round_up(max(output - self.bzimage.payload_length, 0) + (output >> 8) + 2 * SZ_64K, PAGE_SIZE)

    def _relocations(self) -> Relocations | None:
        if self.vmlinux is None or self.elf is None or len(self.vmlinux) <= self.elf.elf_end:
            return None
        return read_relocations(self.vmlinux, self.elf)


def text(dump: Dump) -> Iterator[str]:
    """The kernel, line by line; numbers in front are offsets in the file."""
    kind = "bare vmlinux" if dump.bzimage is None else f"bzImage, boot protocol {version_text(dump.bzimage.version)}"
    yield f"{kind}, {len(dump.data)} bytes"
    yield from (f"version {line}" for line in (dump.banner,) if line)
    if dump.bzimage is not None:
        yield from _header_text(dump)
        yield from pe_text(dump.pe)
        yield from _payload_text(dump)
    if dump.elf is not None:
        yield from _elf_text(dump, dump.elf)
    yield from _config_text(dump)


def to_json(dump: Dump) -> Json:
    """The kernel for programs."""
    out: Json = {"size": len(dump.data), "bzimage": None, "pe": pe_json(dump.pe), "version": dump.banner}
    if dump.bzimage is not None:
        out["bzimage"] = {
            "protocol": version_text(dump.bzimage.version),
            "kernel_version": dump.bzimage.kernel_version,
            "setup_header": dump.header,
            "missing": sorted(dump.bzimage.missing),
            "setup_type_max": dump.setup_type_max,
        }
        out["payload"] = _payload_json(dump)
    if dump.elf is not None:
        out["elf"] = {"e_entry": dump.elf.entry, "size": dump.elf.elf_end, "total_size": dump.total_size} | {
            "program_headers": list(_program_headers(dump.vmlinux or b""))
        }
    found = dump.relocations
    out["relocations"] = found and {name: len(getattr(found, name)) for name in Relocations.__slots__}
    config = dump.image.config
    out["config"] = config and {name: config.get(name, "n") for name in OPTIONS}
    support = dump.image.support
    return out | {"unaccepted_memory": {"known": support.known, "reason": support.reason}}


def hex_lines(dump: Dump) -> Iterator[str]:
    """The bytes of PE header and setup header, or of the ELF and program headers, by their offsets in the file."""
    if dump.bzimage is None:
        phoff, phnum = _program_headers_at(dump.data)
        yield from hex_dump(dump.data[:_EHDR_SIZE])
        yield from hex_dump(dump.data[phoff : phoff + _PHDR.size * phnum], phoff)
        return
    places = [(SETUP_HEADER_OFFSET, SETUP_HEADER_OFFSET + SETUP_HEADER.sizeof())]
    if dump.pe is not None:
        places.append((dump.pe.offset, dump.pe.end))
    for start, end in sorted(places):
        yield from hex_dump(dump.data[start:end], start)


def _header_text(dump: Dump) -> Iterator[str]:
    assert dump.bzimage is not None
    yield f"{SETUP_HEADER_OFFSET:#x} setup_header"
    for name, (offset, size) in field_extents(SETUP_HEADER).items():
        at, value = SETUP_HEADER_OFFSET + offset, dump.header[name]
        meaning = _MEANINGS[name](dump.bzimage, value) if name in _MEANINGS else ""
        if name in dump.bzimage.missing:
            shown = f"not before {version_text(SINCE[name])}; {_default(dump, name)}"
        else:
            shown = f"{value:#0{2 * size + 2}x}  {meaning}"
        yield f"  {at:#05x} {name:<24}{shown}".rstrip()
    if dump.setup_type_max is not None:
        yield f"kernel_info: setup_type_max {dump.setup_type_max:#x}"


def _default(dump: Dump, name: str) -> str:
    value = getattr(dump.bzimage, {"syssize": "protected_mode_size"}.get(name, name), 0)
    if name in ("payload_offset", "payload_length") or not value:
        return "none"
    return f"{int(value):#x}"


_MEANINGS: dict[str, Callable[[BzImage, int], str]] = {
    "setup_sects": lambda image, value: f"{image.setup_sects} sectors",
    "syssize": lambda image, value: f"{image.protected_mode_size} bytes of code",
    "header": lambda image, value: repr(value.to_bytes(4, "little").decode("latin-1")),
    "version": lambda image, value: version_text(value),
    "kernel_version": lambda image, value: image.kernel_version or "",
    "loadflags": lambda image, value: flag_names(LoadFlags, value),
    "xloadflags": lambda image, value: flag_names(XLoadFlags, value),
    "kernel_alignment": lambda image, value: size_text(value),
    "min_alignment": lambda image, value: size_text(1 << value) if 0 < value < 64 else "",
    "cmdline_size": lambda image, value: str(value),
    "payload_offset": lambda image, value: f"{image.payload_offset:#x} in the file",
    "payload_length": lambda image, value: size_text(value),
    "init_size": lambda image, value: size_text(value),
}
"""What fields of the setup header say, in words, where a number does not."""


def _payload_json(dump: Dump) -> Json | None:
    if dump.vmlinux is None or dump.bzimage is None:
        return None
    image = dump.bzimage
    out: Json = {"offset": image.payload_offset, "length": image.payload_length, "output_len": len(dump.vmlinux)}
    out["compression"] = str(detect(image.payload(dump.data)))
    return out | {"extract_offset": dump.extract_offset(), "total_size": dump.total_size}


def _payload_text(dump: Dump) -> Iterator[str]:
    payload = _payload_json(dump)
    if payload is None or dump.bzimage is None:
        yield "no payload_offset: where the kernel is, this header does not say"
        return
    yield (
        f"{payload['offset']:#x} payload, {payload['length']} bytes of {payload['compression']}, "
        f"{payload['output_len']} bytes unpacked"
    )
    if "init_size" in dump.bzimage.missing:
        return
    init_size, total, offset = dump.bzimage.init_size, dump.total_size, dump.extract_offset()
    in_place = offset + dump.bzimage.protected_mode_size
    if init_size < max(total, in_place):
        yield f"init_size {init_size:#x} is too small: {total:#x} for the kernel, {in_place:#x} to unpack it in place"
        return
    yield f"init_size {init_size:#x} is the larger of"
    yield f"  {total:#x}: the kernel in the end, _end - _text" + (" <-" if total == init_size else "")
    if total == init_size:
        yield f"  {offset:#x} to unpack in place, and the decompressor's own memory"
    else:
        yield f"  {init_size:#x}: {offset:#x} to unpack in place, and {init_size - offset:#x} of the decompressor <-"


def _elf_text(dump: Dump, elf: Vmlinux) -> Iterator[str]:
    yield f"vmlinux: e_entry {elf.entry:#x}, {elf.elf_end} bytes of ELF file, _end - _text {dump.total_size:#x}"
    yield f"  {'type':<9}{'p_offset':>11} {'p_vaddr':>18} {'p_paddr':>11} {'p_filesz':>11} {'p_memsz':>11} flags"
    for row in _program_headers(dump.vmlinux or b""):
        flags = "".join(name if row["p_flags"] & bit else "-" for bit, name in ((4, "r"), (2, "w"), (1, "x")))
        name = _P_TYPES.get(row["p_type"], f"{row['p_type']:#x}")
        sizes = " ".join(f"{row[field]:>#11x}" for field in ("p_paddr", "p_filesz", "p_memsz"))
        yield f"  {name:<9}{row['p_offset']:>#11x} {row['p_vaddr']:>#18x} {sizes} {flags}"
    found = dump.relocations
    if found is None:
        yield "no relocation table: it cannot be mapped elsewhere"
        return
    yield (
        f"relocations: {len(found.words64)} of 64 bits, {len(found.inverse32)} inverse of 32 bits, "
        f"{len(found.words32)} of 32 bits"
    )


def _config_text(dump: Dump) -> Iterator[str]:
    config = dump.image.config
    if config is None:
        yield "no configuration inside (IKCONFIG); --config FILE names one"
    else:
        where = "inside (IKCONFIG)" if dump.image.given_config is None else "of the file beside it"
        yield f"configuration {where}, {len(config)} options"
        for name in OPTIONS:
            if not (name.startswith("KERNEL_") and config.get(name) != "y"):
                value = config.get(name, "n")
                yield f"  CONFIG_{name}{' is not set' if value == 'n' else f'={value[:60]}'}"
    yield _support_text(dump.image.support)


def _support_text(support: Support) -> str:
    knows = {
        True: "knows unaccepted memory",
        False: "does not know unaccepted memory",
        None: "may know unaccepted memory",
    }
    return f"{knows[support.known]}: {support.reason}"


def _program_headers_at(vmlinux: bytes) -> tuple[int, int]:
    """``e_phoff`` and ``e_phnum``."""
    phoff = int.from_bytes(vmlinux[_E_PHOFF : _E_PHOFF + 8], "little")
    return phoff, int.from_bytes(vmlinux[_E_PHNUM : _E_PHNUM + 2], "little")


def _program_headers(vmlinux: bytes) -> Iterator[dict[str, int]]:
    """Every program header of a file that ``load_segments()`` has checked."""
    names = ("p_type", "p_flags", "p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_align")
    phoff, phnum = _program_headers_at(vmlinux)
    for number in range(phnum):
        yield dict(zip(names, _PHDR.unpack_from(vmlinux, phoff + number * _PHDR.size), strict=True))
