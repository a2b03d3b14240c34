"""Mainline's table of unaccepted memory, in the stub."""

import pytest

from bootstub.unaccepted_table import EFI_UNACCEPTED_MEMORY, UnacceptedTable
from guest.bitmap import GuestBitmap
from guest.memory import GuestMemory, PhysicalMemory
from guest.trace import Trace

SZ_4K, SZ_2M, SZ_4G = 1 << 12, 1 << 21, 1 << 32
TABLE = 0x10_0000


class Everything:
    """A platform that admits every access."""

    def admit(self, gpa, size, kind):
        return 0, 1 << 52


@pytest.fixture
def memory():
    from guest.clock import VirtualClock

    return GuestMemory(PhysicalMemory(), Everything(), Trace(VirtualClock()))


@pytest.fixture
def table(memory):
    """64 units of 2 MiB from 4 GiB on, none of them unaccepted."""
    return UnacceptedTable(GuestBitmap(memory, TABLE + EFI_UNACCEPTED_MEMORY.sizeof()), SZ_2M, SZ_4G, 8)


def units(table):
    """The set bits, as runs."""
    return list(table.bitmap.runs(0, table.size * 8))


def test_header_in_memory(memory):
    """The header has 24 bytes: version and unit_size of 4 bytes, phys_base and size of 8; the bitmap follows."""
    fields = {"version": 1, "unit_size": SZ_2M, "phys_base": SZ_4G, "size": 8}
    data = EFI_UNACCEPTED_MEMORY.build(fields)
    assert data == bytes.fromhex("01000000 00002000 0000000001000000 0800000000000000")
    memory.write(TABLE, data)
    table = UnacceptedTable.at(memory, TABLE)
    assert (table.unit_size, table.phys_base, table.size, table.bitmap.gpa) == (SZ_2M, SZ_4G, 8, TABLE + 24)
    assert table.end == SZ_4G + 64 * SZ_2M


@pytest.mark.parametrize(
    ("start", "end", "accepted", "bits"),
    [
        (0, 2 * SZ_2M, [], [(0, 2)]),
        (0, 2 * SZ_2M - SZ_4K, [(0, 2 * SZ_2M - SZ_4K)], []),
        (SZ_4K, 4 * SZ_2M + SZ_4K, [(SZ_4K, SZ_2M), (4 * SZ_2M, 4 * SZ_2M + SZ_4K)], [(1, 4)]),
        (-4 * SZ_2M, 2 * SZ_2M, [(-4 * SZ_2M, 0)], [(0, 2)]),
        (-4 * SZ_2M, -2 * SZ_2M, [(-4 * SZ_2M, -2 * SZ_2M)], []),
        (62 * SZ_2M, 66 * SZ_2M, [(64 * SZ_2M, 66 * SZ_2M)], [(62, 64)]),
    ],
    ids=["whole units", "below two units", "edges", "across the base", "below the base", "across the end"],
)
def test_process(table, start, end, accepted, bits):
    """What the bitmap cannot describe is accepted at once; the bits of the rest are set."""
    ranges = []
    table.process(lambda low, high: ranges.append((low - SZ_4G, high - SZ_4G)), SZ_4G + start, SZ_4G + end)
    assert (ranges, units(table)) == (accepted, bits)


def test_a_range_behind_the_bitmap_is_accepted_from_the_bitmap_on(table):
    """6.12 accepts the gap before such a range too, which is another's memory or none."""
    ranges = []
    table.process(lambda low, high: ranges.append((low, high)), table.end + 8 * SZ_2M, table.end + 12 * SZ_2M)
    assert (ranges, units(table)) == ([(table.end, table.end + 12 * SZ_2M)], [])


def test_accept_has_no_guard(table):
    """accept_memory() of the boot stage takes the units that a range touches, and not the one behind."""
    table.bitmap.set(0, 8)
    ranges = []
    table.accept_memory(lambda low, high: ranges.append((low - SZ_4G, high - SZ_4G)), SZ_4G + SZ_2M + 1, SZ_2M)
    assert (ranges, units(table)) == ([(SZ_2M, 3 * SZ_2M)], [(0, 1), (3, 8)])
    table.accept_memory(lambda low, high: ranges.append((low, high)), table.end, 1 << 30)
    table.accept_memory(lambda low, high: ranges.append((low, high)), 0, SZ_4G)
    assert len(ranges) == 1
