"""What the boot stub puts into the trace."""

from __future__ import annotations

from dataclasses import dataclass

from guest.trace import Event


@dataclass(frozen=True, slots=True)
class KernelPlaced(Event):
    """The kernel was unpacked to ``physical``; its ``segments`` are in place, to be mapped at ``virtual``.

    ``virtual`` is an offset from __START_KERNEL_map, as the decompressor counts.
    """

    physical: int
    virtual: int
    segments: int
