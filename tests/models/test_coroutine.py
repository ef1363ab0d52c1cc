"""Functions that stop in the middle, in threads that never outlive them."""

import threading

import pytest

from mergewell.models.coroutine import Coroutine, running


def asking() -> int:
    here = running()
    assert here is not None
    first = here.ask("a")
    return first + here.ask("b")


def test_requests_and_answers_alternate() -> None:
    one = Coroutine(asking)
    one.resume()
    assert (one.request, one.is_done) == ("a", False)
    one.resume(3)
    assert one.request == "b"
    one.resume(4)
    assert (one.request, one.is_done) == (None, True)
    assert (one.take(), one.take()) == (7, None)
    assert running() is None


def test_an_error_surfaces_as_it_was_raised() -> None:
    error = ValueError("mine")

    def failing() -> None:
        raise error

    with pytest.raises(ValueError) as raised:
        Coroutine(failing).resume()
    assert raised.value is error


def test_closing_unwinds_and_ends_the_thread() -> None:
    unwound: list[int] = []
    before = threading.active_count()

    def waiting() -> None:
        try:
            running().ask("never answered")
        except Exception:
            unwound.append(-1)  # a model's own error handling must not catch it
        finally:
            unwound.append(1)
            running().ask("again")

    one = Coroutine(waiting)
    one.resume()
    assert threading.active_count() == before + 1
    one.close()
    assert unwound == [1] and threading.active_count() == before
    Coroutine(waiting).close()  # never begun
