"""The kernel command line."""

from __future__ import annotations

import pytest

from kernel.early_param import parse_args, parse_early_param


def test_words_values_and_order():
    """Words are cut at white space; a word without = has no value; every parameter is kept."""
    params = parse_early_param("  console=ttyS0\tquiet\nroot=UUID=1-2 foo= ")
    assert params.values == {"console": "ttyS0", "quiet": None, "root": "UUID=1-2", "foo": ""}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('dyndbg="file a.c +p" x', [("dyndbg", "file a.c +p"), ("x", None)]),
        ('"opt=a b" x', [("opt", "a b"), ("x", None)]),
        ('opt=a" "b', [("opt", 'a" "b')]),
        ('opt="never closed  x', [("opt", "never closed  x")]),
        ("=value", [("=value", None)]),
        ('"', [("", None)]),
        ("a -- b", [("a", None)]),
        ("--=1 b", [("__", "1"), ("b", None)]),
    ],
)
def test_quotes_and_the_end_of_kernel_parameters(text, expected):
    """Double quotes hide white space and fall away around a word or value; -- ends the kernel's part."""
    assert list(parse_args(text)) == expected


def test_last_one_wins():
    """Of a parameter given twice the last value counts."""
    params = parse_early_param("accept_memory=eager mem=1G accept_memory=lazy mem=2G")
    assert params.lazy_accept and params.values["mem"] == "2G"


def test_acceptance_is_lazy_by_default():
    """Without the parameter acceptance is lazy, and eager on request; a dash is an underscore."""
    assert parse_early_param("").lazy_accept
    assert not parse_early_param("accept_memory=eager").lazy_accept
    assert not parse_early_param("accept-memory=eager").lazy_accept


@pytest.mark.parametrize("bad", ["accept_memory=Eager", "accept_memory=", "accept_memory", "accept_memory=lazy2"])
def test_other_values_are_refused_and_change_nothing(bad):
    """An unknown value leaves what was set before and is noted in the kernel's words."""
    params = parse_early_param(f"accept_memory=eager {bad}")
    assert not params.lazy_accept
    assert params.notes == ("Malformed early option 'accept_memory'",)


def test_nokaslr_is_a_word_of_its_own():
    """nokaslr counts without a value only."""
    assert parse_early_param("quiet nokaslr").nokaslr
    assert not parse_early_param("nokaslr=1 nokaslr2").nokaslr
