"""Boots of a small guest, stopped where a test wants to look."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from bootstub.sample_kernel import sample_bzimage
from guest.trace import Print
from tools.pipeline import Boot, BootConfig


def by_hand(layout: str) -> dict[str, tuple[int, int]]:
    """A layout typed as ``OFFSET/SIZE NAME ...``, the offset in hexadecimal, as name: (offset, size)."""
    words = layout.split()
    places = (place.split("/") for place in words[::2])
    return {name: (int(at, 16), int(size)) for name, (at, size) in zip(words[1::2], places, strict=True)}


def printed(boot: Boot, stage: str) -> list[str]:
    """The lines that a stage put out."""
    return [r.event.text for r in boot.trace.records if r.stage == stage and isinstance(r.event, Print)]


def patch_kernel(*fields: tuple[int, str, int]) -> bytes:
    """The sample bzImage with other fields, each ``(offset, format, value)``."""
    image = bytearray(sample_bzimage())
    for offset, fmt, value in fields:
        struct.pack_into("<" + fmt, image, offset, value)
    return bytes(image)


@pytest.fixture
def new_boot() -> Callable[..., Boot]:
    """``new_boot(until, **config)``: a boot that ran up to and with stage ``until``."""

    def start(until: str, **config: Any) -> Boot:
        config.setdefault("kernel", sample_bzimage())
        boot = Boot(BootConfig(**config))
        boot.run(until)
        return boot

    return start


@pytest.fixture
def patched_kernel() -> Callable[..., bytes]:
    """:func:`patch_kernel`."""
    return patch_kernel
