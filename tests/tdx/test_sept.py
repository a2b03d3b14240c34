"""Secure EPT: which states follow which."""

from __future__ import annotations

import pytest

from tdx.sept import SecureEpt

SZ_4K, SZ_2M = 0x1000, 0x20_0000


def entries(sept: SecureEpt, end: int) -> list[tuple[int, int, str, int]]:
    """(start, end, state, level) from 0 on."""
    return [(low, high, entry.state.name, entry.level) for low, high, entry in sept.runs(0, end)]


def test_everything_is_free_at_first():
    """A new TD has no page anywhere."""
    assert entries(SecureEpt(), 1 << 64) == [(0, 1 << 64, "FREE", 0)]
    assert not SecureEpt().mapped()


def test_pages_go_from_free_to_pending_to_mapped():
    """Each step takes the state before it, keeps the level it is given, and joins equal neighbours."""
    sept = SecureEpt()
    sept.page_aug(0, SZ_2M, 0)
    sept.page_aug(SZ_2M, 2 * SZ_2M, 1)
    sept.page_accept(0, SZ_4K, 0)
    sept.page_accept(SZ_4K, 2 * SZ_4K, 0)
    sept.page_accept(SZ_2M, 2 * SZ_2M, 1)
    sept.page_add(2 * SZ_2M, 2 * SZ_2M + SZ_4K)
    assert entries(sept, 3 * SZ_2M) == [
        (0, 2 * SZ_4K, "MAPPED", 0), (2 * SZ_4K, SZ_2M, "PENDING", 0), (SZ_2M, 2 * SZ_2M, "MAPPED", 1),
        (2 * SZ_2M, 2 * SZ_2M + SZ_4K, "MAPPED", 0), (2 * SZ_2M + SZ_4K, 3 * SZ_2M, "FREE", 0),
    ]  # fmt: skip
    assert list(sept.mapped()) == [(0, 2 * SZ_4K), (SZ_2M, 2 * SZ_2M + SZ_4K)]
    assert list(sept.mapped(SZ_4K, SZ_2M + SZ_4K)) == [(SZ_4K, 2 * SZ_4K), (SZ_2M, SZ_2M + SZ_4K)]


STEPS = {
    "add": (lambda sept, start, end: sept.page_add(start, end), "FREE"),
    "aug": (lambda sept, start, end: sept.page_aug(start, end, 0), "FREE"),
    "accept": (lambda sept, start, end: sept.page_accept(start, end, 0), "PENDING"),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("at, state", [(0, "FREE"), (SZ_4K, "PENDING"), (2 * SZ_4K, "MAPPED")])
def test_a_step_from_a_wrong_state_changes_nothing(name, at, state):
    """A step over a range of which one page has another state is refused as a whole."""
    sept = SecureEpt()
    sept.page_aug(SZ_4K, 2 * SZ_4K, 0)
    sept.page_add(2 * SZ_4K, 3 * SZ_4K)
    before = entries(sept, 1 << 64)
    step, wanted = STEPS[name]
    if state == wanted:
        step(sept, at, at + SZ_4K)
        assert entries(sept, 1 << 64) != before
        return
    with pytest.raises(ValueError, match=f"found {state}, expected {wanted}"):
        step(sept, at, at + SZ_4K)
    with pytest.raises(ValueError, match=f"expected {wanted}"):
        step(sept, 0, 3 * SZ_4K)
    assert entries(sept, 1 << 64) == before
