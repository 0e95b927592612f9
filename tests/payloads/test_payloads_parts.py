"""What both stores promise for payloads that come in parts."""

from __future__ import annotations

import itertools
import threading

import pytest
from nexrl_contract.errors import ServiceError
from nexrl_payloads import PayloadStore

from tests.helpers.payloads import checksum, send_part, some_bytes

PARTS = [some_bytes(nbytes, seed) for seed, nbytes in enumerate([2_500_000, 700_001, 0, 3_000_000])]
WHOLE = b"".join(PARTS)


def content(store: PayloadStore, payload_id: str = "a") -> bytes:
    return b"".join(store.stream(payload_id))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
def test_any_order_gives_the_same_payload(store: PayloadStore, order: tuple[int, ...]) -> None:
    """Parts in any order make the same bytes, the same length and the same checksum."""
    for n in order:
        assert send_part(store, "a", n, PARTS[n]) == len(PARTS[n])
    assert store.parts("a") == [0, 1, 2, 3]
    assert store.nbytes("a") == len(WHOLE)
    ref = store.assemble("a", 4)
    assert b"".join(store.stream("a", ref.checksum)) == content(store) == WHOLE
    for n in range(4):
        send_part(store, "b", n, PARTS[n])
    assert store.assemble("b", 4).checksum == ref.checksum
    assert ref.nbytes == len(WHOLE)


def test_assembling_again_is_the_same(store: PayloadStore) -> None:
    """The same request again, also after a restart, gets the same answer; parts stay listed."""
    for n, data in enumerate(PARTS):
        send_part(store, "a", n, data)
    first = store.assemble("a", 4)
    assert store.assemble("a", 4) == first
    assert store.parts("a") == [0, 1, 2, 3]
    assert content(store) == WHOLE


def test_a_part_sent_again(store: PayloadStore) -> None:
    """A repeated part changes nothing: in its turn, before its turn, and after everything was put
    together."""
    send_part(store, "a", 0, PARTS[0])
    send_part(store, "a", 0, PARTS[0])
    send_part(store, "a", 3, PARTS[3])
    send_part(store, "a", 3, PARTS[3])
    send_part(store, "a", 1, PARTS[1])
    send_part(store, "a", 2, PARTS[2])
    store.assemble("a", 4)
    send_part(store, "a", 3, PARTS[3])
    assert content(store) == WHOLE


@pytest.mark.parametrize("n", [0, 1])
def test_a_part_with_other_bytes(store: PayloadStore, n: int) -> None:
    """A part that is there is not replaced by one with other bytes."""
    send_part(store, "a", n, PARTS[0])
    with pytest.raises(ServiceError) as error:
        send_part(store, "a", n, PARTS[1])
    assert error.value.code == "INVALID_ARGUMENT"
    send_part(store, "a", 1 - n, b"")
    store.assemble("a", 2)
    assert content(store) == PARTS[0]


@pytest.mark.parametrize("n", [0, 2])
def test_checksum_mismatch(store: PayloadStore, n: int) -> None:
    """Bytes that differ from what was sent are refused; the part is not there, and can be sent
    again."""
    with pytest.raises(ServiceError) as error:
        send_part(store, "a", n, PARTS[0], claimed=checksum(PARTS[1]))
    assert error.value.code == "CHECKSUM_MISMATCH"
    assert error.value.kind.retryable
    assert store.parts("a") == []
    send_part(store, "a", n, PARTS[1])
    assert store.parts("a") == [n]


def test_a_checksum_that_is_none(store: PayloadStore) -> None:
    """Text that cannot be a checksum is refused as such; None is accepted, capitals too."""
    with pytest.raises(ServiceError) as error:
        send_part(store, "a", 0, b"x", claimed="xyz")
    assert error.value.code == "INVALID_ARGUMENT"
    send_part(store, "a", 0, b"x", claimed=checksum(b"x").upper())
    with store.put_part("a", 1) as part:
        part.write(b"y")
        assert part.commit(None) == 1


def test_missing_parts_are_named(store: PayloadStore) -> None:
    """A payload cannot be put together with holes, with too few or with too many parts."""
    with pytest.raises(ServiceError) as error:
        store.assemble("a", 2)
    assert error.value.details["missing"] == [0, 1]
    for n in (0, 3):
        send_part(store, "a", n, PARTS[n])
    with pytest.raises(ServiceError) as error:
        store.assemble("a", 4)
    assert error.value.code == "INVALID_ARGUMENT"
    assert error.value.details["missing"] == [1, 2]
    for count in (0, 1, 3):
        with pytest.raises(ServiceError) as error:
            store.assemble("a", count)
        assert error.value.code == "INVALID_ARGUMENT"
    for n in (1, 2):
        send_part(store, "a", n, PARTS[n])
    with pytest.raises(ServiceError):
        store.assemble("a", 3)
    store.assemble("a", 4)
    with pytest.raises(ServiceError):
        send_part(store, "a", 4, b"late")
    assert content(store) == WHOLE


@pytest.mark.parametrize("n", [-1, 100_000, 10**12])
def test_part_numbers(store: PayloadStore, n: int) -> None:
    """A number that no part can have is refused."""
    with pytest.raises(ServiceError) as error:
        store.put_part("a", n)
    assert error.value.code == "INVALID_ARGUMENT"


def test_parts_at_once(store: PayloadStore) -> None:
    """Many connections send all parts, each part twice, at the same time: the payload is whole."""
    pieces = [some_bytes(200_000 + n, n) for n in range(12)]
    failures: list[BaseException] = []

    def send(n: int) -> None:
        try:
            send_part(store, "a", n, pieces[n])
        except ServiceError as error:
            failures.append(error)

    threads = [threading.Thread(target=send, args=(n,)) for n in [*range(12), *reversed(range(12))]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store.assemble("a", 12)
    assert content(store) == b"".join(pieces)


def test_a_stalled_repetition_does_not_stop_the_payload(store: PayloadStore) -> None:
    """A client gave up on a hanging connection and sent the part again by another: nobody waits for
    the first."""
    send_part(store, "a", 0, PARTS[0])
    stalled = store.put_part("a", 1)
    stalled.write(PARTS[1][:1000])
    send_part(store, "a", 1, PARTS[1])
    send_part(store, "a", 2, PARTS[3])
    store.assemble("a", 3)
    expected = PARTS[0] + PARTS[1] + PARTS[3]
    assert content(store) == expected
    stalled.write(b"nonsense" * 1000)
    with pytest.raises(ServiceError):
        stalled.commit(None)
    stalled.abort()
    assert content(store) == expected


def test_a_slow_repetition_that_ends_well(store: PayloadStore) -> None:
    """Both attempts at one part may succeed, in either order, and count once."""
    slow = store.put_part("a", 0)
    slow.write(PARTS[0][:1000])
    send_part(store, "a", 0, PARTS[0])
    slow.write(PARTS[0][1000:])
    assert slow.commit(checksum(PARTS[0])) == len(PARTS[0])
    store.assemble("a", 1)
    assert content(store) == PARTS[0]
