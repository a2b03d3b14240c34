"""How a host backs a TD's private memory: with which pages, and when."""

from __future__ import annotations

from dataclasses import dataclass

from guest.ranges import TOP
from guest.units import PMD_SIZE, round_down
from tdx.sept import LEVEL_2M, LEVEL_4K

_MIXED_EVERY = 4


@dataclass(frozen=True, slots=True)
class Backing:
    """``level`` is the largest page: 0 = 4 KiB (KVM up to 6.16), 1 = 2 MiB.

    ``small_every``: of every so many 2 MiB blocks the last one gets 4 KiB pages all the same, as on a host whose memory
    is fragmented; 0 is none. ``ahead``: all RAM is backed before the TD runs, else when an exit asks for it.
    """

    level: int = LEVEL_2M
    small_every: int = 0
    ahead: bool = False

    def level_at(self, gpa: int) -> tuple[int, int]:
        """Largest page at ``gpa``, and where that ends to be so."""
        if not self.small_every or self.level == LEVEL_4K:
            return self.level, TOP
        period = self.small_every * PMD_SIZE
        base = round_down(gpa, period)
        small = base + period - PMD_SIZE
        return (self.level, small) if gpa < small else (LEVEL_4K, base + period)


MIXED = Backing(small_every=_MIXED_EVERY)
"""A host whose memory is fragmented: three blocks of 2 MiB, then one of 4 KiB pages, and so on."""
