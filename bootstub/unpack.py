"""A payload unpacked: the kernel's file, and what loaders need to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bootstub.kernel_layout import MIN_KERNEL_ALIGN
from bootstub.payload import decompress
from bootstub.vmlinux import Vmlinux, kernel_total_size, load_segments
from guest.errors import FormatError
from guest.units import round_up


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The file ``vmlinux`` with the relocation table behind it, its segments, and the memory it needs in the end."""

    vmlinux: bytes
    kernel: Vmlinux
    total_size: int

    @property
    def needed_size(self) -> int:
        """Bytes of memory that are mapped for it: the larger of file and kernel, whole pages of 2 MiB."""
        return round_up(max(len(self.vmlinux), self.total_size), MIN_KERNEL_ALIGN)


def unpack(payload: bytes, at: int = 0) -> Unpacked:
    """Unpack ``payload``, which was found at ``at``; the last one is remembered."""
    try:
        return _unpack(payload)
    except FormatError:
        decompress(payload, at=at)  # what is wrong with the payload has a place in memory
        raise


@lru_cache(maxsize=1)
def _unpack(payload: bytes) -> Unpacked:
    vmlinux = decompress(payload)
    kernel = load_segments(vmlinux)
    return Unpacked(vmlinux, kernel, kernel_total_size(vmlinux, kernel))
