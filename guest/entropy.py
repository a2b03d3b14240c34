"""What a processor can draw randomness from. Here it follows from a seed, so that runs repeat."""

from __future__ import annotations

import random
from typing import Protocol

from guest.clock import VirtualClock


class Chance(Protocol):
    """The instructions that give something which a program cannot foresee."""

    def rdrand(self) -> int:
        """RDRAND: a random number of 64 bits."""
        ...

    def rdtsc(self) -> int:
        """RDTSC: the time stamp counter."""
        ...


class Entropy:
    """RDRAND and the time stamp counter, both decided by ``seed``; the counter runs at 1 GHz of virtual time."""

    def __init__(self, clock: VirtualClock, seed: int = 0) -> None:
        self._clock = clock
        self._random = random.Random(seed)
        self._tsc_base = self._random.getrandbits(48)

    def rdrand(self) -> int:
        """A random number of 64 bits."""
        return self._random.getrandbits(64)

    def rdtsc(self) -> int:
        """The time stamp counter."""
        return self._tsc_base + self._clock.ns
