"""Any source of a memory map, recognised by what is in it.

A name is one of: a file (a kernel's log, JSON, TOML, ``memmap=`` parameters, a boot_params page, raw EFI descriptors,
guest memory with ``boot_params``; packed with gzip or not), a directory like /sys/firmware/memmap, ``-`` for standard
input, and ``td:4G`` for our own firmware's map, with options of a boot (``tools.maps.td``).
"""

from __future__ import annotations

import re
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from bootstub.boot_params import BOOT_PARAMS_SIZE
from firmware.memory_descriptor import MemoryDescriptor, check_map
from guest.errors import FormatError
from guest.units import SZ_64M
from tools.files import file_path, read_file
from tools.maps import binary, description, dmesg, firmware_memmap, memmap_args
from tools.maps.platform_map import PlatformMap, mark_unaccepted
from tools.maps.td import PREFIX, td_map

_FORMS = "sources of `unaccepted map --help`"
_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = 31
_TELLING_BYTES = 4096
_STAMP = re.compile(r"\[ *[0-9]+\.[0-9]{6}\]")
"""A log without a map begins like JSON."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What a source cannot say itself.

    ``boot_params``: the file is guest memory from address 0, and this is the page, or its address. ``stride``: bytes
    from one raw descriptor to the next. ``unaccepted_from``: conventional memory from there on is unaccepted.
    ``td``: more options of a boot, by name, for ``td:``.
    """

    boot_params: int | bytes | None = None
    stride: int | None = None
    unaccepted_from: int | None = None
    td: tuple[tuple[str, str], ...] = ()


def read_map(source: str, options: SourceOptions = SourceOptions()) -> PlatformMap:  # it is frozen
    """The map of ``source``. Ranges may overlap. Raises ``FormatError`` and ``OSError``."""
    platform = _read(source, options)
    if options.unaccepted_from is None:
        return platform
    descriptors = mark_unaccepted(platform.descriptors, options.unaccepted_from)
    return replace(platform, descriptors=descriptors, e820=None)


def boot_descriptors(platform: PlatformMap) -> tuple[MemoryDescriptor, ...]:
    """The descriptors of a map that a guest can boot with; one that overlaps is a ``FormatError``."""
    check_map(platform.descriptors, platform.name)
    return platform.descriptors


def _read(source: str, options: SourceOptions) -> PlatformMap:
    if source.startswith(PREFIX):
        return td_map(source, options.td)
    if options.boot_params is not None:
        return binary.read_image(source, options.boot_params)
    if source == "-":
        return parse_bytes(sys.stdin.buffer.read(SZ_64M + 1), "standard input", options.stride)
    if file_path(source).is_dir():
        return firmware_memmap.read_tree(Path(source))
    return parse_bytes(read_file(source), source, options.stride)


def parse_bytes(data: bytes, name: str, stride: int | None = None) -> PlatformMap:
    """The map of a file's bytes. Raises ``FormatError``."""
    if data.startswith(_GZIP):
        data = _unpacked(data, name)
    if len(data) > SZ_64M:
        raise FormatError(name, found=f"{len(data)} bytes", expected=f"at most {SZ_64M}", source=_FORMS)
    if stride is not None:
        return binary.parse_raw(data, name, stride)
    text = data.decode("utf-8", errors="replace")
    if b"\0" not in data[:_TELLING_BYTES] or dmesg.is_dmesg(text):
        return parse_text(text, name)
    if len(data) == BOOT_PARAMS_SIZE:
        return binary.parse_boot_params(data, name)
    return binary.parse_raw(data, name)


def parse_text(text: str, name: str) -> PlatformMap:
    """The map of a text. Raises ``FormatError``."""
    if dmesg.is_dmesg(text):
        return dmesg.parse_dmesg(text, name)
    if memmap_args.is_memmap_args(text):
        return memmap_args.parse_memmap_args(text, name)
    if description.is_toml(text):
        return description.parse_toml(text, name)
    if text.lstrip()[:1] in ("[", "{") and not _STAMP.match(text):
        data = description.load_json(text, name)
        if firmware_memmap.is_firmware_memmap(data):
            return firmware_memmap.from_rows(data, name)
        return description.from_data(data, name, description.JSON_FORM)
    raise FormatError(
        name, found="no memory descriptor", expected="a kernel's log with `efi: mem` or `BIOS-e820` lines, JSON, TOML, "
        "memmap=exactmap, raw descriptors or boot_params", source=_FORMS,
    )  # fmt: skip


def _unpacked(data: bytes, name: str) -> bytes:
    """The contents of a gzip file, or its first 64 MiB and a byte."""
    try:
        return zlib.decompressobj(_GZIP_WINDOW).decompress(data, SZ_64M + 1)
    except zlib.error as error:
        raise FormatError(name, found=str(error), expected="a gzip file", source="RFC 1952") from error
