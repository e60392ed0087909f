"""A process that has no descriptor left."""
import contextlib
import gc
import os
import resource


@contextlib.contextmanager
def nothing_left(but=0):
    """The next open fails with EMFILE, until one of those that are open is closed: whichever, for no number below them is free. Or the
    next one after as many as `but`."""
    gc.collect()                        # what other tests left might close a descriptor in between
    fillers = [os.open("/", os.O_RDONLY)]
    while fillers[-1] < max(map(int, os.listdir("/proc/self/fd"))) - 1:     # of which one is the listing's own
        fillers.append(os.open("/", os.O_RDONLY))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + but, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers:
            os.close(fd)
