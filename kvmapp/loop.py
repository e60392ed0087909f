"""The control thread's event loop: descriptors, timers, and calls from signal handlers, on epoll.

One thread, no tasks: a callback runs to its end. It is a fraction of asyncio's import, and a domain process needs no more.
"""
import heapq
import os
import select
import time

READ, WRITE = select.EPOLLIN, select.EPOLLOUT


class Loop:
    """Callbacks by descriptor. An exception that a callback raises ends `run` with it."""

    def __init__(self):
        self.epoll = select.epoll()
        self.callbacks = {}
        self.timers = []
        self.soon = []
        self.running = False
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self.wake_fd, self.drain)

    def watch(self, fd: int, callback, events: int = READ) -> None:
        """Calls `callback(events)` whenever the descriptor is ready; watched again, only the wanted events change."""
        if fd in self.callbacks:
            self.epoll.modify(fd, events)
        else:
            self.epoll.register(fd, events)
        self.callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forgets the descriptor (before its owner closes it); unknown ones are no error."""
        if self.callbacks.pop(fd, None):
            self.epoll.unregister(fd)

    def later(self, seconds: float, callback) -> None:
        """Calls `callback()` once, after that time."""
        heapq.heappush(self.timers, (time.monotonic() + seconds, id(callback), callback))

    def call(self, callback) -> None:
        """Calls `callback()` in the loop, soon; may be used in signal handlers and other threads."""
        self.soon.append(callback)
        os.eventfd_write(self.wake_fd, 1)

    def stop(self) -> None:
        """Makes `run` return after the callbacks of this round."""
        self.running = False
        os.eventfd_write(self.wake_fd, 1)

    def run(self) -> None:
        """Serves callbacks until `stop`."""
        self.running = True
        while self.running:
            for fd, events in self.epoll.poll(self.patience()):
                callback = self.callbacks.get(fd)
                if callback:
                    callback(events)
            while self.timers and self.timers[0][0] <= time.monotonic():
                heapq.heappop(self.timers)[2]()

    def close(self) -> None:
        self.epoll.close()
        os.close(self.wake_fd)

    def patience(self) -> float:
        """Seconds until the next timer; -1 for ever."""
        return max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else -1

    def drain(self, _events: int) -> None:
        os.eventfd_read(self.wake_fd)
        calls, self.soon = self.soon, []
        for callback in calls:
            callback()
