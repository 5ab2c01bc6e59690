"""Write an epoch to disk while the next one is being trained."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """A thread that carries out one task at a time, in order; a context manager, on whose exit all of them are done.

    An error in a task is raised by the next call, or on exit where no other error is on its way.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._last: Future[None] | None = None

    def __call__(self, task: Callable[[], None]) -> None:
        """Begin ``task`` as soon as the one before is done, which is waited for: never more than one is under way."""
        self.wait()
        self._last = self._thread.submit(task)

    def wait(self) -> None:
        """Until the last task is done."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self.wait()
