"""A process that has no descriptor left."""
import contextlib
import gc
import os
import resource


@contextlib.contextmanager
def nothing_left():
    """The next open fails with EMFILE."""
    gc.collect()                        # what other tests left might close a descriptor in between
    free = os.open("/", os.O_RDONLY)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
