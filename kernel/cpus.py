"""Several CPUs: each runs on a virtual clock of its own, one after the other, in an order that a seed decides.

A CPU is a thread that runs only while it has the turn, so that what it calls need not know of others. The turn goes
on where a CPU says so: to the CPU whose clock is furthest behind, and among equals to the one that the seed draws.
The same seed gives the same order, to the event.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from threading import Semaphore, Thread

from guest.clock import VirtualClock

DEFAULT_WATCHDOG_THRESH = 10
"""kernel.watchdog_thresh in seconds; a soft lockup is twice that (kernel/watchdog.c)."""
NS_PER_SECOND = 1_000_000_000


@dataclass(slots=True)
class CpuTimes:
    """What one CPU waited for, in numbers and virtual nanoseconds.

    ``waits``: times that another CPU was accepting. ``irqs_off_ns``: longest time with interrupts off, spinning for
    a lock included. ``busy_ns``: longest time without a chance for the soft lockup watchdog.
    """

    accepts: int = 0
    waits: int = 0
    waited_ns: int = 0
    longest_wait_ns: int = 0
    irqs_off_ns: int = 0
    busy_ns: int = 0
    soft_lockups: int = 0


@dataclass(slots=True, eq=False)
class Cpu:
    """One CPU; ``ns`` is its clock while another one has the turn."""

    number: int
    online: bool = True
    ns: int = 0
    times: CpuTimes = field(default_factory=CpuTimes)
    irqs_off_since: int | None = None
    touched_ns: int = 0
    """When the soft lockup watchdog was touched last."""


class _Cancelled(BaseException):
    """Ends the thread of a CPU that will not get another turn."""


class _Turn:
    """The thread of one CPU's job; ``back`` is released when the turn is given back."""

    def __init__(self, cpu: Cpu, job: Callable[[Cpu], None], back: Semaphore) -> None:
        self.cpu = cpu
        self.finished = self.cancelled = False
        self.error: BaseException | None = None
        self._go, self._back, self._job = Semaphore(0), back, job
        self._thread = Thread(target=self._run, name=f"cpu{cpu.number}", daemon=True)
        self._thread.start()

    def give(self) -> None:
        """Let the thread run until it hands the turn back."""
        self._go.release()
        self._back.acquire()

    def hand_back(self) -> None:
        """Called by the thread itself: wait for the next turn."""
        self._back.release()
        self._wait()

    def cancel(self) -> None:
        """End the thread; what it raises on its way out is nobody's business."""
        self.cancelled = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._go.acquire()
        if self.cancelled:
            raise _Cancelled

    def _run(self) -> None:
        try:
            self._wait()
            self._job(self.cpu)
        except BaseException as error:
            self.error = error
        self.finished = True
        self._back.release()


class Cpus:
    """The guest's CPUs. Outside :meth:`run` the boot CPU has the turn, and nobody waits."""

    def __init__(self, count: int, clock: VirtualClock, seed: int, panic: Callable[[str], BaseException]) -> None:
        self.all = [Cpu(number) for number in range(count)]
        self.watchdog_thresh = DEFAULT_WATCHDOG_THRESH
        self.on_soft_lockup: Callable[[Cpu, int], None] = lambda cpu, seconds: None
        self._clock, self._random, self._panic = clock, random.Random(seed), panic
        self._turn: _Turn | None = None
        self._ready: list[tuple[int, float, int, _Turn]] = []
        self._sleeping: dict[int, _Turn] = {}

    @property
    def online(self) -> list[Cpu]:
        """The CPUs that are online, by number."""
        return [cpu for cpu in self.all if cpu.online]

    @property
    def current(self) -> Cpu:
        """The CPU that has the turn."""
        return self._turn.cpu if self._turn is not None else self.all[0]

    def run(self, jobs: Iterable[tuple[Cpu, Callable[[Cpu], None]]]) -> None:
        """Run each CPU's job, all from now on; the clock then stands where the last one finished.

        What ends a job with an exception ends all, and is raised.
        """
        start = self._clock.ns
        back = Semaphore(0)
        turns = [_Turn(cpu, job, back) for cpu, job in jobs]
        for turn in turns:
            turn.cpu.ns = turn.cpu.touched_ns = start
            self._make_ready(turn)
        try:
            while self._ready:
                self._give_turn(heappop(self._ready)[-1])
            if not all(turn.finished for turn in turns):
                raise self._panic("every CPU waits for another one")
        finally:
            for turn in sorted(turns, key=lambda turn: turn is not self._turn):  # one that is interrupted runs still
                if not turn.finished:
                    turn.cancel()
            self._turn = None
            self._ready.clear()
            self._sleeping.clear()
            self._clock.ns = max((turn.cpu.ns for turn in turns), default=start)

    def pause(self) -> None:
        """Let all CPUs go first whose clocks are behind this one's."""
        turn = self._turn
        if turn is not None and turn.cancelled:
            raise _Cancelled
        if turn is None or not self._ready or self._ready[0][0] > self._clock.ns:
            return
        turn.cpu.ns = self._clock.ns
        self._make_ready(turn)
        turn.hand_back()

    def wait(self, waiters: list[Cpu]) -> None:
        """Join ``waiters`` until :meth:`wake` takes this CPU out of them; the time counts as waited."""
        turn = self._turn
        assert turn is not None
        cpu, since = turn.cpu, self._clock.ns
        cpu.ns = since
        waiters.append(cpu)
        self._sleeping[cpu.number] = turn
        turn.hand_back()
        waited = self._clock.ns - since
        cpu.times.waits += 1
        cpu.times.waited_ns += waited
        cpu.times.longest_wait_ns = max(cpu.times.longest_wait_ns, waited)

    def wake(self, waiters: list[Cpu], queued: bool) -> None:
        """Let one of ``waiters`` go on from now: the first if they are ``queued``, else the one that the seed draws."""
        cpu = waiters.pop(0 if queued else self._random.randrange(len(waiters)))
        cpu.ns = max(cpu.ns, self._clock.ns)
        self._make_ready(self._sleeping.pop(cpu.number))

    # Interrupts.

    def irq_save(self) -> None:
        """Interrupts off, as spin_lock_irqsave() does before it spins."""
        self.current.irqs_off_since = self._clock.ns

    def irq_restore(self) -> None:
        """Interrupts on: the watchdog's timer, if it is late, comes now."""
        cpu, now = self.current, self._clock.ns
        assert cpu.irqs_off_since is not None
        cpu.times.irqs_off_ns = max(cpu.times.irqs_off_ns, now - cpu.irqs_off_since)
        cpu.irqs_off_since = None
        self._watchdog(cpu)

    def touch_softlockup_watchdog(self) -> None:
        """This CPU says itself that it is alive."""
        cpu = self.current
        cpu.times.busy_ns = max(cpu.times.busy_ns, self._clock.ns - cpu.touched_ns)
        cpu.touched_ns = self._clock.ns

    def idle(self) -> None:
        """All CPUs have nothing to do up to now."""
        for cpu in self.all:
            cpu.touched_ns = self._clock.ns

    def cond_resched(self) -> None:
        """Here anything else can run: the watchdog's own thread, and CPUs whose clocks are behind."""
        self.touch_softlockup_watchdog()
        self.pause()

    def _watchdog(self, cpu: Cpu) -> None:
        """The timer of kernel/watchdog.c, watchdog_timer_fn(): has the CPU done nothing else for too long?"""
        stuck = self._clock.ns - cpu.touched_ns
        cpu.times.busy_ns = max(cpu.times.busy_ns, stuck)
        limit = 2 * self.watchdog_thresh * NS_PER_SECOND
        if 0 < limit < stuck:
            cpu.times.soft_lockups += 1
            self.on_soft_lockup(cpu, stuck // NS_PER_SECOND)
            cpu.touched_ns = self._clock.ns

    # Turns.

    def _make_ready(self, turn: _Turn) -> None:
        heappush(self._ready, (turn.cpu.ns, self._random.random(), turn.cpu.number, turn))

    def _give_turn(self, turn: _Turn) -> None:
        self._turn = turn
        self._clock.ns = turn.cpu.ns
        turn.give()
        turn.cpu.ns = max(turn.cpu.ns, self._clock.ns)
        if turn.error is not None:
            raise turn.error
        self._turn = None
