"""Guest memory without a platform: every access is admitted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guest.bitmap import GuestBitmap
from guest.clock import VirtualClock
from guest.memory import GuestMemory, PhysicalMemory
from guest.trace import Trace
from guest.units import PHYSICAL_ADDRESS_END


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
