"""Call gates, trace, clock, registers, and the machine that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from guest.clock import VirtualClock
from guest.errors import BootError, FormatError, GuestPanic, MemoryFault
from guest.gates import CallGate, CallGates
from guest.machine import Machine
from guest.registers import Registers
from guest.trace import Event, Note, Print, Record, ServiceCall, StageBegin, Trace


@pytest.fixture
def clock():
    """A clock at zero."""
    return VirtualClock()


@pytest.fixture
def trace(clock):
    """An empty trace in stage ``test``."""
    trace = Trace(clock)
    trace.stage = "test"
    return trace


def test_a_call_gate_answers_at_its_address(trace):
    """A call reaches the handler with its arguments, and the trace has them with the status."""
    gates = CallGates(trace)
    gate = CallGate("Add", 2, lambda a, b: a + b)
    gates.install(0x1000, gate)
    assert gates.call(0x1000, 3, 4) == 7
    assert gates.at(0x1000) is gate
    assert gates.at(0x1001) is None
    assert [record.event for record in trace.records] == [ServiceCall("Add", (3, 4), 7)]


def test_a_call_to_nowhere_is_fatal(trace):
    """A call to an address without a gate kills the guest in the stage that made it."""
    with pytest.raises(GuestPanic) as died:
        CallGates(trace).call(0xDEAD000)
    assert (died.value.stage, died.value.text) == ("test", "call to 0xdead000, where no firmware service is")
    assert trace.records == []


@pytest.mark.parametrize("args", [(), (1,), (1, 2, 3)])
def test_a_wrong_number_of_arguments_is_refused(trace, args):
    """A call with other than the gate's number of arguments is a ValueError and calls nothing."""
    gates, called = CallGates(trace), []
    gates.install(0x1000, CallGate("Two", 2, lambda a, b: called.append((a, b)) or 0))
    with pytest.raises(ValueError, match=f"Two: found {len(args)} arguments, expected 2"):
        gates.call(0x1000, *args)
    assert called == []
    assert trace.records == []


def test_an_address_has_one_gate(trace):
    """A second gate at an address is a ValueError, and the first stays."""
    gates = CallGates(trace)
    gates.install(0x1000, CallGate("First", 0, lambda: 1))
    with pytest.raises(ValueError, match="call gate at 0x1000: taken by First"):
        gates.install(0x1000, CallGate("Second", 0, lambda: 2))
    assert gates.call(0x1000) == 1


def test_a_call_that_dies_is_not_in_the_trace(trace):
    """The trace has the status that was returned, so a call that never returned is not there."""

    def handler() -> int:
        raise GuestPanic("test", "gone")

    gates = CallGates(trace)
    gates.install(0x1000, CallGate("Die", 0, handler))
    with pytest.raises(GuestPanic, match="gone"):
        gates.call(0x1000)
    assert trace.records == []


def test_records_carry_number_stage_and_time(trace, clock):
    """Events are numbered from 0 and stamped with the stage and time at which they were added."""
    trace.add(Note("one"))
    clock.advance(650)
    trace.stage = "next"
    trace.add(StageBegin())
    assert trace.records == [Record(0, "test", 0, Note("one")), Record(1, "next", 650, StageBegin())]
    assert trace.count == 2


def test_watchers_see_each_record_when_it_is_added(trace):
    """Every watcher is called with every record, after it is in the list; what it raises ends the step."""
    seen = []
    trace.watchers.append(lambda record: seen.append((record.number, trace.count)))
    trace.add(Note("one"))
    trace.add(Note("two"))
    assert seen == [(0, 1), (1, 2)]

    def stop(record: Record) -> None:
        raise StopIteration(record.number)

    trace.watchers.append(stop)
    with pytest.raises(StopIteration):
        trace.add(Note("three"))
    assert trace.count == 3


def test_an_event_knows_its_name_and_fields():
    """An event's name is its class name, and its fields come in their order."""
    event = ServiceCall("GetMemoryMap", (1, 2), 0)
    assert event.name == "ServiceCall"
    assert list(event.as_dict().items()) == [("service", "GetMemoryMap"), ("args", (1, 2)), ("status", 0)]
    assert Event().as_dict() == {}


def test_time_is_what_operations_cost(clock):
    """The clock starts at 0 and only ever goes by what it is told."""
    assert clock.ns == 0
    clock.advance(3)
    clock.advance(4)
    assert clock.ns == 7


def test_registers_are_listed_in_their_encoding():
    """Sixteen general registers in the order of their numbers, then RIP and CR3, all zero at first."""
    names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)), "rip", "cr3"]
    assert list(Registers().as_dict()) == names
    assert set(Registers().as_dict().values()) == {0}
    assert Registers(rdx=5).as_dict()["rdx"] == 5
    with pytest.raises(AttributeError):
        Registers().eax = 1


@dataclass
class NoPlatform:
    """Admits everything and knows no call."""

    def admit(self, gpa, size, kind):
        return 0, 1 << 52

    def cpuid(self, leaf, subleaf=0):
        return 0, 0, 0, 0

    def tdcall(self, regs):
        raise NotImplementedError

    def tdcall_run(self, regs, step, count):
        raise NotImplementedError


def test_a_machine_speaks_through_its_trace(trace, clock, make_bench):
    """print, note, call and panic leave their events; panic returns the exception and raises nothing."""
    machine = Machine.build(make_bench().physical, NoPlatform(), trace, clock)
    machine.gates.install(0x1000, CallGate("One", 1, lambda a: a))
    machine.print("line")
    machine.note("fact")
    assert machine.call(0x1000, 9) == 9
    panic = machine.panic("Kernel panic")
    assert (panic.stage, panic.text, str(panic)) == ("test", "Kernel panic", "test: Kernel panic")
    events = [record.event for record in trace.records]
    assert events == [Print("line"), Note("fact"), ServiceCall("One", (9,), 9), Print("Kernel panic")]


def test_a_machine_has_memory_behind_its_platform(trace, clock, make_bench):
    """What is written through the machine's memory is in the physical memory."""
    physical = make_bench().physical
    machine = Machine.build(physical, NoPlatform(), trace, clock)
    machine.memory.write(0x123, b"x")
    assert physical.read(0x123, 1) == b"x"
    assert machine.regs == Registers()


def test_a_format_error_says_five_things():
    """What, where, found, expected and source are attributes and stand in the message."""
    error = FormatError("hdr.magic", at=0x202, found=b"abcd", expected=b"HdrS", source="boot.rst")
    assert str(error) == "hdr.magic at 0x202: found b'abcd', expected b'HdrS' [boot.rst]"
    assert (error.what, error.at, error.found, error.expected) == ("hdr.magic", 0x202, b"abcd", b"HdrS")
    assert error.source == "boot.rst"
    assert isinstance(error, BootError)


def test_a_format_error_may_have_no_place():
    """Where no byte is in question the message names no address."""
    error = FormatError("command line", found="2049 bytes", expected="at most 2048", source="boot.rst")
    assert str(error) == "command line: found 2049 bytes, expected at most 2048 [boot.rst]"
    assert error.at is None


def test_a_memory_fault_names_page_and_access():
    """The message has the stage, the access, the page that stopped it, its state, and how the guest died."""
    fault = MemoryFault(
        stage="efi-stub", gpa=0x2000, start=0x1FFC, size=8, kind="read", state="PENDING (not accepted)", end="#VE"
    )
    assert str(fault) == (
        "efi-stub: read of 8 bytes at 0x1ffc touched page 0x2000: "
        "found PENDING (not accepted), expected accepted private memory; the guest died [#VE]"
    )
    assert isinstance(fault, BootError)
