"""Page arithmetic, and numbers as the kernel's command line has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest import units
from guest.units import DIV_ROUND_UP, PFN_DOWN, PFN_PHYS, PFN_UP, U64_MAX, memparse, round_down, round_up, size_text


@pytest.mark.parametrize(
    "name, value",
    [
        ("PAGE_SHIFT", 12), ("PAGE_SIZE", 4096), ("PMD_SHIFT", 21), ("PMD_SIZE", 2_097_152), ("PUD_SHIFT", 30),
        ("PUD_SIZE", 1_073_741_824), ("SZ_64K", 65_536), ("SZ_1M", 1_048_576), ("SZ_2M", 2_097_152),
        ("SZ_4M", 4_194_304), ("SZ_16M", 16_777_216), ("SZ_32M", 33_554_432), ("SZ_64M", 67_108_864),
        ("SZ_128M", 134_217_728), ("SZ_1G", 1_073_741_824), ("SZ_2G", 2_147_483_648),
        ("SZ_4G", 4_294_967_296), ("BITS_PER_BYTE", 8), ("PHYSICAL_ADDRESS_BITS", 52),
        ("PHYSICAL_ADDRESS_END", 4_503_599_627_370_496),
    ],
)  # fmt: skip
def test_sizes_are_what_their_names_say(name, value):
    """Every constant is the number that its name stands for."""
    assert getattr(units, name) == value


def test_registers_have_64_bits():
    """The mask of a register is 64 ones."""
    assert U64_MAX == 0xFFFF_FFFF_FFFF_FFFF


@pytest.mark.parametrize(
    "gpa, down, up",
    [(0, 0, 0), (1, 0, 1), (0xFFF, 0, 1), (0x1000, 1, 1), (0x1001, 1, 2), (1 << 52, 1 << 40, 1 << 40)],
)
def test_page_frame_of_an_address(gpa, down, up):
    """PFN_DOWN is the frame that holds an address, PFN_UP the first one that starts at or above it."""
    assert (PFN_DOWN(gpa), PFN_UP(gpa)) == (down, up)
    assert PFN_PHYS(down) <= gpa <= PFN_PHYS(up)


@given(st.integers(0, 1 << 64), st.integers(1, 1 << 40))
def test_rounding_is_to_the_nearest_multiple(value, step):
    """Rounding gives the nearest multiple on the named side, the value itself if it is one."""
    low, high = round_down(value, step), round_up(value, step)
    assert low % step == high % step == 0
    assert low <= value <= high < value + step
    assert value - low < step
    assert DIV_ROUND_UP(value, step) * step == high


@pytest.mark.parametrize(
    "text, number, rest",
    [
        ("0", 0, ""),
        ("4096", 4096, ""),
        ("1k", 1 << 10, ""),
        ("1K", 1 << 10, ""),
        ("2M", 2 << 20, ""),
        ("3g", 3 << 30, ""),
        ("1T", 1 << 40, ""),
        ("1p", 1 << 50, ""),
        ("1E", 1 << 60, ""),
        ("0x10", 16, ""),
        ("0X1fK", 31 << 10, ""),
        ("0x1E", 30, ""),  # the digit, not the suffix
        ("010", 8, ""),
        ("017M", 15 << 20, ""),
        ("4G@0x100000000", 4 << 30, "@0x100000000"),
        ("1kB", 1 << 10, "B"),
        ("1kk", 1 << 10, "k"),
        ("12 ", 12, " "),
    ],
)
def test_memparse_reads_number_and_suffix(text, number, rest):
    """A decimal, hexadecimal or octal number takes one suffix, and the text behind it is returned."""
    assert memparse(text) == (number, rest)


@pytest.mark.parametrize(
    "text, number, rest",
    [
        ("08", 0, "8"),
        ("0179", 0o17, "9"),
        ("018M", 1, "8M"),
        ("0xg", 0, "xg"),
        ("0x", 0, "x"),
        ("0xK", 0, "xK"),
    ],
)
def test_memparse_stops_at_the_first_digit_that_is_none(text, number, rest):
    """As simple_strtoull() does, the number ends where the base's digits end."""
    assert memparse(text) == (number, rest)


@pytest.mark.parametrize("text", ["", "k", "nopentium", "-1", "+1", " 1", "@4G", "\u0663", "\uff11"])
def test_memparse_leaves_text_that_is_no_number(text):
    """Text that does not start with a digit gives 0 and the whole text."""
    assert memparse(text) == (0, text)


@pytest.mark.parametrize(
    "text, number",
    [("16E", 0), ("18446744073709551615", (1 << 64) - 1), ("18446744073709551617", 1), ("0x1" + "0" * 16, 0)],
)
def test_memparse_wraps_at_64_bits(text, number):
    """A number that does not fit into 64 bits loses its high bits, as in C."""
    assert memparse(text) == (number, "")


@pytest.mark.parametrize("digits", ["9" * 5000, "0x" + "f" * 5000, "0" + "7" * 5000])
def test_memparse_takes_any_number_of_digits(digits):
    """No number of digits is an error."""
    number, rest = memparse(digits)
    assert 0 <= number < 1 << 64
    assert rest == ""


@given(st.text(max_size=12))
def test_memparse_returns_a_tail_of_its_text(text):
    """Whatever the text, the rest is its end and the number has 64 bits."""
    number, rest = memparse(text)
    assert text.endswith(rest)
    assert 0 <= number < 1 << 64
    assert rest != text or number == 0


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (12288, "12 KiB"), (1 << 21, "2 MiB"),
     (4 << 30, "4 GiB"), (5 << 40, "5 TiB"), (3 << 29, "1536 MiB"), (1 << 50, "1024 TiB")],
)  # fmt: skip
def test_size_text_takes_the_largest_unit_that_divides(size, text):
    """A size is shown without a fraction, in the largest unit that allows it."""
    assert size_text(size) == text
