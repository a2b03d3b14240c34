"""How several CPUs accept memory at once, and what they wait for.

    v9        one spinlock protects the bitmap; interrupts are off from before the spinning to the end of the accept
    mainline  a list of the ranges in flight; who finds its range on it spins, with interrupts on between two looks;
              interrupts are off during the accept, whose end touches the soft lockup watchdog (6.12)
    neither   what a test leaves: two CPUs can accept the same unit

Sources: v9 10/14, arch/x86/mm/unaccepted_memory.c; drivers/firmware/efi/unaccepted_memory.c, accept_memory().
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kernel.cpus import Cpu, Cpus


class BitmapSpinlock:
    """v9: unaccepted_memory_lock, held over the whole accept. ``queued``: it goes to the longest waiter."""

    def __init__(self, cpus: Cpus, queued: bool) -> None:
        self._cpus, self._queued = cpus, queued
        self._held = False
        self._waiters: list[Cpu] = []

    @contextmanager
    def accepting(self, first: int, last: int) -> Iterator[None]:
        """spin_lock_irqsave() ... spin_unlock_irqrestore()."""
        self._cpus.irq_save()
        if self._held:
            self._cpus.wait(self._waiters)  # woken, it holds the lock
        self._held = True
        yield
        self._cpus.current.times.accepts += 1
        if self._waiters:
            self._cpus.wake(self._waiters, self._queued)
        else:
            self._held = False
        self._cpus.irq_restore()

    def accepted(self) -> None:
        """Others run while this CPU holds the lock."""
        self._cpus.pause()


class RangesInFlight:
    """mainline: accepting_list. CPUs with ranges that do not overlap accept side by side.

    Unless ``exact``, a range that begins where one in flight ends counts as overlapping, as it did at first.
    """

    def __init__(self, cpus: Cpus, exact: bool = True) -> None:
        self._cpus, self._more = cpus, not exact
        self._accepting: dict[tuple[int, int], list[Cpu]] = {}

    @contextmanager
    def accepting(self, first: int, last: int) -> Iterator[None]:
        """Put the range on the list as soon as nothing on it overlaps; take it off at the end."""
        while (waiters := self._overlapping(first, last)) is not None:
            self._cpus.wait(waiters)
        waiters = self._accepting[first, last] = []
        self._cpus.irq_save()
        yield
        self._cpus.current.times.accepts += 1
        del self._accepting[first, last]
        while waiters:
            self._cpus.wake(waiters, queued=True)
        self._cpus.touch_softlockup_watchdog()
        self._cpus.irq_restore()

    def _overlapping(self, first: int, last: int) -> list[Cpu] | None:
        """Who waits for a range in flight that overlaps this one; None if there is no such range."""
        for (start, end), waiters in self._accepting.items():
            if start < last and first < end + self._more:
                return waiters
        return None

    def accepted(self) -> None:
        """The lock is not held during the accept: others run."""
        self._cpus.pause()


class NoExclusion:
    """What is left when a test takes the protection out."""

    def __init__(self, cpus: Cpus) -> None:
        self._cpus = cpus

    @contextmanager
    def accepting(self, first: int, last: int) -> Iterator[None]:
        """Nothing keeps another CPU out; interrupts are off all the same."""
        self._cpus.irq_save()
        yield
        self._cpus.current.times.accepts += 1
        self._cpus.irq_restore()

    def accepted(self) -> None:
        """Others run, and find the bits still set."""
        self._cpus.pause()
