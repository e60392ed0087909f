"""What happens, told to whoever listens: one queue a listener, each of limited length.

A listener that does not read loses the stream with a last event `lost`; it never holds the daemon up.
"""
from __future__ import annotations

import asyncio
import time

QUEUE_LIMIT = 1000


class Events:
    def __init__(self) -> None:
        self.queues: set[asyncio.Queue[dict | None]] = set()

    def publish(self, event: str, domain: str | None = None, *, uuid: str | None = None, id: int | None = None,
                type: str | None = None, detail: str | None = None) -> None:
        if self.queues:
            self.send({"time": time.time(), "event": event, "domain": domain, "uuid": uuid, "id": id, "type": type,
                       "detail": detail})

    def send(self, message: dict) -> None:
        for queue in list(self.queues):
            if queue.qsize() < QUEUE_LIMIT:
                queue.put_nowait(message)
            elif queue.qsize() == QUEUE_LIMIT:
                queue.put_nowait({**message, "event": "lost", "type": None, "detail": "the reader was too slow"})
                queue.put_nowait(None)
                self.queues.discard(queue)

    def close(self) -> None:
        """Ends every stream."""
        for queue in self.queues:
            queue.put_nowait(None)
        self.queues.clear()

    def listen(self) -> Listener:
        """Hears what is published from this call on, until it is closed."""
        queue: asyncio.Queue[dict | None] = asyncio.Queue()
        self.queues.add(queue)
        return Listener(self, queue)


class Listener:
    def __init__(self, events: Events, queue: asyncio.Queue[dict | None]):
        self.events, self.queue = events, queue

    def close(self) -> None:
        self.events.queues.discard(self.queue)

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> dict:
        message = await self.queue.get()
        if message is None:
            raise StopAsyncIteration
        return message
