import resource
import threading

import pytest
import torch

from spectreg_lab.training.memory import keep_freed_memory
from spectreg_lab.training.writer import Writer


def test_tasks_are_done_in_order_each_after_the_one_before():
    done, gate = [], threading.Event()

    def first():
        gate.wait(60)
        done.append(1)

    with Writer() as write:
        write(first)
        threading.Timer(0.05, gate.set).start()
        write(lambda: done.append(2))
        assert done[0] == 1, "the second task was taken before the first was done"
    assert done == [1, 2]


def fail():
    raise OSError("the disk is full")


def test_an_error_in_a_task_is_raised_by_the_next_call_or_on_exit():
    with Writer() as write:
        write(fail)
        with pytest.raises(OSError, match="the disk is full"):
            write(lambda: None)
    with pytest.raises(OSError, match="the disk is full"), Writer() as write:
        write(fail)


def interrupted(task):
    with Writer() as write:
        write(task)
        raise KeyboardInterrupt


def test_an_error_outside_is_not_hidden_and_the_last_task_is_done_before_it_is_raised():
    done = []
    for task in (lambda: done.append(1), fail):
        with pytest.raises(KeyboardInterrupt):
            interrupted(task)
    assert done == [1]


def test_memory_that_is_freed_stays_with_the_process():
    if not keep_freed_memory():
        pytest.skip("the C library of this system has no mallopt")
    page, size = resource.getpagesize(), 2**25
    torch.ones(size, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(size, dtype=torch.uint8)
    taken_anew = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (size / page)
    assert taken_anew < 3  # of 10: once or twice the space that was freed has been cut by something small in between
