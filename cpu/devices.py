"""The devices that a kernel finds at I/O ports: a 16550 UART, a CMOS clock, a timer that stands still, nothing else.

Ports without a device read as all ones, as on a PC bus. Sources: PC16550D data sheet; MC146818A data sheet; 8254 data
sheet.
"""

from __future__ import annotations

from collections.abc import Callable

UART_BASE = 0x3F8
_THR, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)
_LCR_DLAB = 1 << 7
_LSR_THRE_TEMT = 0x60
_IER_THRI = 1 << 1
_IIR_NONE, _IIR_THRI = 1, 2
_IIR_FIFO = 0xC0
_MCR_LOOP = 1 << 4
_CMOS_INDEX, _CMOS_DATA = 0x70, 0x71
_TIMER = range(0x40, 0x44)
"""Its counters read 0. All ones would be a counter at its start, which a kernel reads 100,000 times to see it move."""
_DATE = {0x00: 0x00, 0x02: 0x00, 0x04: 0x12, 0x06: 0x05, 0x07: 0x30, 0x08: 0x03, 0x09: 0x23, 0x32: 0x20}
"""2023-03-30 12:00:00 by register of the clock, binary coded decimal."""


class Uart:
    """A 16550A that sends at once.

    ``put`` gets each complete line, without its end; bytes that are no UTF-8 read ``\\xff``, so that none is lost.
    """

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put
        self._line = bytearray()
        self._registers = [0] * 8
        self._divisor = [1, 0]
        self._fifo = False
        self._thre = False
        """The transmitter has become empty since IIR last said so."""

    def read(self, register: int) -> int:
        """The value of a register, 0 to 7."""
        if register in (_THR, _IER) and self._registers[_LCR] & _LCR_DLAB:
            return self._divisor[register]
        if register == _THR:
            return 0
        if register == _IIR:
            return self._identify() | (_IIR_FIFO if self._fifo else 0)
        if register == _LSR:
            return _LSR_THRE_TEMT
        if register == _MSR:
            modem = self._registers[_MCR]
            loop = (modem & 1) << 5 | (modem & 2) << 3 | (modem & 4) << 4 | (modem & 8) << 4
            return loop if modem & _MCR_LOOP else 0xB0
        return self._registers[register]

    def write(self, register: int, value: int) -> None:
        """Write a register, 0 to 7; the transmit register sends."""
        if register in (_THR, _IER) and self._registers[_LCR] & _LCR_DLAB:
            self._divisor[register] = value
        elif register == _THR:
            self._send(value)
        elif register == _IIR:
            self._fifo = bool(value & 1)
        elif register not in (_LSR, _MSR):
            self._thre |= register == _IER and bool(value & ~self._registers[_IER] & _IER_THRI)
            self._registers[register] = value

    def _identify(self) -> int:
        """The interrupt that is pending: at most that of the empty transmitter, and reading it ends it."""
        if not (self._thre and self._registers[_IER] & _IER_THRI):
            return _IIR_NONE
        self._thre = False
        return _IIR_THRI

    def _send(self, value: int) -> None:
        self._thre = True
        if self._registers[_MCR] & _MCR_LOOP:
            return
        if value == 0x0A:
            self._put(self._line.removesuffix(b"\r").decode("utf-8", errors="backslashreplace"))
            self._line.clear()
        else:
            self._line.append(value)


class Cmos:
    """A real-time clock that stands still at a fixed date, so that runs repeat: 2023-03-30 12:00:00."""

    def __init__(self) -> None:
        self._index = 0
        self._registers = _DATE | {0x0A: 0x26, 0x0B: 0x02, 0x0C: 0x00, 0x0D: 0x80}

    def select(self, index: int) -> None:
        """Choose the register that the data port shows."""
        self._index = index & 0x7F

    def read(self) -> int:
        """The chosen register; one that was never written reads 0."""
        return self._registers.get(self._index, 0)

    def write(self, value: int) -> None:
        """Write the chosen register; the date does not change."""
        if self._index not in _DATE:
            self._registers[self._index] = value


class Devices:
    """The I/O ports."""

    def __init__(self, put: Callable[[str], None]) -> None:
        self.uart = Uart(put)
        self.cmos = Cmos()
        self.latches: dict[int, int] = {}
        """Ports that read as what was last written to them, and this; none by default."""

    def read(self, port: int, size: int) -> int:
        """Value of an IN of ``size`` bytes."""
        if UART_BASE <= port < UART_BASE + 8:
            return self.uart.read(port - UART_BASE)
        if port == _CMOS_DATA:
            return self.cmos.read()
        if port in _TIMER:
            return 0
        return self.latches.get(port, (1 << 8 * size) - 1)

    def write(self, port: int, size: int, value: int) -> None:
        """Effect of an OUT of ``size`` bytes."""
        if UART_BASE <= port < UART_BASE + 8:
            self.uart.write(port - UART_BASE, value & 0xFF)
        elif port == _CMOS_INDEX:
            self.cmos.select(value & 0xFF)
        elif port == _CMOS_DATA:
            self.cmos.write(value & 0xFF)
        elif port in self.latches:
            self.latches[port] = value & 0xFF
