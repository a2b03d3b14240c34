"""Boots of a small guest, stopped where a test wants to look."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from bootstub.sample_kernel import sample_bzimage
from tools.pipeline import Boot, BootConfig


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
    """``patched_kernel((offset, format, value), ...)``: the sample bzImage with other fields."""

    def patch(*fields: tuple[int, str, int]) -> bytes:
        image = bytearray(sample_bzimage())
        for offset, fmt, value in fields:
            struct.pack_into("<" + fmt, image, offset, value)
        return bytes(image)

    return patch
