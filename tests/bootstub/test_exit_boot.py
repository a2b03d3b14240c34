"""Leaving boot services: stale keys, a map that grows, more than 128 entries, unaccepted memory in every shape."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from firmware.memory_descriptor import MemoryDescriptor
from guest.errors import GuestPanic
from guest.gates import CallGate, CallGates
from guest.trace import ServiceCall
from tdx.events import TdCall, TdVmCall

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LOADER_DATA, RUNTIME_DATA, CONVENTIONAL, ACPI_NVS, UNACCEPTED = 2, 6, 7, 10, 15
E820_TYPES = {0: 2, 1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 1, 8: 5, 9: 3, 10: 4, 11: 2, 12: 2, 13: 2, 14: 7, 15: 1}


class MeddledGates:
    """The machine's call gates; ``before`` sees every call first, with a way to call services itself."""

    def __init__(self, gates: CallGates, before: Callable[[CallGate], None]) -> None:
        self._gates, self._before = gates, before

    def call(self, address: int, *args: int) -> int:
        self._before(self._gates.at(address))
        return self._gates.call(address, *args)


def meddle_at_exit(boot, *works: Callable[[Callable[[int], None]], None]) -> None:
    """Before the first, second ... ExitBootServices() run the works, as event handlers of the firmware would.

    Each gets an ``allocate(memory type)``, which takes a page.
    """
    gates = boot.machine.gates
    left = list(works)

    def allocate(memory_type: int) -> None:
        assert boot.firmware_map.allocate(memory_type, 1, 1 << 52) is not None

    def before(gate: CallGate) -> None:
        if gate.name == "ExitBootServices" and left:
            left.pop(0)(allocate)

    boot.machine.gates = MeddledGates(gates, before)


def last_calls(boot, count: int) -> list[tuple[str, int]]:
    """Name and status of the stub's last calls."""
    events = [r.event for r in boot.trace.records if r.stage == "efi-stub" and isinstance(r.event, ServiceCall)]
    return [(event.service, event.status) for event in events[-count:]]


def descriptors(boot) -> list[tuple[int, int, int]]:
    """(type, start, end) of the map that efi_info names."""
    stride, _, at, size = struct.unpack_from("<4I", boot.physical.read(boot.machine.regs.rsi, 4096), 0x1C8)
    rows = (struct.unpack_from("<I4xQ8xQ", boot.physical.read(at + n, 32)) for n in range(0, size, stride))
    return [(kind, start, start + pages * 4096) for kind, start, pages in rows]


def e820(boot) -> list[tuple[int, int, int]]:
    """(addr, end, type) of e820_table and of its extension, joined."""
    page = boot.boot_params
    table = page[0x2D0 : 0x2D0 + 20 * page[0x1E8]]
    node = struct.unpack_from("<Q", page, 0x250)[0]
    if node:
        following, kind, size = struct.unpack("<QII", boot.physical.read(node, 16))
        assert (following, kind) == (0, 1)
        table += boot.physical.read(node + 16, size)
    return [(addr, addr + size, kind) for addr, size, kind in struct.iter_unpack("<QQI", table)]


def translated(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """A map as e820, in its order: an entry grows while the next descriptor touches it and has its type."""
    out: list[tuple[int, int, int]] = []
    for efi_type, start, end in rows:
        kind = E820_TYPES.get(efi_type)
        if kind is None:
            continue
        if out and out[-1][1:] == (start, kind):
            out[-1] = (out[-1][0], end, kind)
        else:
            out.append((start, end, kind))
    return out


def given_map(*rows: tuple[int, int, int]) -> dict[str, object]:
    rows = ((CONVENTIONAL, 0x1000, 0xA0000), (CONVENTIONAL, MIB, GIB), *rows)
    return {"efi_map": tuple(MemoryDescriptor.of_range(*row, 0xF) for row in rows)}


def accepts(boot) -> list[tuple[int, int]]:
    """[start, end) of the ranges that the stub asked the host to make private, all of which it accepted."""
    events = [record.event for record in boot.trace.records if record.stage == "efi-stub"]
    assert all(event.status == 0 for event in events if isinstance(event, TdCall) and event.rcx & 7 == 0)
    return [(event.r12, event.r12 + event.r13) for event in events if isinstance(event, TdVmCall)]


@pytest.mark.parametrize("memory", [128 * MIB, 4 * GIB, 64 * GIB, 5 * GIB + 12 * KIB])
def test_e820_is_the_translated_map(new_boot, memory):
    """e820 is the final memory map, descriptor by descriptor, in its order."""
    boot = new_boot("efi-stub", memory=memory)
    assert e820(boot) == translated(descriptors(boot))


def test_a_stale_key_is_tried_once_more(new_boot):
    """If the map changed, it is read again into the same buffer, nothing is allocated, and the second try succeeds."""
    boot = new_boot("firmware")
    meddle_at_exit(boot, lambda allocate: allocate(RUNTIME_DATA))
    boot.run("efi-stub")
    assert last_calls(boot, 3) == [
        ("ExitBootServices", 1 << 63 | 2), ("GetMemoryMap", 0), ("ExitBootServices", 0),
    ]  # fmt: skip
    final = descriptors(boot)
    assert sum(kind == RUNTIME_DATA for kind, _, _ in final) == 4  # three of the firmware's, and ours
    assert e820(boot) == translated(final)
    at = struct.unpack_from("<I", boot.boot_params, 0x1D0)[0] - 40  # struct efi_boot_memmap
    map_size, stride, version, _, buffer_size = struct.unpack("<QQI4xQQ", boot.physical.read(at, 40))
    assert (map_size, stride, version) == (len(final) * 48, 48, 1)
    assert buffer_size == map_size - 48 + 8 * 48  # sized before the stub's own allocation and ours split the map


def test_two_stale_keys_in_a_row_stop_the_stub(new_boot):
    """There is no third try."""
    boot = new_boot("firmware")
    meddle_at_exit(boot, *[lambda allocate: allocate(RUNTIME_DATA)] * 3)
    with pytest.raises(GuestPanic, match="EFI stub: ERROR: failed, status 0x8000000000000002"):
        boot.run("efi-stub")
    assert last_calls(boot, 3) == [
        ("ExitBootServices", 1 << 63 | 2), ("GetMemoryMap", 0), ("ExitBootServices", 1 << 63 | 2),
    ]  # fmt: skip
    assert boot.boot_params is None


def test_a_map_that_outgrows_its_buffer_stops_the_stub(new_boot):
    """More new descriptors than the slack of 8: the second GetMemoryMap() says EFI_BUFFER_TOO_SMALL."""
    boot = new_boot("firmware")
    meddle_at_exit(boot, lambda allocate: [allocate(kind) for kind in (RUNTIME_DATA, LOADER_DATA) * 6])
    with pytest.raises(GuestPanic, match="EFI stub: ERROR: failed, status 0x8000000000000005"):
        boot.run("efi-stub")
    assert last_calls(boot, 1) == [("GetMemoryMap", 1 << 63 | 5)]


def alternating(count: int, start: int) -> list[tuple[int, int, int]]:
    """``count`` neighbours of 64 KiB, conventional and ACPI NVS in turn."""
    step = 64 * KIB
    return [((CONVENTIONAL, ACPI_NVS)[n % 2], start + n * step, start + (n + 1) * step) for n in range(count)]


def test_more_than_128_entries(new_boot):
    """128 entries stand in boot_params, the rest in setup_data, and the kernel prints the extended map."""
    boot = new_boot("setup-arch", **given_map(*alternating(200, 2 * GIB), (UNACCEPTED, 4 * GIB, 5 * GIB)))
    final = descriptors(boot)
    entries = e820(boot)
    assert boot.boot_params[0x1E8] == 128
    assert entries == translated(final)
    assert len(entries) > 200
    assert (4 * GIB, 5 * GIB, 1) in entries[128:]
    lines = [line for line in log(boot) if line.startswith("extended: ")]
    assert len(lines) == len(entries)  # sorted and touching by type already
    assert "extended: [mem 0x0000000080c70000-0x0000000080c7ffff] ACPI NVS" in lines
    assert "extended: [mem 0x0000000100000000-0x000000013fffffff] usable" in lines
    assert boot.kernel.max_pfn == 5 * GIB >> 12


def log(boot) -> list[str]:
    return [r.event.text for r in boot.trace.records if r.stage == "setup-arch" and hasattr(r.event, "text")]


@pytest.mark.parametrize(("count", "room"), [(100, None), (170, True)])
def test_room_for_the_extension(new_boot, count, room):
    """The extension is allocated if the map of that moment has more than 128 - 8 descriptors."""
    boot = new_boot("efi-stub", **given_map(*alternating(count, 2 * GIB)))
    events = [r.event for r in boot.trace.records if r.stage == "efi-stub" and isinstance(r.event, ServiceCall)]
    sizes = [event.args[1] for event in events if event.service == "AllocatePool"]
    assert len(sizes) == (4 if room else 3)  # command line, map, extension, map
    if room:
        then = len(descriptors(boot)) - 2  # the extension's own and the last map's came later
        assert sizes[2] == 16 + 20 * (then - 128 + 8)


@pytest.mark.parametrize(
    ("rows", "accepted", "bits"),
    [
        ([(4 * GIB, 4 * GIB + 4 * MIB - 4 * KIB)], [(4 * GIB, 4 * GIB + 4 * MIB - 4 * KIB)], []),
        ([(4 * GIB, 4 * GIB + 4 * MIB)], [], [(2048, 2050)]),
        (
            [(4 * GIB + 4 * KIB, 5 * GIB + 12 * KIB)],
            [(4 * GIB + 4 * KIB, 4 * GIB + 2 * MIB), (5 * GIB, 5 * GIB + 12 * KIB)],
            [(2049, 2560)],
        ),
        (  # neighbours are not joined first: 2 MiB and 2 MiB are accepted, in map order
            [(5 * GIB, 5 * GIB + 2 * MIB), (4 * GIB, 4 * GIB + 2 * MIB), (4 * GIB + 2 * MIB, 4 * GIB + 4 * MIB)],
            [(5 * GIB, 5 * GIB + 2 * MIB), (4 * GIB, 4 * GIB + 2 * MIB), (4 * GIB + 2 * MIB, 4 * GIB + 4 * MIB)],
            [],
        ),
    ],
)
def test_unaccepted_descriptors(new_boot, rows, accepted, bits):
    """What the bitmap cannot describe is accepted, piece by piece; the rest has its bits set and stays unaccepted."""
    boot = new_boot("efi-stub", **given_map(*((UNACCEPTED, *row) for row in rows)))
    assert accepts(boot) == accepted
    bitmap = int.from_bytes(boot.physical.read(struct.unpack_from("<Q", boot.boot_params, 0x78)[0], 4096), "little")
    assert bitmap == sum((1 << last) - (1 << first) for first, last in bits)
    assert [list(boot.sept.mapped(*row)) for row in accepted] == [[row] for row in accepted]
    assert not any(boot.sept.mapped(first << 21, last << 21) for first, last in bits)


def test_every_efi_type_in_e820(new_boot):
    """Each memory type becomes the e820 type of the table in the facts; OEM and OS loader types are left out."""
    kinds = [*(k for k in range(16) if k != UNACCEPTED), 16, 0x7000_0001, 0x8000_0001]
    rows = [(kind, 2 * GIB + n * 2 * MIB, 2 * GIB + n * 2 * MIB + MIB) for n, kind in enumerate(kinds)]
    boot = new_boot("efi-stub", **given_map(*rows))
    found = {addr: kind for addr, _, kind in e820(boot)}
    assert [found.get(start) for _, start, _ in rows] == [2, 1, 1, 1, 1, 2, 2, 1, 5, 3, 4, 2, 2, 2, 7] + [None] * 3
