"""Random places for the kernel, against slow models."""

from hypothesis import given
from hypothesis import strategies as st

from bootstub.events import StubChoice
from bootstub.kaslr import MIX_CONSTANT, boot_seed, build_string, conventional_slots, kaslr_get_random_long
from bootstub.sample_kernel import sample_bzimage
from firmware.memory_descriptor import MemoryDescriptor
from tools.pipeline import Boot, BootConfig

UNIT = 1 << 21
CONVENTIONAL, UNACCEPTED = 7, 15
MORE_RELIABLE, SP, HOT_PLUGGABLE = 1 << 16, 1 << 18, 1 << 20
descriptors = st.lists(
    st.builds(
        lambda kind, start, pages, attribute: MemoryDescriptor(kind, start << 12, pages, attribute),
        st.sampled_from([CONVENTIONAL, CONVENTIONAL, CONVENTIONAL, UNACCEPTED, 2]),
        st.integers(0, 1 << 14),
        st.integers(0, 1 << 13),
        st.sampled_from([0, 0, 0, MORE_RELIABLE, SP, HOT_PLUGGABLE]),
    ),
    max_size=6,
)


def places(memory_map, size, minimum, soft_reserve):
    """Every aligned place for ``size`` bytes, by trying each address."""
    found = []
    for d in memory_map:
        unfit = d.attribute & (HOT_PLUGGABLE | (SP if soft_reserve else 0))
        if d.type != CONVENTIONAL or unfit:
            continue
        for address in range(0, 1 << 27, UNIT):
            if address >= minimum and d.start <= address and address + size <= d.end:
                found.append((address, d))
    mirrored = [place for place in found if place[1].attribute & MORE_RELIABLE]
    return [address for address, _ in mirrored or found]


@given(descriptors, st.integers(1, 1 << 23), st.integers(0, (1 << 32) - 1), st.booleans())
def test_random_slot(memory_map, size, seed, soft_reserve):
    """The seed picks evenly among all aligned places in conventional memory, in the order of the map."""
    minimum = 1 << 24
    wanted = places(memory_map, size, minimum, soft_reserve)
    areas = conventional_slots(memory_map, size, UNIT, minimum, soft_reserve)
    found, virtual = StubChoice(areas, UNIT, size, 0, room=0, given=0, lowest=False).place(lambda: seed)
    assert virtual == minimum
    assert found == (wanted[len(wanted) * seed >> 32] if wanted else None)


def test_random_long_mixes_what_the_processor_has():
    """The seed, RDRAND and TSC are folded, and both halves of the product with the constant are added."""

    class Chance:
        def rdrand(self):
            return 0x1111

        def rdtsc(self):
            return 0x2200

    machine = Boot(BootConfig(sample_bzimage())).machine
    machine.entropy = Chance()
    product = (0xF0000 ^ 0x1111 ^ 0x2200) * MIX_CONSTANT
    assert kaslr_get_random_long(machine, 0xF0000) == (product + (product >> 64)) % (1 << 64)


def test_boot_seed_depends_on_every_byte():
    """The hash covers the build string and all of boot_params."""
    build = build_string(sample_bzimage())
    assert build == b"6.3.0-unaccepted (sample@unaccepted) (no compiler) #1\0"
    page = bytearray(4096)
    plain = boot_seed(build, bytes(page))
    page[4095] = 1
    assert boot_seed(build, bytes(page)) != plain
    assert boot_seed(build.replace(b"6.3.0", b"6.3.1"), bytes(4096)) != plain
