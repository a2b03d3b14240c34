"""What ``unaccepted dump boot-params`` shows: a boot_params page as rows, text, JSON or dmesg lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from bootstub.boot_params import (
    BOOT_E820_ENTRY,
    BOOT_PARAMS,
    E820_MAX_ENTRIES_ZEROPAGE,
    EDD_INFO,
    EDD_MBR_SIG_MAX,
    EDDMAXNR,
    SECURE_BOOT_MODES,
    BootE820Entry,
    check_size,
    e820_table_of,
)
from bootstub.e820_types import type_word
from bootstub.setup_data import Reader, SetupData, SetupDataType, read_indirect, walk_setup_data
from bootstub.setup_header import LoadFlags, XLoadFlags, flag_names, loader_name, version_text
from guest.records import field_extents
from guest.units import size_text
from kernel.e820 import memory_setup

_INTEGER_SIZES = (1, 2, 4, 8)
_SHOWN_BYTES = 32
_AUTHOR_COLUMN = 90


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the dump.

    ``offset`` is bytes from the start of boot_params; for a node of the setup_data list, the node's guest
    physical address. ``value`` is the field as an unsigned integer, or its bytes where it is no integer.
    ``text`` says what the value means; it is empty where an integer speaks for itself.
    """

    offset: int
    size: int
    name: str
    value: int | bytes
    text: str

    @property
    def struct(self) -> str:
        """The member of boot_params that the field lies in: ``hdr``; empty for a field of boot_params itself."""
        head = self.name.partition("[")[0].partition(".")[0]
        return "" if head == self.name else head

    @property
    def hex(self) -> str:
        """The value in hexadecimal, as wide as the field."""
        return self.value.hex() if isinstance(self.value, bytes) else f"{self.value:#0{2 * self.size + 2}x}"


def rows(data: bytes, memory_reader: Reader | None = None) -> list[Row]:
    """Every field of the boot_params page ``data`` in order; of the arrays, the entries in use.

    With ``memory_reader`` for the guest's memory the setup_data list follows. Raises ``FormatError``.
    """
    out = list(_field_rows(data))
    if memory_reader:
        nodes = walk_setup_data(memory_reader, _integers(data)["hdr.setup_data"])
        out += [_node_row(memory_reader, number, node) for number, node in enumerate(nodes)]
    return out


def dmesg_lines(data: bytes) -> list[str]:
    """The memory map as the kernel prints it at boot, after it has sorted it: ``BIOS-e820: [mem …] usable``."""
    fields = _integers(data)
    who, table = memory_setup(e820_table_of(data), fields["alt_mem_k"], fields["screen_info.ext_mem_k"])
    return table.print_lines(who)


def text_lines(dump: Iterable[Row], author_of: Callable[[Row], str] | None = None) -> list[str]:
    """Rows as text: offset, name, value; members of a nested struct are indented below its name.

    With ``author_of``, who wrote the field follows.
    """
    out: list[str] = []
    struct = ""
    for row in dump:
        if row.struct and row.struct != struct:
            out.append(f"{row.offset:#05x} {row.struct}")
        struct = row.struct
        indent, name = ("  ", row.name[len(struct) :].lstrip(".")) if struct else ("", row.name)
        shown = row.text if isinstance(row.value, bytes) else f"{row.hex}  {row.text}".rstrip()
        line = f"{f'{indent}{row.offset:#05x} {name}':<34}{shown}"
        out.append(f"{line:<{_AUTHOR_COLUMN}}  {author_of(row) or 'not known'}" if author_of is not None else line)
    return out


def to_json(
    data: bytes, memory_reader: Reader | None = None, author_of: Callable[[Row], str] | None = None
) -> dict[str, object]:
    """The dump for programs: fields by name, the memory map as it lies there, and as the kernel will print it.

    With ``author_of``, each field has who wrote it as ``author``.
    Integers stand there twice, as a number and as ``hex``: many readers of JSON round above 2^53.
    """
    fields = {row.name: _json_row(row) for row in _field_rows(data)}
    if author_of is not None:
        for row in _field_rows(data):
            fields[row.name]["author"] = author_of(row)
    entries = [_json_entry(entry) for entry in e820_table_of(data)]
    out: dict[str, object] = {"fields": fields, "e820_table": entries, "dmesg": dmesg_lines(data)}
    if memory_reader:
        nodes = walk_setup_data(memory_reader, _integers(data)["hdr.setup_data"])
        out["setup_data"] = [_json_node(memory_reader, node) for node in nodes]
    return out


def _integers(data: bytes) -> dict[str, int]:
    """Every integer field by its dotted name."""
    check_size(data)
    return {
        name: int.from_bytes(data[offset : offset + size], "little")
        for name, (offset, size) in field_extents(BOOT_PARAMS).items()
        if size in _INTEGER_SIZES
    }


def _field_rows(data: bytes) -> Iterator[Row]:
    fields = _integers(data)
    for name, (offset, size) in field_extents(BOOT_PARAMS).items():
        if name in _ARRAYS:
            yield from _ARRAYS[name](data, fields, offset)
        elif name in fields:
            decode = _DECODERS.get(name)
            yield Row(offset, size, name, fields[name], decode(fields) if decode else "")
        else:
            yield _bytes_row(data, offset, size, name)


def _bytes_row(data: bytes, offset: int, size: int, name: str) -> Row:
    value = data[offset : offset + size]
    if not any(value):
        text = f"{size} zero bytes"
    elif size <= _SHOWN_BYTES:
        text = value.hex()
    else:
        text = f"{value[:_SHOWN_BYTES].hex()}... ({size} bytes)"
    return Row(offset, size, name, value, text)


def _unused(data: bytes, name: str, start: int, first: int, count: int, size: int) -> Iterator[Row]:
    """One row for the entries from number ``first`` on, if there are any; an array has ``count`` entries."""
    if first < count:
        at = start + first * size
        yield _bytes_row(data, at, (count - first) * size, f"{name}[{first}..{count - 1}]")


def _e820_rows(data: bytes, fields: Mapping[str, int], start: int) -> Iterator[Row]:
    size = BOOT_E820_ENTRY.sizeof()
    table = e820_table_of(data)
    for number, entry in enumerate(table):
        at = start + number * size
        yield Row(at, size, f"e820_table[{number}]", data[at : at + size], _entry_text(entry))
    yield from _unused(data, "e820_table", start, len(table), E820_MAX_ENTRIES_ZEROPAGE, size)


def _entry_text(entry: BootE820Entry) -> str:
    end = f"-{entry.addr + entry.size - 1:#018x}" if entry.size else ", empty"
    return f"[mem {entry.addr:#018x}{end}] {type_word(entry.type)}"


def _signature_rows(data: bytes, fields: Mapping[str, int], start: int) -> Iterator[Row]:
    used = min(fields["edd_mbr_sig_buf_entries"], EDD_MBR_SIG_MAX)
    for number in range(used):
        at = start + number * 4
        value = int.from_bytes(data[at : at + 4], "little")
        yield Row(at, 4, f"edd_mbr_sig_buffer[{number}]", value, "")
    yield from _unused(data, "edd_mbr_sig_buffer", start, used, EDD_MBR_SIG_MAX, 4)


def _edd_rows(data: bytes, fields: Mapping[str, int], start: int) -> Iterator[Row]:
    used = min(fields["eddbuf_entries"], EDDMAXNR)
    for number in range(used):
        base = start + number * EDD_INFO.sizeof()
        for name, (offset, size) in field_extents(EDD_INFO).items():
            yield _edd_field_row(data, base + offset, size, f"eddbuf[{number}].{name}")
    yield from _unused(data, "eddbuf", start, used, EDDMAXNR, EDD_INFO.sizeof())


def _edd_field_row(data: bytes, at: int, size: int, name: str) -> Row:
    if size in _INTEGER_SIZES:
        return Row(at, size, name, int.from_bytes(data[at : at + size], "little"), "")
    return _bytes_row(data, at, size, name)


_ARRAYS: dict[str, Callable[[bytes, Mapping[str, int], int], Iterator[Row]]] = {
    "edd_mbr_sig_buffer": _signature_rows,
    "e820_table": _e820_rows,
    "eddbuf": _edd_rows,
}


def _signature(value: int) -> str:
    """Four characters, if that is what the integer is."""
    text = value.to_bytes(4, "little")
    return repr(text.decode("ascii")) if text.isalnum() else "no signature"


def _descriptors(fields: Mapping[str, int]) -> str:
    size = fields["efi_info.efi_memdesc_size"]
    if not size:
        return "no memory map"
    return f"{fields['efi_info.efi_memmap_size'] // size} descriptors of {size} bytes"


def _with_high_half(low: str, high: str) -> Callable[[Mapping[str, int]], str]:
    """The decoder of the lower half of a 64-bit value."""
    return lambda fields: f"with {high}: {fields[high] << 32 | fields[low]:#018x}"


def _decimal(name: str) -> Callable[[Mapping[str, int]], str]:
    return lambda fields: str(fields[name])


def _bytes(name: str, unit: int = 1) -> Callable[[Mapping[str, int]], str]:
    return lambda fields: size_text(fields[name] * unit)


_VIDEO_TYPES = {
    0x10: "VIDEO_TYPE_MDA",
    0x11: "VIDEO_TYPE_CGA",
    0x20: "VIDEO_TYPE_EGAM",
    0x21: "VIDEO_TYPE_EGAC",
    0x22: "VIDEO_TYPE_VGAC",
    0x23: "VIDEO_TYPE_VLFB",
    0x70: "VIDEO_TYPE_EFI",
}
"""``orig_video_isVGA`` (include/uapi/linux/screen_info.h)."""

_DECODERS: dict[str, Callable[[Mapping[str, int]], str]] = {
    "screen_info.ext_mem_k": _bytes("screen_info.ext_mem_k", 1024),
    "screen_info.orig_video_isVGA": lambda f: _VIDEO_TYPES.get(f["screen_info.orig_video_isVGA"], ""),
    "screen_info.lfb_width": _decimal("screen_info.lfb_width"),
    "screen_info.lfb_height": _decimal("screen_info.lfb_height"),
    "screen_info.lfb_depth": _decimal("screen_info.lfb_depth"),
    "screen_info.lfb_base": _with_high_half("screen_info.lfb_base", "screen_info.ext_lfb_base"),
    "screen_info.lfb_size": _bytes("screen_info.lfb_size"),
    "unaccepted_memory": lambda f: "bitmap, 1 bit = 2 MiB" if f["unaccepted_memory"] else "no bitmap",
    "efi_info.efi_loader_signature": lambda f: _signature(f["efi_info.efi_loader_signature"]),
    "efi_info.efi_systab": _with_high_half("efi_info.efi_systab", "efi_info.efi_systab_hi"),
    "efi_info.efi_memdesc_size": _decimal("efi_info.efi_memdesc_size"),
    "efi_info.efi_memmap": _with_high_half("efi_info.efi_memmap", "efi_info.efi_memmap_hi"),
    "efi_info.efi_memmap_size": _descriptors,
    "alt_mem_k": _bytes("alt_mem_k", 1024),
    "e820_entries": _decimal("e820_entries"),
    "secure_boot": lambda f: SECURE_BOOT_MODES.get(f["secure_boot"], f"mode {f['secure_boot']}"),
    "sentinel": lambda f: "dirty: the loader did not clear the page" if f["sentinel"] else "",
    "hdr.setup_sects": _decimal("hdr.setup_sects"),
    "hdr.header": lambda f: _signature(f["hdr.header"]),
    "hdr.version": lambda f: version_text(f["hdr.version"]),
    "hdr.type_of_loader": lambda f: loader_name(f["hdr.type_of_loader"], f["hdr.ext_loader_type"]),
    "hdr.loadflags": lambda f: flag_names(LoadFlags, f["hdr.loadflags"]),
    "hdr.ramdisk_image": _with_high_half("hdr.ramdisk_image", "ext_ramdisk_image"),
    "hdr.ramdisk_size": _with_high_half("hdr.ramdisk_size", "ext_ramdisk_size"),
    "hdr.cmd_line_ptr": _with_high_half("hdr.cmd_line_ptr", "ext_cmd_line_ptr"),
    "hdr.kernel_alignment": _bytes("hdr.kernel_alignment"),
    "hdr.min_alignment": lambda f: size_text(1 << f["hdr.min_alignment"]),
    "hdr.xloadflags": lambda f: flag_names(XLoadFlags, f["hdr.xloadflags"]),
    "hdr.cmdline_size": _decimal("hdr.cmdline_size"),
    "hdr.payload_length": _bytes("hdr.payload_length"),
    "hdr.setup_data": lambda f: "" if f["hdr.setup_data"] else "no list",
    "hdr.init_size": _bytes("hdr.init_size"),
}
"""What the value of a field means, from all integer fields of the page."""


def _node_row(read: Reader, number: int, node: SetupData) -> Row:
    value = read(node.gpa, node.data_gpa - node.gpa)
    text = f"{_data_type(node.type)}, {node.len} bytes of data at {node.data_gpa:#018x}, next {node.next:#018x}"
    if node.type == SetupDataType.SETUP_E820_EXT:
        text += f", {node.len // BOOT_E820_ENTRY.sizeof()} entries"
    if indirect := read_indirect(read, node):
        kind = _data_type(indirect.type & ~SetupDataType.SETUP_INDIRECT)
        text += f", for {kind}, {indirect.len} bytes at {indirect.addr:#018x}"
    return Row(node.gpa, len(value), f"setup_data[{number}]", value, text)


def _data_type(value: int) -> str:
    return SetupDataType(value).name if value in set(SetupDataType) else f"type {value:#x}"


def _json_integer(value: int) -> dict[str, object]:
    return {"value": value, "hex": f"{value:#018x}"}


def _json_row(row: Row) -> dict[str, object]:
    value = {"bytes": row.hex} if isinstance(row.value, bytes) else {"value": row.value, "hex": row.hex}
    return {"offset": row.offset, "size": row.size, **value, "text": row.text}


def _json_entry(entry: BootE820Entry) -> dict[str, object]:
    return {
        "addr": _json_integer(entry.addr),
        "size": _json_integer(entry.size),
        "type": entry.type,
        "text": type_word(entry.type),
    }


def _json_node(read: Reader, node: SetupData) -> dict[str, object]:
    out: dict[str, object] = {
        "address": _json_integer(node.gpa),
        "next": _json_integer(node.next),
        "type": node.type,
        "text": _data_type(node.type),
        "len": node.len,
    }
    if indirect := read_indirect(read, node):
        out["indirect"] = {
            "addr": _json_integer(indirect.addr),
            "len": _json_integer(indirect.len),
            "type": indirect.type,
        }
    return out
