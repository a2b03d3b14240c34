"""Kernel files as a user has them: a bzImage, or a bare vmlinux; and the configuration inside or beside it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property

from bootstub.bzimage import BzImage, parse_bzimage, read_bzimage
from bootstub.kernel_config import Support, find_ikconfig, parse_config, unaccepted_memory_support
from bootstub.kernel_layout import KERNEL_IMAGE_SIZE
from bootstub.make_bzimage import make_bzimage
from bootstub.payload import decompress
from bootstub.vmlinux import Vmlinux, kernel_total_size, load_segments
from guest.errors import FormatError
from guest.units import SZ_1M
from tools.files import read_file

_ELF_MAGIC = b"\x7fELF"
_GZIP_MAGIC = b"\x1f\x8b"
_CONFIG_LIMIT = 4 * SZ_1M
_WRAPPER_VERSION = "bare vmlinux, wrapped by unaccepted"
_WRAPPER_PROTOCOL = 0x20F
_E_SHOFF, _E_SHNUM = 40, 60


@dataclass(frozen=True)
class KernelImage:
    """A kernel file, and the configuration that was found for it: options by name, and where they come from.

    ``file`` is as it was given. What is computed from it is computed when it is asked for.
    """

    file: bytes
    given_config: str | None = None
    """The text of a configuration file beside the image; what is inside the kernel is not looked at then."""

    @cached_property
    def bzimage(self) -> BzImage | None:
        """The header of a bzImage, of any protocol; None for a bare vmlinux."""
        return None if self.file.startswith(_ELF_MAGIC) else read_bzimage(self.file)

    @cached_property
    def vmlinux(self) -> bytes | None:
        """The kernel's ELF file and what lies behind it; None if the header is too old to say where it is."""
        if self.bzimage is None:
            return self.file
        if not self.bzimage.payload_length:
            return None
        return decompress(self.bzimage.payload(self.file), at=self.bzimage.payload_offset)

    @cached_property
    def config_text(self) -> str | None:
        """The text of the configuration beside the kernel, or inside it."""
        return self.given_config if self.given_config is not None else find_ikconfig(self.vmlinux or b"")

    @cached_property
    def config(self) -> dict[str, str] | None:
        """The options of the configuration by name."""
        return parse_config(self.config_text, "kernel configuration") if self.config_text is not None else None

    @property
    def support(self) -> Support:
        """Whether the kernel knows unaccepted memory. A configuration beside the image tells without looking inside."""
        inside = self.vmlinux or b"" if self.given_config is None else b""
        return unaccepted_memory_support(inside, self.config)

    def bootable(self) -> tuple[bytes, str | None]:
        """The bzImage to boot, and a note if it is not the file itself. ``FormatError`` if there is none."""
        if self.bzimage is not None:
            parse_bzimage(self.file)
            return self.file, None
        kernel = load_segments(self.file)
        total = kernel_total_size(self.file, kernel)
        if not 0 < total <= KERNEL_IMAGE_SIZE:
            source = "arch/x86/include/asm/page_64_types.h, KERNEL_IMAGE_SIZE"
            expected = f"from 1 to {KERNEL_IMAGE_SIZE:#x}"
            raise FormatError("vmlinux, _end - _text", found=f"{total:#x}", expected=expected, source=source)
        payload = self.file if len(self.file) > kernel.elf_end else _without_sections(self.file, kernel)
        image = make_bzimage(
            payload, _WRAPPER_VERSION, compression="zstd", version=_WRAPPER_PROTOCOL, kernel_total_size=total
        )
        header = parse_bzimage(image)
        note = (
            f"a bare vmlinux has no boot stub: packed into a bzImage of ours, code32_start {header.code32_start:#x}, "
            f"init_size {header.init_size:#x}"
        )
        return image, note if payload is self.file else f"{note}; without relocations it needs nokaslr"


def read_config_text(path: str) -> str:
    """The text of a configuration file, plain or packed by gzip as /proc/config.gz is, up to 4 MiB."""
    data = read_file(path)
    if data.startswith(_GZIP_MAGIC):
        stream = zlib.decompressobj(wbits=31)
        try:
            data = stream.decompress(data, _CONFIG_LIMIT)
        except zlib.error as error:
            raise FormatError(path, at=0, found=f"damaged data ({error})", expected="gzip", source="gzip(1)") from error
    if len(data) >= _CONFIG_LIMIT:
        found, expected = f"{len(data)} bytes", f"less than {_CONFIG_LIMIT}"
        raise FormatError(path, found=found, expected=expected, source="unaccepted boot --help")
    return data.decode("utf-8", errors="replace")


def _without_sections(vmlinux: bytes, kernel: Vmlinux) -> bytes:
    """The file up to the end of its last segment: what is behind it, symbols and their like, is not loaded."""
    out = bytearray(vmlinux[: max(segment.p_offset + segment.p_filesz for segment in kernel.segments)])
    struct.pack_into("<Q", out, _E_SHOFF, 0)
    struct.pack_into("<2H", out, _E_SHNUM, 0, 0)
    return bytes(out)
