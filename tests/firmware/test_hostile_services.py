"""Any service with any arguments: a status, or the guest's end, and never anything else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from guest.errors import BootError
from tests.firmware.conftest import BOOT_SERVICES, RUNTIME_SERVICES, SCRATCH, build_efi

NAMES = st.sampled_from([*BOOT_SERVICES, *RUNTIME_SERVICES])
HANDLES = [0, 1, 2, 3, 4, 8]
PLACES = [SCRATCH + 0x100 * n for n in range(12)]
EDGES = [0x1000, 1 << 32, (1 << 52) - 1, 1 << 52, 1 << 63, (1 << 64) - 8, (1 << 64) - 1, 5 << 30, 0x8000_0000 - 4]
FLAGS = [7, 0x10, 0x20, 0x200, 0x201, 0x8000_0200, 0x6000_0202]
ARGUMENTS = st.lists(st.sampled_from(HANDLES + PLACES + EDGES + FLAGS), min_size=8, max_size=8)
CONTENT = st.binary(min_size=64, max_size=64) | st.sampled_from(
    [bytes(64), b"A\0B\0" + bytes(60), b"\xff" * 64, b"\x04\x03\x14\0" * 16, b"\x7f\xff\x04\0" * 16]
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(NAMES, ARGUMENTS), max_size=60), st.lists(CONTENT, min_size=12, max_size=12))
def test_a_status_or_the_end_of_the_guest(calls, contents) -> None:
    """Pointers to rubbish, to nothing, past the end of memory; numbers of every size; in any order."""
    efi = build_efi(unaccepted=True)
    for place, content in zip(PLACES, contents, strict=True):
        efi.memory.write(place, content)
        efi.memory.write_uint(place + 64, place, 8)
    for name, args in calls:
        table = efi.boot_services if name in BOOT_SERVICES else efi.runtime_services
        gate = efi.machine.gates.at(efi.load(table + (BOOT_SERVICES | RUNTIME_SERVICES)[name]))
        words = iter([*args, 0])
        try:
            status = efi.call(name, *gate.arguments(lambda _, words=words: next(words, 0)))
        except BootError:
            continue  # that guest is dead; what the firmware would do next must be sound all the same
        assert 0 <= status < 1 << 64
