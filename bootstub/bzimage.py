"""A bzImage as a boot loader sees it: real-mode setup with its header, protected-mode code, payload.

Source: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header". Offsets are in bytes from the start of
the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bootstub.setup_header import (
    BOOT_FLAG,
    DEFAULTS,
    HEADER_MAGIC,
    SETUP_HEADER,
    SETUP_HEADER_OFFSET,
    SINCE,
    LoadFlags,
    XLoadFlags,
    version_text,
)
from guest.errors import FormatError
from guest.records import field_extents, offsets, parse
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END

_BOOT_RST = "Documentation/arch/x86/boot.rst"
_SECTOR = 512
_SETUP_SECTS_DEFAULT = 4
"""What ``setup_sects`` 0 means."""
_PARAGRAPH = 16
"""The unit of ``syssize``."""
_VERSION_MIN = 0x202
"""The first protocol with a command line of its own place, Linux 2.4; the header of earlier ones is not read."""
_VERSION_EFI = 0x20A
"""The first protocol with ``pref_address`` and ``init_size``; no older kernel has an EFI stub (Linux 3.3)."""
_KERNEL_VERSION_MAX = 256


@dataclass(frozen=True, slots=True)
class BzImage:
    """What the header of a bzImage says, checked against the file.

    ``kernel_version`` is the text that the field points to, None if it points nowhere. ``protected_mode_offset``
    and ``payload_offset`` are offsets in the file; the header counts the latter from the former.
    ``handover_offset`` counts from ``protected_mode_offset``; 0 if there is none.

    ``missing`` names the fields that the image's protocol does not have: they have the values of
    ``setup_header.DEFAULTS``. Without ``syssize`` the code goes on to the end of the file.
    """

    setup_sects: int
    version: int
    kernel_version: str | None
    loadflags: LoadFlags
    xloadflags: XLoadFlags
    protected_mode_offset: int
    protected_mode_size: int
    code32_start: int
    payload_offset: int
    payload_length: int
    pref_address: int
    init_size: int
    kernel_alignment: int
    min_alignment: int
    relocatable_kernel: bool
    cmdline_size: int
    initrd_addr_max: int
    handover_offset: int
    missing: frozenset[str] = frozenset()

    def payload(self, data: bytes) -> bytes:
        """The compressed kernel in ``data``, the file that this was parsed from."""
        return data[self.payload_offset : self.payload_offset + self.payload_length]


def parse_bzimage(data: bytes) -> BzImage:
    """Read the header of a bzImage that boots by its 64-bit EFI stub; ``FormatError`` if it cannot be one."""
    hdr, missing = _read_header(data)
    _check_loading(hdr, missing)
    _check_alignment(hdr)
    return _bzimage(data, hdr, missing)


def read_bzimage(data: bytes) -> BzImage:
    """Read the header of a bzImage of any protocol from 2.02 on, bootable here or not."""
    return _bzimage(data, *_read_header(data))


def setup_header_fields(data: bytes) -> dict[str, int]:
    """Every field of a bzImage's setup header in order, as it stands in the file; those it is too old for are 0."""
    hdr, missing = _read_header(data)
    return {name: 0 if name in missing else hdr[name] for name in field_extents(SETUP_HEADER)}


def _read_header(data: bytes) -> tuple[Any, frozenset[str]]:
    """The setup header, and the fields that it is too old for, which have their defaults."""
    raw = data[SETUP_HEADER_OFFSET : SETUP_HEADER_OFFSET + SETUP_HEADER.sizeof()]
    hdr = parse(SETUP_HEADER, "setup_header", raw, at=SETUP_HEADER_OFFSET, source=_BOOT_RST)
    _check_magic(hdr)
    missing = frozenset(name for name, since in SINCE.items() if hdr.version < since)
    hdr.update((name, DEFAULTS.get(name, 0)) for name in missing)
    return hdr, missing


def _bzimage(data: bytes, hdr: Any, missing: frozenset[str]) -> BzImage:
    setup_sects = hdr.setup_sects or _SETUP_SECTS_DEFAULT
    protected = (setup_sects + 1) * _SECTOR
    if "syssize" in missing:
        hdr.syssize = max(len(data) - protected, 0) // _PARAGRAPH
    _check_sizes(hdr, missing, protected, len(data))
    return BzImage(
        setup_sects=setup_sects,
        version=hdr.version,
        kernel_version=_kernel_version(data, hdr.kernel_version, setup_sects),
        loadflags=LoadFlags(hdr.loadflags),
        xloadflags=XLoadFlags(hdr.xloadflags),
        protected_mode_offset=protected,
        protected_mode_size=hdr.syssize * _PARAGRAPH,
        code32_start=hdr.code32_start,
        payload_offset=protected + hdr.payload_offset,
        payload_length=hdr.payload_length,
        pref_address=hdr.pref_address,
        init_size=hdr.init_size,
        kernel_alignment=hdr.kernel_alignment,
        min_alignment=hdr.min_alignment,
        relocatable_kernel=bool(hdr.relocatable_kernel),
        cmdline_size=hdr.cmdline_size,
        initrd_addr_max=hdr.initrd_addr_max,
        handover_offset=hdr.handover_offset,
        missing=missing,
    )


def _require(true: bool, field: str, found: str, expected: str) -> None:
    """Refuse ``field`` of the setup header unless ``true``."""
    if not true:
        at = SETUP_HEADER_OFFSET + offsets(SETUP_HEADER)[field]
        raise FormatError(f"setup_header.{field}", at=at, found=found, expected=expected, source=_BOOT_RST)


def _check_magic(hdr: Any) -> None:
    """It is a boot sector, and it has a header of a known shape."""
    _require(hdr.boot_flag == BOOT_FLAG, "boot_flag", f"{hdr.boot_flag:#06x}", f"{BOOT_FLAG:#06x}")
    magic = hdr.header.to_bytes(4, "little")
    _require(hdr.header == HEADER_MAGIC, "header", f"{magic!r}", "b'HdrS'")
    _require(
        hdr.version >= _VERSION_MIN,
        "version",
        f"boot protocol {version_text(hdr.version)}",
        f"{version_text(_VERSION_MIN)} or later",
    )


def _check_loading(hdr: Any, missing: frozenset[str]) -> None:
    """The kernel can be loaded where a 64-bit EFI stub loads kernels, and says so in a way that makes sense.

    Where a header is too old for ``xloadflags``, only the PE header says that the kernel has 64 bits.
    """
    _require(
        hdr.version >= _VERSION_EFI,
        "version",
        f"boot protocol {version_text(hdr.version)}",
        f"{version_text(_VERSION_EFI)} or later: an older kernel has no EFI stub",
    )
    _require(
        bool(hdr.loadflags & LoadFlags.LOADED_HIGH),
        "loadflags",
        f"{hdr.loadflags:#x}",
        "LOADED_HIGH (bit 0): a bzImage, not a zImage",
    )
    _require(
        "xloadflags" in missing or bool(hdr.xloadflags & XLoadFlags.XLF_KERNEL_64),
        "xloadflags",
        f"{hdr.xloadflags:#x}",
        "XLF_KERNEL_64 (bit 0): a 64-bit kernel",
    )


def _check_alignment(hdr: Any) -> None:
    """``kernel_alignment``, ``min_alignment`` and ``pref_address`` fit each other."""
    alignment = hdr.kernel_alignment
    _require(
        alignment >= PAGE_SIZE and alignment & alignment - 1 == 0,
        "kernel_alignment",
        f"{alignment:#x}",
        "a power of two of at least one page",
    )
    _require(
        PAGE_SIZE <= 1 << hdr.min_alignment <= alignment,
        "min_alignment",
        f"2^{hdr.min_alignment}",
        f"from {PAGE_SIZE:#x} to kernel_alignment ({alignment:#x})",
    )
    _require(
        hdr.pref_address % alignment == 0 and hdr.pref_address + hdr.init_size <= PHYSICAL_ADDRESS_END,
        "pref_address",
        f"{hdr.pref_address:#x}",
        f"a multiple of {alignment:#x} with room for init_size below {PHYSICAL_ADDRESS_END:#x}",
    )


def _check_sizes(hdr: Any, missing: frozenset[str], protected: int, file_size: int) -> None:
    """The parts lie inside each other: payload and entry points in the code, the code in the file."""
    _require(protected < file_size, "setup_sects", f"{hdr.setup_sects}", f"setup inside the {file_size} bytes of file")
    code_size = hdr.syssize * _PARAGRAPH
    available = file_size - protected
    _require(0 < code_size <= available, "syssize", f"{code_size} bytes", f"from 1 to {available} bytes left in file")
    handover = hdr.handover_offset
    _require(handover < code_size, "handover_offset", f"{handover:#x}", f"less than {code_size:#x} [syssize]")
    if "init_size" not in missing:
        _require(hdr.init_size >= code_size, "init_size", f"{hdr.init_size:#x}", f"at least {code_size:#x} [syssize]")
    if "payload_length" in missing:
        return
    _require(
        hdr.payload_offset < code_size,
        "payload_offset",
        f"{hdr.payload_offset:#x}",
        f"less than {code_size:#x} [syssize]",
    )
    room = code_size - hdr.payload_offset
    _require(
        0 < hdr.payload_length <= room,
        "payload_length",
        f"{hdr.payload_length}",
        f"from 1 to {room} bytes [syssize]",
    )


def _kernel_version(data: bytes, pointer: int, setup_sects: int) -> str | None:
    """The text at ``pointer`` + 0x200, which must lie in the setup code; control characters are refused."""
    if pointer == 0:
        return None
    end = setup_sects * _SECTOR
    _require(pointer < end, "kernel_version", f"{pointer:#x}", f"less than {end:#x} (0x200 * setup_sects)")
    start = pointer + _SECTOR
    raw = data[start : min(start + _KERNEL_VERSION_MAX, end + _SECTOR)]
    text, nul, _ = raw.partition(b"\0")
    readable = nul != b"" and text.isascii() and text.decode("latin-1").isprintable()
    _require(readable, "kernel_version", f"{raw[:32]!r}", "printable ASCII text that ends with NUL")
    return text.decode("ascii")
