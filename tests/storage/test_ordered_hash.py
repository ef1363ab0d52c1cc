from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mergewell.errors import MergewellError
from mergewell.storage.ordered_hash import OrderedHash

CONTENT = bytes(range(100))


def start(reads: list[tuple[int, int]] | None = None) -> OrderedHash:
    def read_back(count: int, offset: int) -> bytes:
        if reads is not None:
            reads.append((offset, count))
        return CONTENT[offset : offset + count]

    return OrderedHash("xxh3-128", read_back)


def expected(length: int = 100) -> str:
    return f"xxh3-128:{xxhash.xxh3_128(CONTENT[:length]).hexdigest()}"


@given(st.sets(st.integers(1, 99)), st.randoms(use_true_random=False))
def test_any_order_gives_the_hash_of_the_file(cuts, random):
    ends = [*sorted(cuts), 100]
    pieces = list(zip([0, *ends], ends, strict=False))
    random.shuffle(pieces)
    hashed = start()
    for begin, end in pieces:
        hashed.add(begin, memoryview(CONTENT[begin:end]))
    assert (hashed.position, hashed.value()) == (100, expected())


def test_pieces_in_order_are_not_read_back():
    reads: list[tuple[int, int]] = []
    hashed = start(reads)
    for begin in range(0, 100, 10):
        hashed.add(begin, memoryview(CONTENT[begin : begin + 10]))
    assert reads == [] and hashed.value() == expected()


def test_a_late_piece_is_read_back_once():
    reads: list[tuple[int, int]] = []
    hashed = start(reads)
    hashed.add(30, memoryview(CONTENT[30:]))
    hashed.add(0, memoryview(CONTENT[:30]))
    assert reads == [(30, 70)] and hashed.value() == expected()


def test_a_hole_stops_the_position():
    hashed = start()
    hashed.add(0, memoryview(CONTENT[:30]))
    hashed.add(31, memoryview(CONTENT[31:]))
    assert (hashed.position, hashed.value()) == (30, expected(30))


@pytest.mark.parametrize("begin", [0, 5, 40])
def test_a_second_write_is_refused(begin: int):
    hashed = start()
    hashed.add(0, memoryview(CONTENT[:30]))
    hashed.add(40, memoryview(CONTENT[40:50]))
    with pytest.raises(MergewellError, match=f"Byte {begin} was written twice"):
        hashed.add(begin, memoryview(CONTENT[begin : begin + 10]))


def test_an_overlap_never_reaches_the_end():
    hashed = start()
    hashed.add(20, memoryview(CONTENT[20:]))
    hashed.add(0, memoryview(CONTENT[:30]))
    assert hashed.position == 30


def test_a_file_that_lost_bytes_is_an_error():
    hashed = OrderedHash("sha256", lambda _count, _offset: b"")
    hashed.add(30, memoryview(CONTENT[30:]))
    with pytest.raises(OSError, match="byte 30 cannot be read back"):
        hashed.add(0, memoryview(CONTENT[:30]))


def test_many_threads_give_the_hash_of_the_file():
    for _ in range(30):
        hashed = start()
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(hashed.add, i, memoryview(CONTENT[i : i + 1])) for i in range(100)]
            for job in jobs:
                job.result()
        assert (hashed.position, hashed.value()) == (100, expected())


def test_a_piece_that_comes_while_another_is_hashed_waits_its_turn():
    def read_back(count: int, offset: int) -> bytes:
        if offset == 30:  # as if from another thread
            hashed.add(60, memoryview(CONTENT[60:]))
        return CONTENT[offset : offset + count]

    hashed = OrderedHash("xxh3-128", read_back)
    hashed.add(30, memoryview(CONTENT[30:60]))
    hashed.add(0, memoryview(CONTENT[:30]))
    assert (hashed.position, hashed.value()) == (100, expected())
