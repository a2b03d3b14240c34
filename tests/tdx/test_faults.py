"""Rules of faults: what can be said, and what is refused in one line that names what there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.errors import FormatError
from guest.ranges import Range
from tdx.faults import KINDS, Place, Rule, parse_rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("busy", Rule("busy")),
        ("busy@accept=17", Rule("busy", accept=17)),
        ("replay@gpa=4G-5G", Rule("replay", gpa=Range(4 << 30, 5 << 30))),
        ("remove@gpa=0x1000-0x2000,stage=mm-init", Rule("remove", gpa=Range(0x1000, 0x2000), stage="mm-init")),
        ("block@p=0.01,seed=7", Rule("block", p=0.01, seed=7)),
        ("block@p=1,n=3", Rule("block", p=1.0, n=3)),
        ("interrupt:5@accept=1", Rule("interrupt", 5, accept=1)),
        ("status:0x8000000000000001@tdvmcall=2", Rule("status", 0x8000_0000_0000_0001, tdvmcall=2)),
        ("mapgpa-retry@mapgpa=3", Rule("mapgpa-retry", mapgpa=3)),
        ("hob-more@gpa=4G-8G", Rule("hob-more", gpa=Range(4 << 30, 8 << 30))),
    ],
)
def test_rules(text, rule):
    """A rule is a kind, its argument, and conditions that all must hold; as text it is what was written."""
    parsed = parse_rule(text)
    argument = KINDS[rule.kind].argument
    expected = rule if ":" in text or argument is None else Rule(rule.kind, argument)
    assert parsed == expected
    assert str(parsed) == text


def test_how_often():
    """A rule happens once, or without a limit if a probability chooses its calls, unless it says how often."""
    assert parse_rule("busy").times == 1
    assert parse_rule("busy@p=0.5").times > 1 << 60
    assert parse_rule("busy@p=0.5,n=4").times == 4


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("", "kind ''", "busy, size-mismatch"),
        ("bussy@accept=1", "kind 'bussy'", "busy, size-mismatch"),
        ("busy@", "condition ''", "accept, gpa, n, p, seed, stage"),
        ("busy@when=3", "condition 'when'", "accept, gpa, n, p, seed, stage"),
        ("busy@mapgpa=3", "condition 'mapgpa'", "accept, gpa, n, p, seed, stage"),
        ("busy@accept=1,accept=2", "condition 'accept' again", "for busy some of"),
        ("hob-less@p=0.5", "condition 'p'", "for hob-less some of gpa"),
        ("busy@accept=0", "accept=0", "from 1 on"),
        ("busy@accept=-1", "accept=-1", "from 1 on"),
        ("busy@n=0x2", "n=0x2", "from 1 on"),
        ("busy@accept=" + "9" * 5000, "accept=9", "from 1 on"),
        ("busy@p=0", "p=0", "above 0"),
        ("busy@p=1.01", "p=1.01", "up to 1"),
        ("busy@p=nan", "p=nan", "up to 1"),
        ("busy@p=1e-3", "p=1e-3", "up to 1"),
        ("busy@seed=3", "seed= without p=", "p= too"),
        ("busy@gpa=4G", "gpa=4G", "a range such as"),
        ("busy@gpa=5G-4G", "gpa=5G-4G", "a range such as"),
        ("busy@gpa=-4G", "gpa=-4G", "a range such as"),
        ("busy@stage=", "stage=", "name of a stage"),
        ("busy:3", "argument '3'", "none for busy"),
        ("interrupt:512", "argument '512'", "1 to 511"),
        ("interrupt:0", "argument '0'", "1 to 511"),
        ("interrupt:0x", "argument '0x'", "1 to 511"),
        ("status:" + "9" * 5000, "argument '9", "a number from 1"),
    ],
    ids=lambda value: value[:24],
)
def test_rules_that_are_none(text, found, expected):
    """A malformed rule is refused with the rule, what is wrong in it, and what could stand there."""
    with pytest.raises(FormatError) as caught:
        parse_rule(text)
    assert caught.value.what == f"fault {text!r}"
    assert str(caught.value.found).startswith(found)
    assert expected in str(caught.value.expected)


@given(st.text(alphabet="busyinterptalgmv-:@=,.0123456789xGK", max_size=40))
def test_any_text_is_a_rule_or_refused(text):
    """Whatever is written is a rule or a FormatError."""
    try:
        assert parse_rule(text).kind in KINDS
    except FormatError as error:
        assert error.source == "unaccepted boot --help, --fault"


def test_every_kind_has_a_place_and_words():
    """Each kind says what it does, and each place has kinds."""
    assert {kind.place for kind in KINDS.values()} == set(Place)
    assert all(kind.text and kind.name == name for name, kind in KINDS.items())
