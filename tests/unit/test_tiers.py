"""The books of the tiers: what is where, what may leave, and that no sequence of moves brings them out of order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from api.engine.books import Begun, NeverFits, State, Turn
from api.engine.tiers import Tiers


@dataclass(frozen=True)
class Piece:
    key: str
    bytes: int
    architecture: str = ""


def tiers(device: int, host: int = 10**6, **more) -> Tiers:
    ticks = iter(range(10**9))
    return Tiers(device, host, clock=lambda: float(next(ticks)), **{"shared": False, **more})


def load(books: Tiers, model: str, *pieces: Piece, release: bool = True) -> Begun:
    """Bring a model onto the device, as the cache does."""
    books.know(model, pieces)
    begun = books.begin(model)
    assert begun is not None
    for key in begun.copy:
        turn, _ = books.begin_read(key)
        if turn is Turn.READ:
            books.read_done(key)
        books.placed(key)
    if release:
        books.release(model)
    return begun


def ask(books: Tiers, model: str, *pieces: Piece) -> Begun | None:
    books.know(model, pieces)
    return books.begin(model)


def one(name: str, size: int = 10, architecture: str = "") -> Piece:
    return Piece(name, size, architecture or name)


def held(books: Tiers, tier: str = "device") -> set[str]:
    return {k for k in (*"abcdefxyz", *IN_HOST) if (p := books.part(k)) and getattr(p, tier) is State.HELD}


def test_the_least_recently_used_leaves_the_device_and_stays_in_the_hosts_memory() -> None:
    books = tiers(20)
    load(books, "A", one("a"))
    load(books, "B", one("b"))
    assert books.hold("A")
    books.release("A")
    assert load(books, "C", one("c")).moves.device == ("b",)
    assert held(books) == {"a", "c"}
    assert held(books, "host") == {"a", "b", "c"}


def test_what_is_leased_stays_and_the_next_one_waits() -> None:
    books = tiers(10)
    load(books, "A", one("a"), release=False)
    assert ask(books, "B", one("b")) is None
    books.release("A")
    assert ask(books, "B", one("b")) is not None
    assert books.part("a").device is State.ABSENT


def test_what_is_wanted_next_leaves_last() -> None:
    books = tiers(30)
    for name in "ABC":
        load(books, name, one(name.lower()))
    books.know("D", [one("d", 20)])
    begun = books.begin("D", wanted=["A", "B"])
    assert begun.moves.device == ("c", "b")


def test_a_shared_part_is_counted_once_and_stays_while_another_model_has_it() -> None:
    books = tiers(40)
    load(books, "A", one("a"), one("x"))
    assert load(books, "B", one("b"), one("x")).copy == ("b",)
    assert books.device_bytes == 30
    assert books.model_bytes("A") == (20, 20)
    assert load(books, "C", one("c", 20)).moves.device == ("a",)
    assert held(books) == {"b", "c", "x"}


def test_exclusive_parts_of_one_idle_model_go_before_shared_ones() -> None:
    books = tiers(50)
    load(books, "A", one("x"), one("a"))
    load(books, "B", one("x"), one("b"))
    load(books, "C", one("c"))
    assert load(books, "D", one("d"), one("e")).moves.device == ("a",)
    assert load(books, "E", one("f", 20)).moves.device == ("x", "b")


def test_one_of_the_same_architecture_that_leaves_gives_its_place() -> None:
    books = tiers(30)
    load(books, "A", one("a", 10, "unet"), one("x", 10, "vae"))
    assert dict(load(books, "B", one("b", 10, "unet")).onto) == {}
    assert dict(load(books, "C", one("c", 10, "unet")).onto) == {"c": "a"}


def test_a_single_model_larger_than_the_budget_is_tried_when_nothing_else_is_there() -> None:
    books = tiers(10, 10)
    load(books, "A", one("a"), release=False)
    assert ask(books, "B", one("b", 15), one("c", 15)) is None
    books.release("A")
    load(books, "B", one("b", 15), one("c", 15))
    assert held(books) == {"b", "c"}
    assert books.begin_read("b")[0] is Turn.READ  # the host had room for one of them at a time


def test_what_cannot_fit_is_said_with_the_numbers() -> None:
    books = tiers(20, capacity=100)
    books.know("big", [one("a", 101)])
    with pytest.raises(NeverFits) as fault:
        books.begin("big")
    assert (fault.value.needed, fault.value.limit) == (101, 100)
    load(books, "P", one("x"))
    books.pin("P", "device")
    books.know("B", [one("b", 15)])
    with pytest.raises(NeverFits) as fault:
        books.begin("B")
    assert (fault.value.needed, fault.value.limit, fault.value.pinned) == (15, 20, 10)
    books.pin("P", None)
    assert ask(books, "B", one("b", 15))


def test_short_of_ram_the_host_copy_of_what_the_device_has_is_dropped() -> None:
    books = tiers(30, 10)
    load(books, "A", one("a"), release=False)
    load(books, "B", one("b"), release=False)
    assert held(books) == {"a", "b"}
    assert held(books, "host") == {"b"}
    assert books.host_bytes == 10


def test_what_is_read_already_is_placed_first_so_that_two_loads_do_not_wait_for_each_other() -> None:
    """Each has one part in the host's memory, which has room for no third: placed, it makes room."""
    books = tiers(40, 20)
    pieces = {"A": [one("a"), one("x")], "B": [one("b"), one("y")]}
    for model, key in (("A", "x"), ("B", "y")):
        books.know(model, pieces[model])
        assert books.begin_read(key, ahead_of=())[0] is Turn.READ
        books.read_done(key)
    first, second = (ask(books, model, *pieces[model]) for model in "AB")
    assert (first.copy, second.copy) == (("x", "a"), ("y", "b"))
    assert books.begin_read("a")[0] is Turn.FULL
    books.placed("x")
    turn, moves = books.begin_read("a")
    assert (turn, moves.host) == (Turn.READ, ("x",))


def test_where_the_device_computes_in_the_hosts_memory_its_copy_stays() -> None:
    books = tiers(30, 20, shared=True)
    load(books, "A", one("a"), release=False)
    load(books, "B", one("b"), release=False)
    assert ask(books, "C", one("c")) is None
    books.release("A")
    begun = ask(books, "C", one("c"))
    assert (begun.moves.device, begun.moves.host) == (("a",), ("a",))
    assert books.host_bytes == 20


def test_reading_ahead_makes_no_room_of_what_is_leased_or_wanted_sooner() -> None:
    books = tiers(10, 20)
    load(books, "A", one("a"), release=False)
    books.know("B", [one("b")])
    assert books.begin_read("b", ahead_of=())[0] is Turn.READ
    books.read_done("b")
    books.know("C", [one("c")])
    assert books.begin_read("c", ahead_of=("B",))[0] is Turn.FULL
    turn, moves = books.begin_read("c", ahead_of=("A",))
    assert (turn, moves.host) == (Turn.READ, ("b",))


def test_two_read_once() -> None:
    books = tiers(20)
    books.know("A", [one("a")])
    assert books.begin("A")
    assert books.begin_read("a")[0] is Turn.READ
    assert books.begin_read("a")[0] is Turn.BUSY
    books.read_done("a")
    assert books.begin_read("a")[0] is Turn.HELD


@pytest.mark.parametrize("shared", [True, False])
def test_a_fault_on_the_way_leaves_nothing_reserved(shared: bool) -> None:
    books = tiers(20, shared=shared)
    books.know("A", [one("a"), one("b")])
    begun = books.begin("A")
    books.begin_read("a")
    books.read_failed("a")
    books.abort(begun)
    assert (books.device_bytes, books.host_bytes, books.models()) == (0, 0, {})


def test_a_leased_model_that_is_dropped_goes_when_its_last_job_is_done() -> None:
    books = tiers(20)
    load(books, "A", one("a"), release=False)
    assert books.hold("A")
    assert not books.drop("A")
    assert not books.release("A")
    assert books.release("A").device == ("a",)
    assert books.models() == {}


def test_what_is_being_read_of_a_model_that_is_dropped_goes_when_it_is_there_unless_the_model_is_wanted_again() -> None:
    books = tiers(20)
    for wanted in (False, True):
        books.know("A", [one("a"), one("b")])
        assert books.begin_read("a", ahead_of=())[0] is Turn.READ
        books.read_done("a")
        assert books.begin_read("b", ahead_of=())[0] is Turn.READ
        assert books.drop("A").host == ("a",)
        if not wanted:
            assert books.read_done("b").host == ("b",)
            assert books.models() == {}
    assert books.begin("A")
    assert not books.read_done("b")
    books.placed("b")
    assert not books.release("A")
    assert held(books) == {"b"}


def test_what_is_being_read_of_an_offloaded_model_that_is_dropped_goes_when_it_is_there() -> None:
    books = tiers(20)
    books.know("A#model", [one("room")], [one("a"), one("b")], "A")
    assert books.begin_read("a", ahead_of=())[0] is Turn.READ
    assert not books.drop("A#model")
    assert books.read_done("a").host == ("a",)
    assert books.models() == {}


def test_what_was_not_used_for_long_leaves_the_device_unless_it_is_pinned() -> None:
    books = tiers(40)
    for name in "ABC":
        load(books, name, one(name.lower()))
    books.pin("A", "device")
    assert books.expire(books.models()["C"].used).device == ("b",)
    assert held(books, "host") == {"a", "b", "c"}


MODELS = {
    "M0": [one("a", 6, "u"), one("x", 3, "t"), one("y", 2, "v")],
    "M1": [one("b", 6, "u"), one("x", 3, "t"), one("y", 2, "v")],
    "M2": [one("c", 6, "u"), one("x", 3, "t"), one("z", 2, "v")],
    "M3": [one("d", 5, "w"), one("e", 7, "s")],
    "M4": [one("f", 30, "huge")],
}
IN_HOST: dict[str, list[Piece]] = {}
"""Of the offloaded ones, which are the same models held in another way: their parts in the host's memory."""
for full, size in (("M0", 7), ("M1", 6), ("M4", 9)):
    MODELS[f"{full}#model"] = [one(f"{full}#model", size)]
    IN_HOST[f"{full}#model"] = MODELS[full]
PIECES = {piece.key: piece for pieces in MODELS.values() for piece in pieces}
NAMES = st.sampled_from(sorted(MODELS))
APART = st.sampled_from(sorted(set(MODELS) - set(IN_HOST)))
"""Those that are held as they are."""


def know(books: Tiers, name: str) -> None:
    books.know(name, MODELS[name], IN_HOST.get(name, ()), name.partition("#")[0] if name in IN_HOST else None)


class Loading:
    """One who brings a model onto the device, step by step."""

    def __init__(self, begun: Begun) -> None:
        self.begun, self.todo, self.reading = begun, list(begun.copy), ""
        self.to_read, self.room = list(begun.read), begun.model in IN_HOST


class Machine(RuleBasedStateMachine):
    """Jobs, loaders and one who reads ahead, in any order, with faults anywhere.

    Keeps its own account of what is where from what it was told to bring and to forget, as the cache does.
    """

    shared = False

    def __init__(self) -> None:
        super().__init__()
        self.books = tiers(20, 24, shared=self.shared)
        self.loading: list[Loading] = []
        self.leases: list[str] = []
        self.ahead: list[str] = []
        self.device, self.host = set[str](), set[str]()

    def forget(self, moves) -> None:
        for key in moves.device:
            self.device.remove(key)
        for key in moves.host:
            self.host.remove(key)
        used = {k for name in self.leases for k in (p.key for p in MODELS[name])}
        assert not used & set(moves.device)
        leased = [*self.leases, *(one.begun.model for one in self.loading)]
        assert not {p.key for name in leased for p in IN_HOST.get(name, ())} & set(moves.host)

    @rule(name=NAMES, wanted=st.lists(NAMES, unique=True, max_size=2), evict=st.booleans())
    def ask(self, name: str, wanted: list[str], evict: bool) -> None:
        if self.shared and name in IN_HOST:
            return
        if self.books.hold(name):
            self.leases.append(name)
            return
        know(self.books, name)
        before = self.books.device_bytes
        try:
            begun = self.books.begin(name, wanted, evict=evict)
        except NeverFits as fault:
            assert fault.needed + fault.pinned > fault.limit
            assert fault.pinned or (name == "M4#model" and fault.tier == "host")
            return
        if begun is None:
            assert not evict or self.busy(), "nothing would end this wait"
            assert self.books.device_bytes == before
            return
        for key, old in begun.onto.items():
            assert PIECES[key].architecture == PIECES[old].architecture
            assert old in begun.moves.device
        self.forget(begun.moves)
        self.loading.append(Loading(begun))

    def busy(self) -> bool:
        return bool(self.leases or self.loading or self.ahead)

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fault=st.sampled_from([False, False, False, True]))
    def go_on(self, data, fault: bool) -> None:
        self.step(data.draw(st.sampled_from(self.loading)), fault)

    def step(self, one: Loading, fault: bool) -> bool:
        """One step of a load; whether there was one to make."""
        if one.room and (one.to_read or one.todo):
            return self.step_offloaded(one, fault)
        return self.step_apart(one, fault)

    def step_apart(self, one: Loading, fault: bool) -> bool:
        if not one.todo:
            self.loading.remove(one)
            if self.books.resident(one.begun.model) and not fault:
                self.leases.append(one.begun.model)
            else:  # another was to bring a part, and could not, or is not there yet
                self.forget(self.books.abort(one.begun))
            return True
        if one.reading:
            key, one.reading = one.reading, ""
            if fault:
                self.forget(self.books.read_failed(key))
                self.give_up(one)
            else:
                self.host.add(key)
                self.forget(self.books.read_done(key))
            return True
        for key in sorted(one.todo, key=lambda key: self.books.part(key).host is not State.HELD):
            try:
                turn, moves = self.books.begin_read(key)
            except NeverFits:
                self.give_up(one)
                return True
            self.forget(moves)
            if turn is Turn.READ:
                one.reading = key
                return True
            if turn is Turn.HELD:
                if fault:
                    self.give_up(one)
                else:
                    self.books.placed(key)
                    self.device.add(key)
                    one.todo.remove(key)
                return True
        return False

    def step_offloaded(self, one: Loading, fault: bool) -> bool:
        """One step of a load of a model whose parts stay in the host's memory, where all of them have room."""
        if one.reading:
            key, one.reading = one.reading, ""
            if fault:
                self.books.read_failed(key)
                self.give_up(one)
            else:
                self.books.read_done(key)
                self.host.add(one.to_read.pop(0))
        elif one.to_read:
            turn, moves = self.books.begin_read(one.to_read[0])
            assert turn is not Turn.FULL and not moves
            if turn is Turn.BUSY:
                return False
            if turn is Turn.HELD:
                one.to_read.pop(0)
            one.reading = one.to_read[0] if turn is Turn.READ else ""
        elif fault or not self.books.coming(one.begun.model):
            self.give_up(one)
        elif not self.books.in_host(one.begun.model):
            return False
        else:
            self.books.placed(one.todo[0])
            self.device.add(one.todo.pop(0))
        return True

    def give_up(self, one: Loading) -> None:
        self.loading.remove(one)
        self.forget(self.books.abort(one.begun))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def done(self, data) -> None:
        self.finish(data.draw(st.sampled_from(self.leases)))

    def finish(self, name: str) -> None:
        self.leases.remove(name)
        self.forget(self.books.release(name))

    @rule(name=APART, data=st.data(), spare=st.lists(NAMES, unique=True, max_size=2))
    def read_ahead(self, name: str, data, spare: list[str]) -> None:
        self.begin_ahead(name, data.draw(st.sampled_from(MODELS[name])).key, spare)

    def begin_ahead(self, name: str, key: str, spare: list[str]) -> None:
        know(self.books, name)
        turn, moves = self.books.begin_read(key, ahead_of=spare)
        self.forget(moves)
        if turn is Turn.READ:
            self.ahead.append(key)

    @precondition(lambda self: self.ahead)
    @rule(fault=st.booleans())
    def read_ahead_done(self, fault: bool) -> None:
        key = self.ahead.pop()
        if fault:
            self.forget(self.books.read_failed(key))
        else:
            self.host.add(key)
            self.forget(self.books.read_done(key))

    @rule(name=APART, tier=st.sampled_from([None, None, "device", "host"]))
    def pin(self, name: str, tier: str | None) -> None:
        self.books.pin(name, tier)

    @rule(name=NAMES, to=st.sampled_from(["disk", "host"]))
    def drop(self, name: str, to: str) -> None:
        self.forget(self.books.drop(name, to))

    @rule(name=NAMES)
    def renew(self, name: str) -> None:
        """Its files were replaced; here, by such of the same parts."""
        if before := self.books.models().get(name):
            pin, moves = before.pin, self.books.renew(name, MODELS[name])
            assert moves is not None or self.busy()
            if moves is not None:
                assert self.books.models()[name].pin == pin
                self.forget(moves)

    @rule(back=st.integers(0, 40))
    def expire(self, back: int) -> None:
        pinned = {p.key for k, m in self.books.models().items() if m.pin == "device" for p in MODELS[k]}
        moves = self.books.expire(max((m.used for m in self.books.models().values()), default=0) - back)
        assert not pinned & set(moves.device)
        self.forget(moves)

    @rule()
    def clear(self) -> None:
        self.forget(self.books.clear_idle())

    @invariant()
    def bytes_are_conserved(self) -> None:
        for account, tier in ((self.device, "device"), (self.host, "host")):
            assert account == held(self.books, tier)
        coming = {key for key in PIECES if (p := self.books.part(key)) and p.device is State.COMING}
        assert self.books.device_bytes == sum(PIECES[key].bytes for key in self.device | coming)
        assert coming == {key for one in self.loading for key in one.todo}

    @invariant()
    def budgets_hold(self) -> None:
        for tier, limit in (("device", 20), ("host", 24)):
            there = {k for k in PIECES if (p := self.books.part(k)) and getattr(p, tier) is not State.ABSENT}
            single = there and any(there <= {p.key for p in pieces} for pieces in MODELS.values())
            if tier == "host" and any(name in IN_HOST for name in self.leases):
                single = False  # of an offloaded model all is there at once, so that one alone is no exception
            assert sum(PIECES[key].bytes for key in there) <= limit or single

    @invariant()
    def what_is_in_use_is_there(self) -> None:
        for name in self.leases:
            assert {p.key for p in MODELS[name]} <= self.device
            assert {p.key for p in IN_HOST.get(name, ())} <= self.host
        for name in self.device & set(IN_HOST):
            assert {p.key for p in IN_HOST[name]} <= self.host, "a room without what goes into it"
        if self.shared:
            assert self.device <= self.host
        counts = {name: model.leases for name, model in self.books.models().items() if model.leases}
        expected = [*self.leases, *(one.begun.model for one in self.loading)]
        assert counts == {name: expected.count(name) for name in expected}

    def teardown(self) -> None:
        """From any state everything that is under way ends, and then everything can leave."""
        while self.ahead:
            self.read_ahead_done(False)
        while self.loading or self.leases:
            moved = [self.step(one, False) for one in list(self.loading)]
            if not any(moved):
                assert self.leases, "loads wait for each other for ever"
                self.finish(self.leases[0])
        for model in self.books.models().values():
            assert not model.leaving
        for name in MODELS:
            self.books.pin(name, None)
            self.forget(self.books.drop(name))
        for name in MODELS:  # parts that were left where a model was no longer whole
            self.forget(self.books.drop(name))
        assert (self.books.device_bytes, self.books.host_bytes, self.books.models()) == (0, 0, {})


class SharedMachine(Machine):
    shared = True


TestApart = Machine.TestCase
TestShared = SharedMachine.TestCase
TestApart.settings = TestShared.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_load_places_what_is_read_ahead_for_it_before_it_asks_for_more_room() -> None:
    """Else the part that it waits to read has no room beside those that are read ahead for pinned models."""
    it = Machine()
    it.begin_ahead("M1", "b", [])
    it.pin("M1", "device")
    it.ask("M0", [], False)
    it.begin_ahead("M0", "x", [])
    it.begin_ahead("M3", "d", [])
    it.pin("M3", "device")
    it.begin_ahead("M3", "e", [])
    it.teardown()


def test_the_pieces_are_what_the_machine_thinks() -> None:
    assert replace(PIECES["x"]) in MODELS["M0"]
    assert PIECES["f"].bytes > 24
