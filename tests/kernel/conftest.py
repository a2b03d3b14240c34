"""Guest memory without a platform, in which every access is admitted; and boots of whole guests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bootstub.sample_kernel import sample_bzimage
from guest.bitmap import GuestBitmap
from guest.clock import VirtualClock
from guest.memory import GuestMemory, PhysicalMemory
from guest.trace import Print, Trace
from guest.units import PHYSICAL_ADDRESS_END
from tools.pipeline import Boot, BootConfig


class AdmitEverything:
    def admit(self, gpa: int, size: int, kind: str) -> tuple[int, int]:
        return 0, PHYSICAL_ADDRESS_END


@pytest.fixture
def new_bitmap() -> Callable[[], GuestBitmap]:
    """Makes empty bitmaps, each in a guest memory of its own."""

    def make() -> GuestBitmap:
        memory = GuestMemory(PhysicalMemory(), AdmitEverything(), Trace(VirtualClock()))
        return GuestBitmap(memory, 0x10_0000)

    return make


@pytest.fixture
def new_boot() -> Callable[..., Boot]:
    """``new_boot(until, **config)``: a boot that ran up to and with stage ``until``; None for all of them."""

    def start(until: str | None = None, **config: Any) -> Boot:
        boot = Boot(BootConfig(sample_bzimage(), **config))
        boot.run(until)
        return boot

    return start


@pytest.fixture
def log() -> Callable[[Boot, str], list[str]]:
    """``log(boot, stage)``: the lines that a stage printed."""

    def lines(boot: Boot, stage: str) -> list[str]:
        return [r.event.text for r in boot.trace.records if r.stage == stage and isinstance(r.event, Print)]

    return lines
