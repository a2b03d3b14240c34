"""The local APIC's registers, its timer, and how its interrupts enter a guest."""

from __future__ import annotations

import pytest

from cpu.apic import MSRS, LocalApic
from guest.clock import VirtualClock

BASE, DEADLINE = 0x1B, 0x6E0
ID, VERSION, TPR, PPR, EOI, LDR, SVR, ISR, TMR, IRR = (
    0x802,
    0x803,
    0x808,
    0x80A,
    0x80B,
    0x80D,
    0x80F,
    0x810,
    0x818,
    0x820,
)
ESR, ICR, TIMER, LINT0, ERROR = 0x828, 0x830, 0x832, 0x835, 0x837
INITIAL, CURRENT, DIVIDE, SELF_IPI = 0x838, 0x839, 0x83E, 0x83F
MASKED, PERIODIC, TSC_DEADLINE = 1 << 16, 1 << 17, 2 << 17
DIVIDE_BY_1, COUNT_NS = 0xB, 40


@pytest.fixture
def clock() -> VirtualClock:
    """A clock that has run for a second."""
    return VirtualClock(1_000_000_000)


@pytest.fixture
def apic(clock: VirtualClock) -> LocalApic:
    """An APIC that software has enabled, with a timer that counts every 40 ns."""
    apic = LocalApic(clock, 12345)
    assert apic.wrmsr(SVR, 0x1FF)
    assert apic.wrmsr(DIVIDE, DIVIDE_BY_1)
    return apic


def take(apic: LocalApic) -> int:
    """What a processor does that takes interrupts."""
    vector = apic.pending()
    assert vector is not None
    apic.acknowledge(vector)
    return vector


def test_it_is_in_x2apic_mode_as_after_reset(clock: VirtualClock) -> None:
    """APIC_BASE shows x2APIC mode and the boot processor; all of the LVT is masked; nothing is pending."""
    apic = LocalApic(clock)
    values = {index: apic.rdmsr(index) for index in (BASE, ID, VERSION, LDR, SVR, TPR, PPR, ESR, DEADLINE)}
    assert values == {
        BASE: 0xFEE0_0D00, ID: 0, VERSION: 0x5_0014, LDR: 1, SVR: 0xFF, TPR: 0, PPR: 0, ESR: 0, DEADLINE: 0,
    }  # fmt: skip
    assert [apic.rdmsr(lvt) for lvt in range(0x832, 0x838)] == [MASKED] * 6
    assert apic.pending() is None


def test_what_can_be_read_and_written(apic: LocalApic) -> None:
    """Every register of table 11-6 can be read or written as it says; all others are refused."""
    readable = {index for index in MSRS if apic.rdmsr(index) is not None}
    writable = {index for index in MSRS if apic.wrmsr(index, 0)}
    both = {TPR, SVR, ESR, ICR, *range(0x832, 0x838), INITIAL, DIVIDE, DEADLINE}
    assert readable == both | {BASE, ID, VERSION, PPR, LDR, CURRENT} | set(range(ISR, ISR + 24))
    assert writable == both | {EOI, SELF_IPI}


@pytest.mark.parametrize(
    "index, value",
    [(TPR, 0x100), (SVR, 0x200), (EOI, 1), (ESR, 1), (TIMER, 1 << 19), (LINT0, 1 << 17), (SELF_IPI, 256)],
)
def test_reserved_bits_are_refused(apic: LocalApic, index: int, value: int) -> None:
    """A value with reserved bits is refused and changes nothing."""
    before = apic.rdmsr(index)
    assert not apic.wrmsr(index, value)
    assert apic.rdmsr(index) == before


def test_an_interrupt_goes_from_irr_to_isr_to_nothing(apic: LocalApic) -> None:
    """Requested, in service, ended by EOI: the bit is where it should be, and lower classes wait."""
    assert apic.wrmsr(SELF_IPI, 0x41)
    assert (apic.rdmsr(IRR + 2), apic.rdmsr(ISR + 2), apic.rdmsr(PPR)) == (2, 0, 0)
    assert take(apic) == 0x41
    assert (apic.rdmsr(IRR + 2), apic.rdmsr(ISR + 2), apic.rdmsr(PPR)) == (0, 2, 0x40)
    apic.wrmsr(SELF_IPI, 0x4F)
    assert apic.pending() is None
    apic.wrmsr(SELF_IPI, 0x50)
    assert take(apic) == 0x50
    apic.wrmsr(EOI, 0)
    assert apic.rdmsr(ISR + 2) == 2
    apic.wrmsr(EOI, 0)
    assert take(apic) == 0x4F


def test_tpr_holds_back_its_class_and_those_below(apic: LocalApic) -> None:
    """An interrupt needs a class above that of TPR."""
    apic.wrmsr(SELF_IPI, 0x4F)
    apic.wrmsr(TPR, 0x40)
    assert (apic.pending(), apic.rdmsr(PPR)) == (None, 0x40)
    apic.wrmsr(TPR, 0x3F)
    assert apic.pending() == 0x4F


@pytest.mark.parametrize(
    "icr, arrives",
    [
        (0x41, True), (1 << 32 | 0x41, False), (0xFFFF_FFFF << 32 | 0x41, True), (1 << 32 | 1 << 11 | 0x41, True),
        (2 << 32 | 1 << 11 | 0x41, False), (1 << 18 | 0x41, True), (2 << 18 | 0x41, True), (3 << 18 | 0x41, False),
        (4 << 8 | 0x41, False), (5 << 8 | 0x41, False),
    ],
)  # fmt: skip
def test_messages_by_icr(apic: LocalApic, icr: int, arrives: bool) -> None:
    """A fixed interrupt arrives if its destination or shorthand includes processor 0; NMI and INIT do not."""
    assert apic.wrmsr(ICR, icr)
    assert apic.rdmsr(ICR) == icr
    assert apic.pending() == (0x41 if arrives else None)


def test_illegal_vectors_are_an_error(apic: LocalApic) -> None:
    """A vector below 16 is not requested; ESR shows it after a write, and the error interrupt comes."""
    apic.wrmsr(ERROR, 0xFE)
    apic.wrmsr(SELF_IPI, 15)
    assert apic.rdmsr(ESR) == 0
    apic.wrmsr(ESR, 0)
    assert apic.rdmsr(ESR) == 0x40
    assert take(apic) == 0xFE
    apic.wrmsr(ESR, 0)
    assert apic.rdmsr(ESR) == 0


def test_disabling_masks_the_lvt(apic: LocalApic) -> None:
    """Without SVR's enable bit the LVT is masked and stays so, and nothing is pending."""
    apic.wrmsr(TIMER, 0x40)
    apic.wrmsr(SELF_IPI, 0x41)
    apic.wrmsr(SVR, 0xFF)
    apic.wrmsr(LINT0, 0x700)
    assert (apic.rdmsr(TIMER), apic.rdmsr(LINT0), apic.pending()) == (MASKED | 0x40, MASKED | 0x700, None)


def test_one_shot(apic: LocalApic, clock: VirtualClock) -> None:
    """The count goes down every 40 ns, interrupts once at 0, and stays there."""
    apic.wrmsr(TIMER, 0x40)
    apic.wrmsr(INITIAL, 100)
    assert apic.next_event() == clock.ns + 100 * COUNT_NS
    clock.advance(30 * COUNT_NS + 1)
    assert (apic.rdmsr(CURRENT), apic.pending()) == (70, None)
    clock.advance(70 * COUNT_NS - 1)
    apic.expire()
    assert (take(apic), apic.rdmsr(CURRENT), apic.next_event()) == (0x40, 0, None)
    clock.advance(1000 * COUNT_NS)
    apic.expire()
    assert apic.rdmsr(IRR + 2) == 0


@pytest.mark.parametrize("divide, by", [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1)])
def test_the_divide_configuration(apic: LocalApic, clock: VirtualClock, divide: int, by: int) -> None:
    """The eight dividers of the SDM."""
    apic.wrmsr(TIMER, 0x40)
    apic.wrmsr(DIVIDE, divide)
    apic.wrmsr(INITIAL, 10)
    assert apic.next_event() == clock.ns + 10 * COUNT_NS * by


def test_periodic(apic: LocalApic, clock: VirtualClock) -> None:
    """It interrupts every period in step with its start; periods that were missed give one interrupt."""
    apic.wrmsr(TIMER, PERIODIC | 0x40)
    apic.wrmsr(INITIAL, 100)
    start, period = clock.ns, 100 * COUNT_NS
    clock.advance(period)
    apic.expire()
    assert (take(apic), apic.next_event()) == (0x40, start + 2 * period)
    clock.advance(3 * period + period // 2)
    apic.expire()
    assert (apic.rdmsr(IRR + 2), apic.next_event()) == (1, start + 5 * period)
    assert apic.rdmsr(CURRENT) == 50
    apic.wrmsr(INITIAL, 0)
    assert apic.next_event() is None


def test_tsc_deadline(apic: LocalApic, clock: VirtualClock) -> None:
    """It interrupts once when the TSC has come to the deadline, which then reads 0; one in the past does at once."""
    apic.wrmsr(DEADLINE, 5)
    assert apic.rdmsr(DEADLINE) == 0  # not in this mode
    apic.wrmsr(TIMER, TSC_DEADLINE | 0x40)
    deadline = apic.tsc() + 1000
    apic.wrmsr(INITIAL, 1)
    apic.wrmsr(DEADLINE, deadline)
    assert (apic.rdmsr(DEADLINE), apic.rdmsr(CURRENT)) == (deadline, 0)
    clock.advance(apic.next_event() - clock.ns - 1)  # type: ignore[operator]
    apic.expire()
    assert apic.pending() is None
    clock.advance(1)
    apic.expire()
    assert apic.tsc() == deadline
    assert (take(apic), apic.rdmsr(DEADLINE), apic.next_event()) == (0x40, 0, None)
    apic.wrmsr(EOI, 0)
    apic.wrmsr(DEADLINE, 1)
    assert apic.pending() == 0x40


def test_a_change_of_mode_disarms(apic: LocalApic) -> None:
    """To TSC deadline mode and back: the timer stands still after each."""
    apic.wrmsr(TIMER, 0x40)
    apic.wrmsr(INITIAL, 100)
    apic.wrmsr(TIMER, TSC_DEADLINE | 0x40)
    assert apic.next_event() is None
    apic.wrmsr(DEADLINE, 1 << 62)
    apic.wrmsr(TIMER, 0x40)
    assert (apic.next_event(), apic.rdmsr(DEADLINE)) == (None, 0)


def test_a_masked_timer_counts_and_does_not_interrupt(apic: LocalApic, clock: VirtualClock) -> None:
    """The kernel may calibrate with a masked timer."""
    apic.wrmsr(TIMER, MASKED | 0x40)
    apic.wrmsr(INITIAL, 100)
    clock.advance(60 * COUNT_NS)
    assert (apic.rdmsr(CURRENT), apic.next_event()) == (40, None)
    clock.advance(60 * COUNT_NS)
    assert (apic.rdmsr(CURRENT), apic.pending()) == (0, None)
