"""tools.render: the forms that several verbs share."""

from kernel.events import MmPageAllocExtfrag, OutOfMemory
from kernel.gfp import GFP_KERNEL
from tools.output import hex_dump
from tools.render import event_text


def test_hex_dump() -> None:
    """Lines are those of xxd, from the given address on."""
    assert hex_dump(bytes(range(0x20, 0x33)) + b"\x7f\xff") == [
        "00000000: 2021 2223 2425 2627 2829 2a2b 2c2d 2e2f   !\"#$%&'()*+,-./",
        "00000010: 3031 327f ff                             012..",
    ]
    assert hex_dump(b"A", base=1 << 32) == ["100000000: 41                                       A"]


def test_events_of_the_page_allocator() -> None:
    """A fallback is the kernel's own trace line; a kill says for whom."""
    event = MmPageAllocExtfrag(0x100200, 0, 4, 9, 1, 0, True, False)
    assert event_text(event) == (
        "mm_page_alloc_extfrag: page=ffffea0004008000 pfn=0x100200 alloc_order=0 fallback_order=4 pageblock_order=9 "
        "alloc_migratetype=1 fallback_migratetype=0 fragmenting=1 change_ownership=0"
    )
    text = "out of memory: gfp_mask=0xcc0, order=1, 4096 KiB unaccepted: "
    assert event_text(OutOfMemory(GFP_KERNEL, 1, "", 1024)) == text + "nobody to kill"
    assert event_text(OutOfMemory(GFP_KERNEL, 1, "init", 1024)) == text + "killed process init"
