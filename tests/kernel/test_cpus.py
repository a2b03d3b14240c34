"""CPUs that take turns: order, clocks, waiting, interrupts off, the soft lockup watchdog, and how a run ends early."""

from __future__ import annotations

import _thread
import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest.clock import VirtualClock
from kernel.cpus import Cpus

SECOND = 1_000_000_000


class Died(Exception):
    pass


def new_cpus(count, seed=0):
    clock = VirtualClock(1000)
    return Cpus(count, clock, seed, Died), clock


def run_all(cpus, job):
    cpus.run((cpu, job) for cpu in cpus.all)


def work(cpus, clock, log, steps):
    """A job that takes the given times, one after the other, with a pause before each."""

    def job(cpu):
        for ns in steps[cpu.number % len(steps)]:
            cpus.pause()
            log.append((clock.ns, cpu.number))
            clock.advance(ns)

    return job


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=40)
def test_who_is_furthest_behind_goes_first(steps, seed):
    """Steps begin in the order of the CPUs' clocks; the whole takes as long as the slowest CPU; a seed repeats."""
    logs = []
    for _ in range(2):
        cpus, clock = new_cpus(len(steps), seed)
        log = []
        run_all(cpus, work(cpus, clock, log, steps))
        assert [ns for ns, _ in log] == sorted(ns for ns, _ in log)
        assert clock.ns == 1000 + max(map(sum, steps))
        for cpu in cpus.all:
            assert [ns for ns, number in log if number == cpu.number] == [
                1000 + sum(steps[cpu.number][:n]) for n in range(len(steps[cpu.number]))
            ]
        logs.append(log)
    assert logs[0] == logs[1]


def test_the_seed_decides_among_equals():
    """CPUs at the same time go in an order that differs from seed to seed."""
    orders = set()
    for seed in range(8):
        cpus, clock = new_cpus(6, seed)
        log = []
        run_all(cpus, work(cpus, clock, log, [[1, 1]]))
        orders.add(tuple(number for _, number in log))
    assert len(orders) > 4


def test_outside_a_run_nothing_waits():
    """The boot CPU alone has the turn, and a pause is none."""
    cpus, clock = new_cpus(3)
    cpus.pause()
    cpus.cond_resched()
    assert cpus.current is cpus.all[0]
    assert clock.ns == 1000


def test_waiting_is_counted():
    """CPUs that wait go on when they are woken, with the waker's time."""
    cpus, clock = new_cpus(3)
    waiters, woken = [], []

    def job(cpu):
        if cpu.number:
            cpus.wait(waiters)
            woken.append((cpu.number, clock.ns))
            return
        clock.advance(10)
        cpus.pause()
        clock.advance(90)
        first = waiters[0].number
        cpus.wake(waiters, queued=True)
        cpus.wake(waiters, queued=True)
        assert woken == []
        woken.append((first, "first"))

    run_all(cpus, job)
    assert {ns for _, ns in woken[1:]} == {1100}
    times = [cpu.times for cpu in cpus.all]
    assert [(t.waits, t.waited_ns, t.longest_wait_ns) for t in times] == [(0, 0, 0), (1, 100, 100), (1, 100, 100)]


def test_everybody_waits():
    """CPUs that all wait for each other are the end of the guest, not of the test."""
    cpus, _ = new_cpus(3)
    before = threading.active_count()
    with pytest.raises(Died, match="every CPU waits"):
        run_all(cpus, lambda cpu: cpus.wait([]))
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [Died("gone"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_ends_all(error):
    """What one CPU dies of is raised as it is; no thread is left, and the CPUs can run again."""
    cpus, clock = new_cpus(4)
    before = threading.active_count()

    def job(cpu):
        clock.advance(cpu.number)
        cpus.pause()
        if cpu.number == 2:
            raise error
        cpus.wait([])

    with pytest.raises(type(error)) as caught:
        run_all(cpus, job)
    assert caught.value is error
    assert threading.active_count() == before
    done = []
    run_all(cpus, lambda cpu: done.append(cpu.number))
    assert sorted(done) == [0, 1, 2, 3]


def test_ctrl_c():
    """Ctrl-C reaches the thread that waits for the CPUs; the one that runs is stopped at its next pause."""
    cpus, _ = new_cpus(3)
    before = threading.active_count()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it

    def job(cpu):
        if cpu.number == 1:
            _thread.interrupt_main()
        while True:
            cpus.cond_resched()

    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(cpus, job)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert threading.active_count() == before


def test_interrupts_off_and_soft_lockup():
    """The watchdog's late timer tells of a CPU that had no chance for twice the threshold; a touch prevents it."""
    cpus, clock = new_cpus(1)
    told = []
    cpus.on_soft_lockup = lambda cpu, seconds: told.append((cpu.number, seconds))

    def spend(ns, touch):
        cpus.irq_save()
        clock.advance(ns)
        if touch:
            cpus.touch_softlockup_watchdog()
        cpus.irq_restore()

    def job(cpu):
        cpus.watchdog_thresh = 1
        spend(2 * SECOND, touch=False)
        spend(SECOND, touch=False)
        cpus.cond_resched()
        spend(2 * SECOND, touch=False)
        cpus.cond_resched()
        spend(5 * SECOND, touch=True)
        cpus.watchdog_thresh = 0
        spend(9 * SECOND, touch=False)

    run_all(cpus, job)
    times = cpus.all[0].times
    assert told == [(0, 3)]
    assert (times.soft_lockups, times.irqs_off_ns, times.busy_ns) == (1, 9 * SECOND, 9 * SECOND)
