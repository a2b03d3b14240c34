"""A local APIC in x2APIC mode, as the one processor of a TD has it: its registers as MSRs, and its timer.

It knows nothing of who reads and writes, guest or host, nor of how an interrupt enters the guest. Time is what the
machine's clock says when it is asked. Left out: messages to other processors, NMI, SMI and INIT, which ICR takes and
forgets, and level-triggered interrupts, as there is no I/O APIC. Source: SDM volume 3, chapter 11.
"""

from __future__ import annotations

from guest.clock import VirtualClock
from guest.units import U32_MAX
from tdx.cpuid import CRYSTAL_HZ, TSC_HZ

MSR_APIC_BASE, MSR_TSC_DEADLINE = 0x1B, 0x6E0
MSRS = frozenset({MSR_APIC_BASE, MSR_TSC_DEADLINE, *range(0x800, 0x840)})
"""All MSRs that the APIC answers for; those that it has not got are refused."""

_ID, _VERSION, _TPR, _PPR, _EOI, _LDR, _SVR = 0x802, 0x803, 0x808, 0x80A, 0x80B, 0x80D, 0x80F
_ISR, _TMR, _IRR, _ESR, _ICR = 0x810, 0x818, 0x820, 0x828, 0x830
_LVT_TIMER, _LVT_ERROR = 0x832, 0x837
_INITIAL_COUNT, _CURRENT_COUNT, _DIVIDE, _SELF_IPI = 0x838, 0x839, 0x83E, 0x83F

_BASE_AND_FLAGS = 0xFEE0_0000 | 1 << 11 | 1 << 10 | 1 << 8  # EN, EXTD, BSP
_VERSION_AND_MAX_LVT = 5 << 16 | 0x14
_SVR_ENABLE, _SVR_WRITABLE = 1 << 8, 0x1FF
_LVT_MASKED, _LVT_DELIVERY_STATUS = 1 << 16, 1 << 12
_LVT_WRITABLE = {
    0x832: 0x7_00FF,  # timer
    0x833: 0x1_07FF,  # thermal
    0x834: 0x1_07FF,  # performance counters
    0x835: 0x1_A7FF,  # LINT0
    0x836: 0x1_A7FF,  # LINT1
    0x837: 0x1_00FF,  # error
}
_ICR_FIXED_MODES, _ICR_DELIVERY_MODE, _ICR_SELF, _ICR_ALL = (0, 1), 7 << 8, (1, 2), 0xFFFF_FFFF
_LOGICAL_ID = 1
_FIRST_VECTOR, _ERROR_RECEIVED_ILLEGAL = 16, 1 << 6
_ONE_SHOT, _PERIODIC, _TSC_DEADLINE = range(3)
_NS = 1_000_000_000


class LocalApic:
    """The APIC of processor 0, switched on by firmware, software-disabled as after reset.

    ``tsc_start`` is the time stamp counter when the machine's clock began.
    """

    def __init__(self, clock: VirtualClock, tsc_start: int = 0) -> None:
        self._clock, self._tsc_start = clock, tsc_start
        self._irr = self._isr = 0
        """Bit n stands for vector n."""
        self._registers = {_TPR: 0, _SVR: 0xFF, _ESR: 0, _ICR: 0, _INITIAL_COUNT: 0, _DIVIDE: 0}
        self._registers |= dict.fromkeys(_LVT_WRITABLE, _LVT_MASKED)
        self._errors = 0
        self._due: int | None = None
        """When the timer expires, in ns of the clock."""
        self._tsc_deadline = 0

    # Registers

    def rdmsr(self, index: int) -> int | None:
        """The value of a register; None if it has no such register, or none to read."""
        self.expire()
        if index in self._registers:
            return self._registers[index]
        for first, bits in ((_ISR, self._isr), (_TMR, 0), (_IRR, self._irr)):
            if first <= index < first + 8:
                return bits >> 32 * (index - first) & U32_MAX
        fixed = {MSR_APIC_BASE: _BASE_AND_FLAGS, _ID: 0, _VERSION: _VERSION_AND_MAX_LVT, _LDR: _LOGICAL_ID}
        if index in fixed:
            return fixed[index]
        if index == _PPR:
            return self._priority()
        if index == _CURRENT_COUNT:
            return self._current_count()
        return self._tsc_deadline if index == MSR_TSC_DEADLINE else None

    def wrmsr(self, index: int, value: int) -> bool:
        """Write a register; False if there is none to write, or if the value has reserved bits."""
        self.expire()
        if index == MSR_TSC_DEADLINE:
            self._write_tsc_deadline(value)
            return True
        if index == _ICR:
            return self._send(value)
        if index in _LVT_WRITABLE:
            return self._write_lvt(index, value)
        limits = {_TPR: 0xFF, _SVR: _SVR_WRITABLE, _DIVIDE: 0xB, _SELF_IPI: 0xFF, _INITIAL_COUNT: U32_MAX}
        if value > limits.get(index, 0):
            return False
        return self._write_plain(index, value)

    def _write_plain(self, index: int, value: int) -> bool:
        if index == _EOI:
            self._isr &= ~(1 << _highest(self._isr)) if self._isr else 0
        elif index == _ESR:
            self._registers[_ESR], self._errors = self._errors, 0
        elif index == _SELF_IPI:
            self._accept(value)
        elif index == _INITIAL_COUNT:
            self._write_initial_count(value)
        elif index == _DIVIDE:
            self._change_divide(value)
        elif index in (_TPR, _SVR):
            self._registers[index] = value
            if not self._enabled:
                self._registers |= {lvt: self._registers[lvt] | _LVT_MASKED for lvt in _LVT_WRITABLE}
        else:
            return False
        return True

    def _write_lvt(self, index: int, value: int) -> bool:
        if value & ~(_LVT_WRITABLE[index] | _LVT_DELIVERY_STATUS):
            return False
        before = self._timer_mode
        self._registers[index] = value & _LVT_WRITABLE[index] | (0 if self._enabled else _LVT_MASKED)
        if (before == _TSC_DEADLINE) != (self._timer_mode == _TSC_DEADLINE):
            self._due, self._tsc_deadline = None, 0
        return True

    def _send(self, value: int) -> bool:
        """ICR: a fixed or lowest-priority interrupt for this processor arrives; all else is lost."""
        self._registers[_ICR] = value & ~_LVT_DELIVERY_STATUS
        shorthand, destination, logical = value >> 18 & 3, value >> 32, value >> 11 & 1
        mine = bool(destination & _LOGICAL_ID) if logical else destination == 0
        to_me = shorthand in _ICR_SELF or (shorthand == 0 and (mine or destination == _ICR_ALL))
        if to_me and (value & _ICR_DELIVERY_MODE) >> 8 in _ICR_FIXED_MODES:
            self._accept(value & 0xFF)
        return True

    @property
    def _enabled(self) -> bool:
        return bool(self._registers[_SVR] & _SVR_ENABLE)

    # Interrupts

    def pending(self) -> int | None:
        """The vector that the processor would take now if it took interrupts."""
        if not self._irr or not self._enabled:
            return None
        vector = _highest(self._irr)
        return vector if vector >> 4 > self._priority() >> 4 else None

    def acknowledge(self, vector: int) -> None:
        """The processor takes ``vector``: from now on, until EOI, it is in service."""
        self._irr &= ~(1 << vector)
        self._isr |= 1 << vector

    def _priority(self) -> int:
        """PPR: the higher of TPR and the class of what is in service."""
        in_service = _highest(self._isr) & 0xF0 if self._isr else 0
        tpr = self._registers[_TPR]
        return tpr if tpr >> 4 >= in_service >> 4 else in_service

    def _accept(self, vector: int) -> None:
        if not self._enabled:
            return
        if vector >= _FIRST_VECTOR:
            self._irr |= 1 << vector
            return
        self._errors |= _ERROR_RECEIVED_ILLEGAL
        error = self._registers[_LVT_ERROR]
        if not error & _LVT_MASKED and error & 0xFF >= _FIRST_VECTOR:
            self._irr |= 1 << (error & 0xFF)

    # Timer

    def tsc(self) -> int:
        """The time stamp counter."""
        return self._tsc_start + self._clock.ns * TSC_HZ // _NS

    def next_event(self) -> int | None:
        """When the timer will interrupt, in ns of the clock; None if it will not."""
        return None if self._registers[_LVT_TIMER] & _LVT_MASKED else self._due

    def expire(self) -> None:
        """Let the timer interrupt if its time has come; a periodic one that was missed does so once."""
        if self._due is None or self._clock.ns < self._due:
            return
        if self._timer_mode == _PERIODIC:
            period = self._registers[_INITIAL_COUNT] * self._count_ns
            self._due += ((self._clock.ns - self._due) // period + 1) * period
        else:
            self._due, self._tsc_deadline = None, 0
        if not self._registers[_LVT_TIMER] & _LVT_MASKED:
            self._accept(self._registers[_LVT_TIMER] & 0xFF)

    @property
    def _timer_mode(self) -> int:
        return self._registers[_LVT_TIMER] >> 17 & 3

    @property
    def _count_ns(self) -> int:
        """Time of one count: the crystal's frequency, divided by 2, 4, ..., 128, 1."""
        divide = self._registers[_DIVIDE]
        return _NS // CRYSTAL_HZ << ((divide & 3 | divide >> 1 & 4) + 1 & 7)

    def _current_count(self) -> int:
        if self._due is None or self._timer_mode == _TSC_DEADLINE:
            return 0
        return -((self._clock.ns - self._due) // self._count_ns)

    def _write_initial_count(self, value: int) -> None:
        if self._timer_mode == _TSC_DEADLINE:
            return
        self._registers[_INITIAL_COUNT] = value
        self._due = self._clock.ns + value * self._count_ns if value else None

    def _change_divide(self, value: int) -> None:
        left = self._current_count()
        self._registers[_DIVIDE] = value
        if left:
            self._due = self._clock.ns + left * self._count_ns

    def _write_tsc_deadline(self, value: int) -> None:
        if self._timer_mode == _TSC_DEADLINE:
            self._tsc_deadline = value
            self._due = -((self._tsc_start - value) * _NS // TSC_HZ) if value else None
            self.expire()


def _highest(bits: int) -> int:
    return bits.bit_length() - 1
