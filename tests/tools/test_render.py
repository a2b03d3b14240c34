"""tools.render: the forms that several verbs share."""

from tools.render import hex_dump


def test_hex_dump() -> None:
    """Lines are those of xxd, from the given address on."""
    assert hex_dump(bytes(range(0x20, 0x33)) + b"\x7f\xff") == [
        "00000000: 2021 2223 2425 2627 2829 2a2b 2c2d 2e2f   !\"#$%&'()*+,-./",
        "00000010: 3031 327f ff                             012..",
    ]
    assert hex_dump(b"A", base=1 << 32) == ["100000000: 41                                       A"]
