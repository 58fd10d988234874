"""What leaves which tier to make room for what: the rules. They read the books and change nothing in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from api.engine.books import Books, NeverFits, Part, State, total


class Leaving(NamedTuple):
    """Parts that leave the device, and those that leave the host's memory."""

    device: Sequence[Part] = ()
    host: Sequence[Part] = ()


def for_model(
    books: Books, model: str, missing: Sequence[Part], wanted: Sequence[str], *, evict: bool
) -> Leaving | None:
    """What makes room for a model on the device, and for what has to be read for it.

    Args:
        books: as they are.
        model: that is to come.
        missing: its parts that are not on the device, nor on their way there.
        wanted: models that others will ask for, the next one first: they are evicted last.
        evict: whether others may be evicted at all.

    Returns:
        None when it has to wait until leases have ended.

    Raises:
        NeverFits: not even then.
    """
    mine, weights = books.of(model), books.weights(model)
    check_possible(books, mine, books.offloaded(model))
    off_device, off_host = list[Part](), list[Part]()
    victims = _evictable(books, model, mine, wanted) if evict else iter(())
    short = total(missing) and books.device_bytes + total(missing) - books.device_limit
    while short > 0 and (victim := next(victims, None)):
        off_device.append(victim)
        short -= victim.bytes
    if short > 0 and any(p.device is not State.ABSENT for p in _others(books, mine, off_device)):
        return None
    if not books.shared and not books.offloaded(model):
        return Leaving(off_device, off_host)
    to_read = [part for part in books.offloaded(model) or missing if part.host is State.ABSENT]
    short = total(to_read) and books.host_bytes + total(to_read) - books.host_limit
    while short > 0:
        droppable = _droppable(books, off_device, None) if evict else iter(())
        drop = next((p for p in droppable if p not in off_host and p not in weights), None)
        if drop:
            off_host.append(drop)
            short -= drop.bytes
        elif books.shared and (victim := next(victims, None)):
            off_device.append(victim)
        else:
            break
    if short > 0 and any(p.host is not State.ABSENT for p in _others(books, weights, off_host)):
        return None
    return Leaving(off_device, off_host)


def for_reading(books: Books, part: Part, ahead_of: Collection[str] | None) -> Leaving | None:
    """What makes room in the host's memory for a part.

    Args:
        books: as they are.
        part: that is not there.
        ahead_of: it is read ahead, and makes room only of what nobody leases and none of these models has;
            None: a model that is leased needs it.

    Returns:
        None when there is no room for it now.

    Raises:
        NeverFits: there is no lease that would end.
    """
    gone, short = list[Part](), books.host_bytes + part.bytes - books.host_limit
    for other in _droppable(books, (), ahead_of):
        if short <= 0:
            break
        gone.append(other)
        short -= other.bytes
    if short > 0:
        left = [p for p in books.parts.values() if p.host is not State.ABSENT and p not in gone]
        if ahead_of is not None:
            return None
        if left:
            if all(_is_fixed(books, p) for p in left):
                raise NeverFits(part.bytes, books.host_limit, total(left), "host")
            return None
    return Leaving((), gone)


def of_model(books: Books, model: str, to: str) -> Leaving:
    """What leaves with a model that nobody leases: the parts that no other one needs.

    Args:
        books: as they are.
        model: that leaves.
        to: ``host``: the device only; ``disk``: the host's memory as well.
    """

    def needs_device(key: str) -> bool:
        other = books.models[key]
        return other.pin == "device" or (other.left is None and books.is_resident(key))

    off_device = _exclusive(books, model, needs_device, books.of)
    off_device = [part for part in off_device if part.device is State.HELD]
    if to != "disk":
        return Leaving(off_device)
    full = books.models[model].full or model  # in whichever way it is held, it is one to who has it dropped

    def needs(key: str) -> bool:
        other = books.models[key]
        wanted = other.left != "disk" and full not in (key, other.full)
        return other.pin is not None or (wanted and books.is_warm(key))

    off_host = _exclusive(books, model, needs, books.weights)
    stays = (State.HELD, State.COMING) if books.shared else (State.COMING,)
    off_host = [p for p in off_host if p.host is State.HELD and (p in off_device or p.device not in stays)]
    return Leaving(off_device, off_host)


def of_idle(books: Books) -> Leaving:
    """Everything that nobody leases or pins: what may leave the device, and memory where the device is the host's."""
    off_device = list(_evictable(books, None, (), ()))
    return Leaving(off_device, list(_droppable(books, off_device, None)) if books.shared else ())


def letting_go(books: Books, size: int) -> Leaving:
    """What leaves the host's memory to make room for so many bytes of another worker: what no job uses.

    Args:
        books: as they are.
        size: bytes; less may be found.
    """
    off_device, off_host = list[Part](), list[Part]()
    victims = _evictable(books, None, (), ()) if books.shared else iter(())
    while size > 0:
        if drop := next((part for part in _droppable(books, off_device, None) if part not in off_host), None):
            off_host.append(drop)
            size -= drop.bytes
        elif victim := next(victims, None):
            off_device.append(victim)
        else:
            break
    return Leaving(off_device, off_host)


def check_possible(books: Books, mine: Collection[Part], in_host: Collection[Part] = ()) -> None:
    """Whether there would be room for a model of these parts, if all leases ended.

    Args:
        books: as they are.
        mine: what it has on the device.
        in_host: what it has in the host's memory, if it is offloaded.

    Raises:
        NeverFits: there would not.
    """
    needed = total(mine)
    if books.capacity is not None and needed > books.capacity:
        raise NeverFits(needed, books.capacity, 0, "device")
    others = [part for part in books.parts.values() if part not in mine and books.is_pinned(part)]
    pinned = total(p for p in others if p.device is not State.ABSENT and books.is_pinned(p, "device"))
    if pinned and needed + pinned > books.device_limit:
        raise NeverFits(needed, books.device_limit, pinned, "device")
    pinned = total(part for part in others if part.host is not State.ABSENT and part not in in_host)
    if in_host and total(in_host) + pinned > books.host_limit:  # unlike one on the device, it is there all at once
        raise NeverFits(total(in_host), books.host_limit, pinned, "host")
    if books.shared and pinned and needed + pinned > books.host_limit:
        raise NeverFits(needed, books.host_limit, pinned, "host")


def take_over(missing: Iterable[Part], leaving: Iterable[Part]) -> dict[str, str]:
    """Which of those that come take the place of which that leave the device."""
    free, onto = list(leaving), dict[str, str]()
    for part in missing:
        if same := next((other for other in free if other.architecture == part.architecture), None):
            free.remove(same)
            onto[part.key] = same.key
    return onto


def _evictable(books: Books, model: str | None, mine: Collection[Part], wanted: Sequence[str]) -> Iterator[Part]:
    """Parts that may leave the device, in the order in which they should.

    First what belongs to no whole model, then the parts of one model after the other that no other one has: those
    that nobody wants, least recently used first, then those that are wanted last.
    """
    kept = {part.key for part in mine}
    for known in books.models.values():
        if known.leases or known.pin == "device":
            kept.update(known.parts)
    held = [part for part in books.parts.values() if part.device is State.HELD and part.key not in kept]
    ranks = {key: -rank for rank, key in enumerate(wanted)}
    staying = {key for key in books.models if key != model and books.is_resident(key)}
    order = sorted(staying, key=lambda key: (key in ranks, ranks.get(key, 0), books.models[key].used))
    for gone in [None, *order]:
        staying.discard(gone or "")
        for part in sorted(held, key=lambda part: part.used):
            if not part.models & staying:
                held.remove(part)
                yield part


def _droppable(books: Books, off_device: Collection[Part], ahead_of: Collection[str] | None) -> Iterator[Part]:
    """Parts that may leave the host's memory, least recently used first.

    Args:
        books: as they are.
        off_device: parts that are about to leave the device.
        ahead_of: see ``for_reading``.
    """
    for part in sorted(books.parts.values(), key=lambda part: part.used):
        if part.host is not State.HELD or part.device is State.COMING or books.is_pinned(part, "host"):
            continue
        if books.is_used_in_host(part):
            continue
        leased = books.is_leased(part)
        if part.device is State.HELD and part not in off_device:
            if books.shared or (ahead_of is not None and leased):
                continue
        elif leased or books.is_pinned(part):
            continue
        if ahead_of is None or not (part.models | part.offloaded) & set(ahead_of):
            yield part


def _is_fixed(books: Books, part: Part) -> bool:
    return books.is_pinned(part) and part.host is State.HELD and part.device is not State.COMING


def _others(books: Books, mine: Collection[Part], gone: Collection[Part]) -> list[Part]:
    return [part for part in books.parts.values() if part not in mine and part not in gone]


def _exclusive(books: Books, model: str, needs: Callable[[str], bool], has: Callable[[str], list[Part]]) -> list[Part]:
    """Parts of a model that no other one needs, besides those that are leased."""
    others = [key for key, known in books.models.items() if key != model and (known.leases or needs(key))]
    taken = {part.key for key in others for part in has(key)}
    return [part for part in has(model) if part.key not in taken]
