"""Clients that ask for the same verbs again and again, whether or not a daemon answers: what goes on while daemons are killed."""
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

from kvmapp.errors import KvmappError

VARIETY = 4


class Load:
    """One client for each list of (domain, verb, body); none of them minds a verb that fails or is cut off."""

    def __init__(self, host, clients):
        self.host, self.clients = host, clients
        self.answered: list[list[str]] = [[] for _ in clients]  # the verbs, as they were answered
        self.rounds = 0
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(len(clients))

    def __enter__(self):
        self.asking = [self.pool.submit(self.ask, *each) for each in zip(self.clients, self.answered, strict=True)]
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.pool.shutdown()
        for each in self.asking:
            each.result()

    def ask(self, verbs, answered):
        while not self.stop.wait(0.01):
            for name, verb, body in verbs:
                with contextlib.suppress(KvmappError, OSError):
                    self.host.post(name, verb, **body)
                    answered.append(verb)
            with contextlib.suppress(KvmappError, OSError):
                self.host.states()

    def moment(self):
        """Waits for some answers to one client, each time for others: what follows is at once, or in the middle of what it asks next."""
        more, client = divmod(self.rounds, len(self.clients))
        self.rounds += 1
        wanted = len(self.answered[client]) + more % VARIETY
        self.host.eventually(lambda: len(self.answered[client]) >= wanted, f"an answer to one of {self.clients[client]}")
