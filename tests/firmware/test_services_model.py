"""AllocatePages(), FreePages(), AllocatePool() and FreePool() in any order, against a model with one type per page."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from firmware.arena import Arena
from firmware.boot_services import EfiServices
from firmware.memory_descriptor import MemoryDescriptor
from firmware.memory_map import MemoryMap
from firmware.system_table import build_system_table
from tests.firmware.conftest import Efi, build_lab

PAGE = 0x1000
FREE, UNUSABLE, RESERVED, MMIO = 7, 8, 0, 11
OWN = [(3, 0x20_0000, 32), (4, 0x22_0000, 64), (5, 0x26_0000, 16), (6, 0x28_0000, 64)]
"""The firmware's own memory: type, start, pages."""
REGIONS = [(0x40_0000, 24), (0x42_0000, 40), (0x50_0000, 3)]
"""Free memory, with holes between."""
PAGES = [start + PAGE * number for start, pages in REGIONS for number in range(pages)]
TYPES = st.sampled_from([1, 2, 3, 4, 5, 6, 9, 10])
COUNTS = st.sampled_from([0, 1, 1, 2, 3, 7, 24, 40, 41, 1 << 52])
PLACES = st.sampled_from([0, PAGE, *PAGES[::5], PAGES[-1], PAGES[-1] + PAGE, PAGES[0] + 8, 1 << 63])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("any"), TYPES, COUNTS, st.just(0)),
        st.tuples(st.just("max"), TYPES, COUNTS, PLACES),
        st.tuples(st.just("at"), TYPES, COUNTS, PLACES),
        st.tuples(st.just("free"), st.just(0), COUNTS, PLACES),
        st.tuples(st.just("pool"), TYPES, st.sampled_from([0, 1, PAGE, PAGE + 1, 30 * PAGE]), st.just(0)),
        st.tuples(st.just("free pool"), st.just(0), st.integers(0, 3), PLACES),
    ),
    max_size=25,
)


def small_efi() -> Efi:
    """Services whose allocator has 67 free pages in three regions."""
    lab = build_lab(1 << 24)
    lab.host.page_add(0, b"", 1 << 24, "RAM")
    lab.host.finalize()
    owned = [MemoryDescriptor(kind, start, pages, 0xF) for kind, start, pages in OWN]
    owned += [MemoryDescriptor(FREE, start, pages, 0xF) for start, pages in REGIONS]
    memory_map = MemoryMap(owned, [MemoryDescriptor(MMIO, 0xFFC0_0000, 1024, 0)])
    services = EfiServices(lab.machine, memory_map, Arena(lab.machine.memory, memory_map))
    build_system_table(services)
    return Efi(lab, services)


class Model:
    """The type of each page, and what was handed out as pool."""

    def __init__(self) -> None:
        self.types = dict.fromkeys(PAGES, FREE)
        self.pools: dict[int, int] = {}

    def take(self, kind: int, pages: int, below: int) -> int | None:
        """The highest run of free pages of one region that ends at or below ``below``."""
        for start, count in reversed(REGIONS):
            for first in range(count - pages, -1, -1):
                run = [start + PAGE * (first + number) for number in range(pages)]
                if run[-1] + PAGE <= below and all(self.types[page] == FREE for page in run):
                    self.types |= dict.fromkeys(run, kind)
                    return run[0]
        return None

    def convert(self, start: int, pages: int, kind: int, was_free: bool) -> bool:
        """Give ``kind`` to all pages if all of them are free, or none of them is."""
        if start % PAGE or not 0 < pages <= len(PAGES):
            return False
        run = [start + PAGE * number for number in range(pages)]
        if any(page not in self.types or (self.types[page] == FREE) is not was_free for page in run):
            return False
        self.types |= dict.fromkeys(run, kind)
        return True


def step(efi: Efi, model: Model, what: str, kind: int, amount: int, place: int) -> bool:
    """Do one step on both; True if it is to succeed, and it must then give the model's address."""
    if what in ("any", "max", "at"):
        status, address = efi.allocate_pages({"any": 0, "max": 1, "at": 2}[what], kind, amount, place)
        if what == "at":
            done = model.convert(place, amount, kind, was_free=True)
            assert (status == 0) is done
            return done
        fits = 0 < amount <= len(PAGES)
        wanted = model.take(kind, amount, place + 1 if what == "max" else 1 << 64) if fits else None
        assert (address if status == 0 else None) == wanted
        return wanted is not None
    if what == "pool":
        status, address = efi.allocate_pool(kind, amount)
        wanted = model.take(kind, max(1, -(-amount // PAGE)), 1 << 64)
        assert (address if status == 0 else None) == wanted
        if wanted is not None:
            model.pools[wanted] = max(1, -(-amount // PAGE))
        return wanted is not None
    if what == "free":
        done = model.convert(place, amount, FREE, was_free=False)
        assert (efi.call("FreePages", place, amount) == 0) is done
        return done
    address = sorted(model.pools)[amount] if amount < len(model.pools) else place
    pages = model.pools.pop(address, 0)
    done = bool(pages) and model.convert(address, pages, FREE, was_free=False)
    assert (efi.call("FreePool", address) == 0) is done
    return done


@settings(max_examples=150)
@given(STEPS)
@example([("pool", 1, 30 * PAGE, 0), ("free", 0, 1, 0x42_B000), ("free pool", 0, 0, 0)])
def test_any_order_of_allocations(steps: list[tuple[str, int, int, int]]) -> None:
    """No page is given twice and none is lost, the map covers all memory, and its key changes when it does."""
    efi, model = small_efi(), Model()
    before = efi.services.memory_map.descriptors()
    for what, kind, amount, place in steps:
        key = efi.services.memory_map.key
        step(efi, model, what, kind, amount, place)
        found = efi.services.memory_map.descriptors()
        types = {page: d.type for d in found for page in range(d.start, d.end, PAGE)}
        assert sum(d.pages for d in found) == len(types)  # no overlap
        assert {page: types[page] for page in PAGES} == model.types
        assert len(types) == sum(d.pages for d in before)
        assert (efi.services.memory_map.key != key) is (found != before)
        before = found


def test_a_map_that_grows_between_the_calls() -> None:
    """A map that an event changed makes ExitBootServices() fail once; with the new key it succeeds."""
    efi = small_efi()
    key = efi.key()
    efi.services.memory_map.convert(PAGES[0], PAGES[0] + PAGE, UNUSABLE)
    assert efi.call("ExitBootServices", 0, key) == 1 << 63 | 2
    assert efi.call("ExitBootServices", 0, efi.key()) == 0
