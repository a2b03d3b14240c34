"""Hostile bytes give a value or a ``BootError``, never anything else, at every door that bytes come in by."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import Target, all_targets

TARGETS = {target.name: target for target in all_targets()}
INPUTS = 1000
"""Of all targets together, by their shares; ``python -m tests.fuzz`` runs more."""


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_seeds_are_sound(target: Target):
    """The inputs that hostile ones are made from are no hostile ones: each is read, or refused for its age."""
    assert any(target.run(seed) for seed in target.seeds)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_hostile_input(target: Target):
    """A sound input with up to six changes gives a value or a ``BootError``."""

    @settings(max_examples=max(int(INPUTS * target.share), 10), derandomize=True, database=None)
    @given(st.randoms(use_true_random=False))
    def check(rng):
        target.run(mutated(target.seeds, rng))

    check()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("data", [b"", b"\0", bytes(4096), b"\xff" * 4096], ids=["empty", "byte", "zeros", "ones"])
def test_no_structure_at_all(target: Target, data: bytes):
    """Nothing, zeros and ones are inputs too."""
    target.run(data)
