"""I/O ports of the emulated machine that have no test of their own elsewhere."""

from __future__ import annotations

import pytest

from cpu.devices import UART_BASE, Devices


@pytest.mark.parametrize("port", range(0x40, 0x44), ids=hex)
def test_the_timer_stands_still(port: int) -> None:
    """The interval timer reads 0, whatever is written to it, so that a kernel does not wait for it to move."""
    devices = Devices(lambda line: None)
    devices.write(port, 1, 0xB0)
    assert devices.read(port, 1) == 0


@pytest.mark.parametrize("size, value", [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
def test_a_port_without_a_device_reads_as_all_ones(size: int, value: int) -> None:
    """Nothing drives the bus."""
    assert Devices(lambda line: None).read(0x44, size) == value


def test_lines_of_the_uart_come_through_byte_for_byte() -> None:
    """A line ends with CR LF or LF; everything before that is kept: blanks, tabs, CR, escapes, what is no UTF-8."""
    lines: list[str] = []
    devices = Devices(lines.append)
    for byte in "[    0.1] a \t\x1b[1m é \r\r\n\n".encode() + b"\xff\x00\n unfinished":
        devices.write(UART_BASE, 1, byte)
    assert lines == ["[    0.1] a \t\x1b[1m é \r", "", "\\xff\x00"]


def test_a_latch_keeps_what_is_written():
    """A port that is a latch reads as its first value, then as the byte written last; by default there is none."""
    devices = Devices(print)
    devices.write(0x21, 1, 0xFB)
    assert devices.read(0x21, 1) == 0xFF
    devices.latches[0x21] = 0x80
    assert devices.read(0x21, 1) == 0x80
    devices.write(0x21, 1, 0xFB)
    assert devices.read(0x21, 1) == 0xFB


def test_the_uart_reports_its_empty_transmitter_once() -> None:
    """With that interrupt enabled, IIR says so when it is enabled and after each byte, until it has been read."""
    lines: list[str] = []
    devices = Devices(lines.append)
    thr, ier, iir = range(UART_BASE, UART_BASE + 3)
    assert devices.read(iir, 1) == 1
    devices.write(ier, 1, 2)
    assert [devices.read(iir, 1) for _ in range(2)] == [2, 1]
    for byte in b"a\n":
        devices.write(thr, 1, byte)
    devices.write(iir, 1, 1)
    assert [devices.read(iir, 1) for _ in range(2)] == [0xC2, 0xC1]
    assert lines == ["a"]
    devices.write(ier, 1, 0)
    devices.write(thr, 1, 0x0A)
    assert devices.read(iir, 1) == 0xC1
