"""The memory of a training process on a CPU."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEEP = 2**30  # bytes


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees for the next step, as the allocator of a GPU does.

    glibc gives large tensors back to the system at once, and takes them anew in every step: at a batch of 1,024 images
    the page faults of that cost up to as much as the step itself. The process stays as large as its largest step.

    Returns:
        Whether the C library has these settings; nothing is changed where it has not.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, KEEP) and mallopt(TRIM_THRESHOLD, KEEP))
