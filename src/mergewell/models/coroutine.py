"""Coroutine: a function in a thread of its own that runs only while somebody waits for it.

So the forward pass of any module can be stopped in the middle and taken up again. One thread runs
at a time, hence the order of all that happens is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Semaphore, Thread, local
from typing import Any

_HERE = local()


class _Closed(BaseException):
    """Unwinds the stack of a function whose caller has given up."""


class Coroutine:
    """Runs `function` in steps: `resume` lets it go on until it asks for something or returns."""

    def __init__(self, function: Callable[[], Any]) -> None:
        """Prepare; nothing runs before the first `resume`."""
        self._function = function
        self._thread = Thread(target=self._run, name="mergewell walk", daemon=True)
        self._go, self._stop = Semaphore(0), Semaphore(0)
        self._answer: Any = None
        self._error: BaseException | None = None
        self._closing = False
        self.request: Any = None
        """What the function has asked for; None when it has returned."""
        self._result: Any = None
        self.is_done = False

    def resume(self, answer: Any = None) -> None:
        """Answer the last request and wait until the next, or the end.

        Raises whatever the function raised, as it was raised.
        """
        self._answer, self.request = answer, None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        del answer
        self._stop.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def ask(self, request: Any) -> Any:
        """Hand a request to the caller of `resume` and return the answer; for the function."""
        if self._closing:
            raise _Closed
        self.request = request
        del request
        self._stop.release()
        self._go.acquire()
        if self._closing:
            raise _Closed
        answer, self._answer = self._answer, None
        return answer

    def take(self) -> Any:
        """Return what the function returned, once: it is not kept any longer."""
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Unwind the function where it stands and wait for its thread to end."""
        self._closing = True
        self.request = self._answer = None
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()
        self.is_done = True

    def _run(self) -> None:
        _HERE.coroutine = self
        try:
            self._result = self._function()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.is_done = True
            self._stop.release()


def running() -> Coroutine | None:
    """Return the coroutine that this code runs in, if it runs in one."""
    return getattr(_HERE, "coroutine", None)
