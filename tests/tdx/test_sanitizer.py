"""The acceptance sanitizer: for each rule a guest that breaks it, and one that does not."""

from __future__ import annotations

import pytest

from guest.errors import MemoryFault, Violation
from guest.registers import Registers
from guest.units import SZ_2M
from tdx.events import Finding
from tdx.faults import parse_rule
from tdx.guest import accept_pages, tdx_accept_memory_v9
from tdx.inject import Injector
from tdx.leaves import EXPOSE_R10_R15, SubFunction
from tdx.sanitizer import AcceptanceRule, Sanitizer
from tdx.seamcall import SeamLeaf

RULE = AcceptanceRule


@pytest.fixture
def watched(make_td):
    """``watched(*rules)``: a TD with 16 MiB whose host plays by those rules, and its sanitizer."""

    def build(*rules: str, strict: bool = False):
        td = make_td()
        if rules:
            Injector([parse_rule(rule) for rule in rules], td.module.page_accept, td.host, td.trace)
        return td, Sanitizer(td.trace, td.host.ram, td.host.shared_mask, strict)

    return build


def map_gpa(td, gpa: int, size: int) -> None:
    td.machine.platform.tdcall(Registers(rcx=EXPOSE_R10_R15, r11=SubFunction.MapGPA, r12=gpa, r13=size))


def found(sanitizer: Sanitizer) -> list[tuple[str, int, int]]:
    """The findings: rule, start, end."""
    return [(r.event.rule, r.event.start, r.event.end) for r in sanitizer.findings]


def touch(td, sanitizer: Sanitizer, gpa: int, size: int = 8) -> None:
    """A touch that kills; the boot tells the sanitizer of it."""
    with pytest.raises(MemoryFault) as death:
        td.machine.memory.write(gpa, bytes(size))
    sanitizer.fault(death.value)


def test_a_sound_guest_has_no_finding(watched):
    """Accepting each page once and using it is all right, in whatever page sizes."""
    td, sanitizer = watched()
    assert tdx_accept_memory_v9(td.machine, 0x1000, 8 << 20)
    td.machine.memory.clear(0x1000, 8 << 20)
    assert found(sanitizer) == []
    assert sanitizer.accepted.covers(0x1000, 8 << 20)


def test_access_to_unaccepted_memory(watched):
    """The page of the touch is named, with its state; the guest dies of it as before."""
    td, sanitizer = watched(strict=True)
    touch(td, sanitizer, 0x3FF8)
    assert found(sanitizer) == [(RULE.ACCESS, 0x3000, 0x4000)]
    (record,) = sanitizer.findings
    assert record.stage == "test"
    assert "event #" in record.event.text
    assert "access to unaccepted memory at [0x3000, 0x4000): found FREE (not accepted)" in record.event.text


def test_a_page_that_the_host_took_away_is_no_fault_of_the_guest(watched):
    """A touch of a page that was accepted and then removed is no finding."""
    td, sanitizer = watched("replay@accept=1")
    accept_pages(td.machine, 0, 0x2000, (0,))
    touch(td, sanitizer, 0)
    assert found(sanitizer) == []


def test_replay_attack(watched):
    """A guest that accepts again what the host removed and added again is found, though the module says success."""
    td, sanitizer = watched("replay@accept=2")
    assert accept_pages(td.machine, 0, 0x4000, (0,))
    assert accept_pages(td.machine, 0x1000, 0x2000, (0,))
    assert found(sanitizer) == [("replay attack: page accepted twice", 0x1000, 0x2000)]


def test_replay_attack_inside_a_large_page(watched):
    """The pages that were accepted before are named, not the whole page that was accepted now."""
    td, sanitizer = watched("remove@gpa=0-2M,n=2")
    assert accept_pages(td.machine, 0x1000, 0x3000, (0,))
    td.host.seam.run(SeamLeaf.TDH_MEM_RANGE_BLOCK, 1)
    td.host.seam.tracking.leave(0)
    td.host.seam.mem_track()
    td.host.seam.run(SeamLeaf.TDH_MEM_SEPT_REMOVE, 1)
    td.host.seam.tracking.enter(0)
    assert accept_pages(td.machine, 0, SZ_2M, (1,))
    assert found(sanitizer) == [(RULE.REPLAY, 0x1000, 0x3000)]


def test_accept_of_accepted_memory(watched):
    """A second accept that the module refuses is found too: the guest keeps no record."""
    td, sanitizer = watched()
    assert accept_pages(td.machine, 0, 0x4000, (0,))
    assert not accept_pages(td.machine, 0x3000, 0x5000, (0,))
    assert found(sanitizer) == [(RULE.AGAIN, 0x3000, 0x4000)]


def test_added_pages_are_accepted_already(watched):
    """What the host added with contents must not be accepted either."""
    td, sanitizer = watched()
    td.host.seam.runnable = False
    td.host.page_add(0x8000, b"code", 0x1000, "BFV")
    td.host.seam.runnable = True
    assert not accept_pages(td.machine, 0x8000, 0x9000, (0,))
    assert found(sanitizer) == [(RULE.AGAIN, 0x8000, 0x9000)]


def test_accept_outside_ram(watched):
    """An accept of what is no RAM kills the guest, and is its fault; a page that is withheld is not."""
    td, sanitizer = watched("withhold@gpa=0-4K")
    for gpa in (16 << 20, 0):
        with pytest.raises(MemoryFault) as death:
            accept_pages(td.machine, gpa, gpa + 0x1000, (0,))
        sanitizer.fault(death.value)
    assert found(sanitizer) == [(RULE.NO_RAM, 16 << 20, (16 << 20) + 0x1000)]


def test_accept_of_shared_memory(watched):
    """An accept of what the guest has made shared is found, and not after it made it private."""
    td, sanitizer = watched()
    map_gpa(td, td.host.shared_mask | SZ_2M, SZ_2M)
    assert accept_pages(td.machine, SZ_2M, SZ_2M + 0x2000, (0,))
    map_gpa(td, SZ_2M, SZ_2M)
    assert accept_pages(td.machine, SZ_2M + 0x2000, SZ_2M + 0x4000, (0,))
    assert found(sanitizer) == [(RULE.SHARED, SZ_2M, SZ_2M + 0x2000)]


def test_memory_that_was_shared_is_accepted_anew(watched):
    """Private to shared and back: the contents were given up, so a second accept is right."""
    td, sanitizer = watched("replay@accept=1")
    assert accept_pages(td.machine, 0, 0x1000, (0,))
    map_gpa(td, td.host.shared_mask, 0x1000)
    map_gpa(td, 0, 0x1000)
    assert accept_pages(td.machine, 0, 0x1000, (0,))
    assert found(sanitizer) == []


def test_a_refused_map_gpa_changes_nothing(watched):
    """Memory that the host refused to make shared is still private."""
    td, sanitizer = watched("mapgpa-refuse")
    map_gpa(td, td.host.shared_mask, SZ_2M)
    assert accept_pages(td.machine, 0, SZ_2M, (1,))
    assert found(sanitizer) == []


def test_strict_ends_the_boot(watched):
    """A strict sanitizer raises at the finding, with stage, rule, event, address and states in one line."""
    td, _ = watched("replay@accept=1", strict=True)
    accept_pages(td.machine, 0, 0x1000, (0,))
    with pytest.raises(Violation) as caught:
        accept_pages(td.machine, 0, 0x1000, (0,))
    assert (caught.value.stage, caught.value.rule) == ("test", RULE.REPLAY)
    assert str(caught.value) == (
        f"test: event #{td.events(Finding)[0].cause}: replay attack: page accepted twice at [0x0, 0x1000): "
        "found accepted before, the accept succeeded, expected one accept of a page in its life"
    )
