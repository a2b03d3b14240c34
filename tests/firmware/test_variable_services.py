"""Variables: who may see and change them, before and after ExitBootServices()."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware.variables import Variable, VariableStore
from tests.firmware.conftest import build_efi

SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, BUFFER_TOO_SMALL, WRITE_PROTECTED, OUT_OF_RESOURCES, NOT_FOUND = (
    1 << 63 | n for n in (2, 3, 5, 8, 9, 14)
)  # fmt: skip
NV, BS, RT, HARDWARE_ERROR, SIGNED, TIME_SIGNED, APPEND, ENHANCED = (1 << n for n in range(8))
ALL = NV | BS | RT
VENDOR = "0000000a-0000-4000-8000-000000000001"
OTHER_VENDOR = "0000000b-0000-4000-8000-000000000001"
GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
MAX_SIZE, STORE_SIZE = 0x8400, 0x4_0000


@dataclass
class Variables:
    """The services, with names and data put into memory for each call."""

    efi: object

    def name(self, name: str) -> int:
        return self.efi.put((name + "\0").encode("utf-16-le", "surrogatepass"))

    def set(self, name: str, attributes: int, data: bytes, vendor: str = VENDOR) -> int:
        at = self.efi.put(data) if data else 0
        return self.efi.call("SetVariable", self.name(name), self.efi.id(vendor), attributes, len(data), at)

    def get(self, name: str, room: int = 0x100, vendor: str = VENDOR) -> tuple[int, int, int, bytes]:
        """Status, attributes, size and the first bytes of the buffer."""
        attributes, size, data = self.efi.word(), self.efi.word(room), self.efi.put(b"\xa5" * 0x20)
        status = self.efi.call("GetVariable", self.name(name), self.efi.id(vendor), attributes, size, data)
        return status, self.efi.load(attributes), self.efi.load(size), self.efi.memory.read(data, 0x20)

    def names(self) -> list[tuple[str, str]]:
        """All names and vendors, by GetNextVariableName()."""
        size, name, vendor = self.efi.word(), self.efi.put(bytes(0x200)), self.efi.put(bytes(16))
        out = []
        while True:
            self.efi.memory.write_uint(size, 0x200, 8)
            status = self.efi.call("GetNextVariableName", size, name, vendor)
            if status == NOT_FOUND:
                return out
            assert status == SUCCESS
            text = self.efi.memory.read(name, self.efi.load(size)).decode("utf-16-le")
            assert text.endswith("\0")
            out.append((text[:-1], str(UUID(bytes_le=self.efi.memory.read(vendor, 16)))))

    def exit(self) -> None:
        assert self.efi.call("ExitBootServices", 0, self.efi.key()) == SUCCESS


@pytest.fixture
def variables(efi):
    return Variables(efi)


def test_a_variable_is_kept(variables):
    """Bytes and attributes come back, by name and vendor; a longer buffer keeps what is behind."""
    assert variables.set("Boot", ALL, b"value") == SUCCESS
    assert variables.get("Boot") == (SUCCESS, ALL, 5, b"value".ljust(0x20, b"\xa5"))
    assert variables.get("boot")[0] == NOT_FOUND
    assert variables.get("Boot", vendor=OTHER_VENDOR)[0] == NOT_FOUND


def test_a_buffer_that_is_too_small_learns_size_and_attributes(variables):
    """Nothing is stored in it, also if it is null."""
    variables.set("Boot", NV | BS, b"value")
    for room in (0, 4):
        assert variables.get("Boot", room) == (BUFFER_TOO_SMALL, NV | BS, 5, b"\xa5" * 0x20)
    efi, size = variables.efi, variables.efi.word(0)
    assert efi.call("GetVariable", variables.name("Boot"), efi.id(VENDOR), 0, size, 0) == BUFFER_TOO_SMALL
    assert efi.call("GetVariable", variables.name("Boot"), efi.id(VENDOR), 0, size, 0) == INVALID_PARAMETER


@pytest.mark.parametrize("null", [0, 1, 3])
def test_get_variable_needs_its_pointers(variables, null):
    """Name, vendor and size; a variable without a name is not found."""
    args = [variables.name("Boot"), variables.efi.id(VENDOR), 0, variables.efi.word(), 0]
    args[null] = 0
    assert variables.efi.call("GetVariable", *args) == INVALID_PARAMETER
    assert variables.get("")[0] == NOT_FOUND


@pytest.mark.parametrize("attributes, size", [(ALL, 0), (0, 4), (NV, 4), (0, 0)])
def test_no_data_or_no_access_deletes(variables, attributes, size):
    """A second time it is not found."""
    variables.set("Boot", ALL, b"value")
    assert variables.set("Boot", attributes, b"x" * size) == SUCCESS
    assert variables.get("Boot")[0] == NOT_FOUND
    assert variables.set("Boot", attributes, b"x" * size) == NOT_FOUND
    assert variables.names() == []


@pytest.mark.parametrize(
    "attributes, status",
    [
        (RT, INVALID_PARAMETER),
        (NV | RT, INVALID_PARAMETER),
        (0x100 | ALL, INVALID_PARAMETER),
        (HARDWARE_ERROR | ALL, UNSUPPORTED),
        (SIGNED | ALL, UNSUPPORTED),
        (TIME_SIGNED | ALL, UNSUPPORTED),
        (ENHANCED | ALL, UNSUPPORTED),
    ],
)
def test_attributes_that_cannot_be(variables, attributes, status):
    """Runtime without boot access and unknown bits are invalid; signed variables are not supported."""
    assert variables.set("Boot", attributes, b"value") == status
    assert variables.get("Boot")[0] == NOT_FOUND


def test_wrong_arguments_of_set_variable(variables):
    """No name, no vendor, data that is nowhere."""
    efi, name = variables.efi, variables.name("Boot")
    assert variables.set("", ALL, b"value") == INVALID_PARAMETER
    for args in ((0, efi.id(VENDOR), ALL, 1, name), (name, 0, ALL, 1, name), (name, efi.id(VENDOR), ALL, 1, 0)):
        assert efi.call("SetVariable", *args) == INVALID_PARAMETER
    assert efi.call("SetVariable", name, efi.id(VENDOR), ALL, 1 << 62, name) == INVALID_PARAMETER


def test_attributes_do_not_change(variables):
    """A variable that exists keeps bytes and attributes if it is set with others."""
    variables.set("Boot", ALL, b"value")
    for data in (b"other", b""):
        assert variables.set("Boot", NV | BS, data) == variables.set("Boot", BS | APPEND, data) == INVALID_PARAMETER
    assert variables.get("Boot")[1:3] == (ALL, 5)
    assert variables.set("Boot", ALL, b"longer value") == SUCCESS
    assert variables.get("Boot")[2] == 12


def test_appending(variables):
    """APPEND_WRITE adds to what is there, and creates what is not; nothing to append changes nothing."""
    assert variables.set("Boot", ALL | APPEND, b"") == SUCCESS
    assert variables.get("Boot")[0] == NOT_FOUND
    assert variables.set("Boot", ALL | APPEND, b"one") == SUCCESS
    assert variables.set("Boot", ALL | APPEND, b" two") == SUCCESS
    assert variables.set("Boot", ALL | APPEND, b"") == SUCCESS
    assert variables.get("Boot") == (SUCCESS, ALL, 7, b"one two".ljust(0x20, b"\xa5"))


@pytest.mark.parametrize("name", ["SecureBoot", "SetupMode", "OsIndicationsSupported"])
def test_what_the_firmware_says_of_itself_is_read_only(variables, name):
    """The firmware's own variables cannot be written; the same names of another vendor can."""
    assert variables.set(name, BS | RT, b"\1", GLOBAL) == WRITE_PROTECTED
    assert variables.set(name, BS | RT, b"\1") == SUCCESS


def test_names_in_order(variables):
    """All names come in the order of their making, with their vendors."""
    listed = [("One", VENDOR), ("One", OTHER_VENDOR), ("Two", VENDOR)]
    for name, vendor in listed:
        variables.set(name, ALL, b"x", vendor)
    assert variables.names() == listed


def test_wrong_arguments_of_get_next_variable_name(variables):
    """Null pointers, a name without an end in its size, one that is none; a small buffer learns the size."""
    efi = variables.efi
    variables.set("Longer", ALL, b"x")
    empty, vendor = efi.word(), efi.id(VENDOR)
    for args in ((0, empty, vendor), (efi.word(8), 0, vendor), (efi.word(8), empty, 0)):
        assert efi.call("GetNextVariableName", *args) == INVALID_PARAMETER
    assert efi.call("GetNextVariableName", efi.word(6), variables.name("abc"), vendor) == INVALID_PARAMETER
    assert efi.call("GetNextVariableName", efi.word(8), variables.name("abc"), vendor) == INVALID_PARAMETER
    size = efi.word(13)
    assert efi.call("GetNextVariableName", size, empty, vendor) == BUFFER_TOO_SMALL
    assert efi.load(size) == 14


def info(variables, attributes: int) -> tuple[int, list[int]]:
    """QueryVariableInfo(): status, and size of the store, what is left, the largest variable."""
    at = [variables.efi.word() for _ in range(3)]
    return variables.efi.call("QueryVariableInfo", attributes, *at), [variables.efi.load(each) for each in at]


def test_room(variables):
    """What a variable takes is its name and its data; volatile ones have a store of their own."""
    assert info(variables, ALL) == (SUCCESS, [STORE_SIZE, STORE_SIZE, MAX_SIZE])
    variables.set("Boot", ALL, b"value")
    assert info(variables, ALL)[1] == [STORE_SIZE, STORE_SIZE - 15, MAX_SIZE]
    assert info(variables, BS)[1] == [STORE_SIZE, STORE_SIZE, MAX_SIZE]
    assert info(variables, RT)[0] == info(variables, 0x100 | ALL)[0] == INVALID_PARAMETER
    assert info(variables, 0)[0] == info(variables, HARDWARE_ERROR | ALL)[0] == UNSUPPORTED
    for null in (1, 2, 3):
        args = [ALL, *(variables.efi.word() for _ in range(3))]
        args[null] = 0
        assert variables.efi.call("QueryVariableInfo", *args) == INVALID_PARAMETER


def test_limits(variables):
    """The largest variable fits and a larger one is invalid; a full store is out of resources, until one goes."""
    assert variables.set("a", ALL, bytes(MAX_SIZE - 3)) == INVALID_PARAMETER
    for name in "abcdefg":
        assert variables.set(name, ALL, bytes(MAX_SIZE - 4)) == SUCCESS
    left = STORE_SIZE - 7 * MAX_SIZE
    assert variables.set("h", ALL, bytes(left - 3)) == OUT_OF_RESOURCES
    assert variables.set("a", ALL | APPEND, b"x") == INVALID_PARAMETER
    assert variables.set("h", ALL, bytes(left - 4)) == SUCCESS
    assert info(variables, ALL)[1] == [STORE_SIZE, 0, 0]
    assert variables.set("a", ALL, b"") == SUCCESS
    assert variables.set("i", ALL, bytes(MAX_SIZE - 4)) == SUCCESS


# After ExitBootServices()


def test_only_runtime_variables_are_left(variables):
    """The others are not found, not listed and not overwritten; QueryVariableInfo() needs runtime access."""
    variables.set("Both", ALL, b"x")
    variables.set("Boot", NV | BS, b"x")
    variables.exit()
    assert (variables.get("Both")[0], variables.get("Boot")[0]) == (SUCCESS, NOT_FOUND)
    assert variables.names() == [("Both", VENDOR)]
    for data in (b"y", b""):
        assert variables.set("Boot", NV | BS, data) == variables.set("Boot", ALL, data) == WRITE_PROTECTED
    assert info(variables, NV | BS)[0] == INVALID_PARAMETER
    assert info(variables, ALL)[0] == SUCCESS


def test_what_can_be_changed_at_runtime(variables):
    """Non-volatile variables with runtime access; volatile ones can only be read."""
    variables.set("Kept", ALL, b"x")
    variables.set("Volatile", BS | RT, b"x")
    variables.exit()
    assert variables.set("Kept", ALL, b"y") == SUCCESS
    assert variables.set("New", ALL, b"z") == SUCCESS
    assert variables.set("Volatile", BS | RT, b"y") == WRITE_PROTECTED
    assert variables.set("Volatile", BS | RT, b"") == WRITE_PROTECTED
    assert variables.set("Other", BS | RT, b"y") == INVALID_PARAMETER
    assert variables.set("Other", NV | BS, b"y") == INVALID_PARAMETER
    assert variables.set("Kept", ALL, b"") == SUCCESS
    assert variables.names() == [("Volatile", VENDOR), ("New", VENDOR)]


NAMES = st.sampled_from(["a", "b", "\ud800"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), NAMES, st.sampled_from([BS, BS | RT, NV | BS, ALL]), st.binary(max_size=3)),
        st.tuples(st.just("append"), NAMES, st.sampled_from([BS, ALL]), st.binary(min_size=1, max_size=3)),
        st.tuples(st.just("exit"), st.just(""), st.just(0), st.just(b"")),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_order_of_changes(steps) -> None:
    """Against a model: a dictionary of attributes and bytes, and one rule for each refusal."""
    store, model, runtime = VariableStore(), {}, False
    vendor = UUID(VENDOR)
    for what, name, attributes, data in steps:
        if what == "exit":
            store.runtime = runtime = True
            continue
        old = model.get(name)
        seen = old is not None and (not runtime or old[0] & RT)
        status = store.set(vendor, name, attributes | (APPEND if what == "append" else 0), data)
        if old is not None and not seen:
            expected = WRITE_PROTECTED
        elif old is not None and old[0] != attributes:
            expected = INVALID_PARAMETER
        elif runtime and old is not None and not old[0] & NV:
            expected = WRITE_PROTECTED
        elif not data:
            expected = SUCCESS if seen else NOT_FOUND
        else:
            expected = SUCCESS if not runtime or attributes == ALL else INVALID_PARAMETER
        assert status == expected
        if status == SUCCESS and not data:
            del model[name]
        elif status == SUCCESS:
            model[name] = (attributes, (old[1] if old and what == "append" else b"") + data)
        for key in ("a", "b", "\ud800"):
            found, entry = store.find(vendor, key), model.get(key)
            visible = entry is not None and (not runtime or entry[0] & RT)
            assert ((found.attributes, found.data) if found else None) == (entry if visible else None)


def test_a_firmware_may_have_variables(make_efi):
    """What the store was made with is there for an image, read-only variables too."""
    variables = Variables(make_efi(variables=[Variable("SecureBoot", UUID(GLOBAL), BS | RT, b"\1")]))
    assert variables.get("SecureBoot", vendor=GLOBAL)[:3] == (SUCCESS, BS | RT, 1)
    assert build_efi().services.variables.find(UUID(GLOBAL), "SecureBoot") is None
