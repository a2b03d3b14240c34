"""What ``unaccepted dump kernel`` shows: a bzImage or a bare vmlinux, from its setup header to its configuration."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from bootstub.bzimage import setup_header_fields
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
from bootstub.vmlinux import Segment, Vmlinux, kernel_total_size, load_segments
from firmware.pe import parse_pe
from guest.errors import FormatError
from guest.records import field_extents
from guest.units import PAGE_SIZE, SZ_64K, round_up, size_text
from tools.kernel_image import KernelImage
from tools.render import hex_dump

_BANNER = re.compile(rb"Linux version [\x20-\x7e]{1,500}")
_KERNEL_INFO, _KERNEL_INFO_MAGIC = struct.Struct("<4sIII"), b"LToP"
_EHDR_SIZE = 64
_PE_OFFSET_AT, _COFF, _SECTION = 0x3C, struct.Struct("<4sHH12xHH"), struct.Struct("<8sIIII12xI")
_EFI_APPLICATION = 10
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
        self.pe = _pe(self.data) if self.bzimage is not None and self.data.startswith(b"MZ") else None

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

    def total_size(self) -> int:
        """Bytes of memory from the kernel's ``_text`` to its ``_end``."""
        assert self.vmlinux is not None and self.elf is not None
        return kernel_total_size(self.vmlinux, self.elf)

    def extract_offset(self) -> int:
        """Bytes that the payload must stay ahead of what it is unpacked to (arch/x86/boot/header.S)."""
        assert self.vmlinux is not None and self.bzimage is not None
        output = len(self.vmlinux)
        return round_up(max(output + (output >> 8) + 2 * SZ_64K - self.bzimage.payload_length, 0), PAGE_SIZE)

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
        yield from _pe_text(dump.pe)
        yield from _payload_text(dump)
    if dump.elf is not None:
        yield from _elf_text(dump, dump.elf)
    yield from _config_text(dump)


def to_json(dump: Dump) -> Json:
    """The kernel for programs."""
    out: Json = {"size": len(dump.data), "bzimage": None, "pe": dump.pe, "version": dump.banner}
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
        out["elf"] = {"e_entry": dump.elf.entry, "size": dump.elf.elf_end, "total_size": dump.total_size()} | {
            "segments": [_segment_json(segment) for segment in dump.elf.segments]
        }
    found = dump.relocations
    out["relocations"] = found and {name: len(getattr(found, name)) for name in Relocations.__slots__}
    config = dump.image.config
    out["config"] = config and {name: config.get(name, "n") for name in OPTIONS}
    support = dump.image.support
    return out | {"unaccepted_memory": {"known": support.known, "reason": support.reason}}


def hex_lines(dump: Dump) -> Iterator[str]:
    """The bytes of the setup header and the PE header, or of the ELF and program headers, by their offsets."""
    if dump.bzimage is None:
        assert dump.elf is not None
        phoff = int.from_bytes(dump.data[32:40], "little")
        phnum = int.from_bytes(dump.data[56:58], "little")
        yield from hex_dump(dump.data[:_EHDR_SIZE])
        yield from hex_dump(dump.data[phoff : phoff + 56 * phnum], phoff)
        return
    if dump.pe is not None:
        at = int.from_bytes(dump.data[_PE_OFFSET_AT : _PE_OFFSET_AT + 4], "little")
        size = _COFF.size + _COFF.unpack_from(dump.data, at)[3] + 40 * len(dump.pe["sections"])  # type: ignore[arg-type]
        if at < SETUP_HEADER_OFFSET:
            yield from hex_dump(dump.data[at : min(at + size, SETUP_HEADER_OFFSET)], at)
    end = SETUP_HEADER_OFFSET + SETUP_HEADER.sizeof()
    yield from hex_dump(dump.data[SETUP_HEADER_OFFSET:end], SETUP_HEADER_OFFSET)


def _header_text(dump: Dump) -> Iterator[str]:
    assert dump.bzimage is not None
    yield f"{SETUP_HEADER_OFFSET:#x} setup_header"
    for name, (offset, size) in field_extents(SETUP_HEADER).items():
        at, value = SETUP_HEADER_OFFSET + offset, dump.header[name]
        if name in dump.bzimage.missing:
            shown = f"not before {version_text(SINCE[name])}; {_default(dump, name)}"
        else:
            shown = f"{value:#0{2 * size + 2}x}  {_meaning(dump, name, value)}"
        yield f"  {at:#05x} {name:<24}{shown}".rstrip()


def _default(dump: Dump, name: str) -> str:
    value = getattr(dump.bzimage, {"syssize": "protected_mode_size"}.get(name, name), 0)
    if name in ("payload_offset", "payload_length") or not value:
        return "none"
    return f"{int(value):#x}"


def _meaning(dump: Dump, name: str, value: int) -> str:
    """What a field of the setup header says, in words, where a number does not."""
    assert dump.bzimage is not None
    match name:
        case "setup_sects":
            return f"{dump.bzimage.setup_sects} sectors"
        case "syssize":
            return f"{dump.bzimage.protected_mode_size} bytes of code"
        case "header":
            return repr(value.to_bytes(4, "little").decode("latin-1"))
        case "version":
            return version_text(value)
        case "kernel_version":
            return dump.bzimage.kernel_version or ""
        case "loadflags":
            return flag_names(LoadFlags, value)
        case "xloadflags":
            return flag_names(XLoadFlags, value)
        case "kernel_alignment" | "init_size" | "payload_length":
            return size_text(value)
        case "min_alignment":
            return size_text(1 << value) if 0 < value < 64 else ""
        case "payload_offset":
            return f"{dump.bzimage.payload_offset:#x} in the file"
        case "kernel_info_offset" if value:
            return f"setup_type_max {dump.setup_type_max:#x}"
        case "cmdline_size":
            return str(value)
    return ""


def _pe(data: bytes) -> Json:
    """The essentials of a PE32+ header, which ``parse_pe()`` has checked."""
    image = parse_pe(data)
    at = int.from_bytes(data[_PE_OFFSET_AT : _PE_OFFSET_AT + 4], "little")
    _, machine, count, optional_size, characteristics = _COFF.unpack_from(data, at)
    optional = at + _COFF.size
    subsystem, dll = struct.unpack_from("<HH", data, optional + 68)
    sections = [_SECTION.unpack_from(data, optional + optional_size + number * 40) for number in range(count)]
    return {
        "machine": machine,
        "characteristics": characteristics,
        "entry_point": image.entry_point,
        "image_base": image.image_base,
        "size_of_image": image.size_of_image,
        "section_alignment": int.from_bytes(data[optional + 32 : optional + 36], "little"),
        "subsystem": subsystem,
        "dll_characteristics": dll,
        "sections": [
            {"name": _name(name), "address": address, "size": size, "offset": offset, "raw_size": raw, "flags": flags}
            for name, size, address, raw, offset, flags in sections
        ],
    }


def _name(raw: bytes) -> str:
    return "".join(chr(byte) if 0x20 < byte < 0x7F else "?" for byte in raw.rstrip(b"\0"))


def _pe_text(pe: Json | None) -> Iterator[str]:
    if pe is None:
        yield "no PE header: no EFI stub"
        return
    what = "EFI application" if pe["subsystem"] == _EFI_APPLICATION else f"subsystem {pe['subsystem']}"
    yield (
        f"PE32+ {what}, machine {pe['machine']:#x}, entry {pe['entry_point']:#x}, ImageBase {pe['image_base']:#x}, "
        f"SizeOfImage {pe['size_of_image']:#x}, DllCharacteristics {pe['dll_characteristics']:#x}"
    )
    yield f"  {'section':<9}{'address':>11} {'size':>11} {'offset':>11} {'raw size':>11}  flags"
    sections = pe["sections"]
    assert isinstance(sections, list)
    for part in sections:
        yield (
            f"  {part['name']:<9}{part['address']:>#11x} {part['size']:>#11x} {part['offset']:>#11x} "
            f"{part['raw_size']:>#11x}  {part['flags']:#010x}"
        )


def _payload_json(dump: Dump) -> Json | None:
    if dump.vmlinux is None or dump.bzimage is None:
        return None
    image = dump.bzimage
    out: Json = {"offset": image.payload_offset, "length": image.payload_length, "output_len": len(dump.vmlinux)}
    out["compression"] = str(detect(image.payload(dump.data)))
    return out | {"extract_offset": dump.extract_offset(), "total_size": dump.total_size()}


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
    init_size, total, offset = dump.bzimage.init_size, dump.total_size(), dump.extract_offset()
    yield f"init_size {init_size:#x} is the larger of"
    yield f"  {total:#x}: the kernel in the end, _end - _text" + (" <-" if total == init_size else "")
    if total == init_size:
        yield f"  {offset:#x} to unpack in place, and the decompressor's own memory"
    else:
        yield f"  {init_size:#x}: {offset:#x} to unpack in place, and {init_size - offset:#x} of the decompressor <-"


def _elf_text(dump: Dump, elf: Vmlinux) -> Iterator[str]:
    yield f"vmlinux: e_entry {elf.entry:#x}, {elf.elf_end} bytes of ELF file, _end - _text {dump.total_size():#x}"
    yield f"  {'PT_LOAD':<7}{'p_offset':>11} {'p_vaddr':>18} {'p_paddr':>11} {'p_filesz':>11} {'p_memsz':>11} flags"
    for part in elf.segments:
        flags = "".join(name if part.p_flags & bit else "-" for bit, name in ((4, "r"), (2, "w"), (1, "x")))
        yield (
            f"  {'':<7}{part.p_offset:>#11x} {part.p_vaddr:>#18x} {part.p_paddr:>#11x} {part.p_filesz:>#11x} "
            f"{part.p_memsz:>#11x} {flags}"
        )
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
    knows = {True: "knows unaccepted memory", False: "does not know unaccepted memory", None: "may know unaccepted memory"}
    return f"{knows[support.known]}: {support.reason}"


def _segment_json(segment: Segment) -> Json:
    return {name: getattr(segment, name) for name in Segment.__slots__}
