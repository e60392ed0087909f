"""One process that fuzzes one device: mutate an input, run it, keep it when it covers something new.

    python -m tests.fuzz.worker PROFILE SECONDS FOLDER [keep]

FOLDER/PROFILE.hex is the working corpus, an input a line; FOLDER/PROFILE.now holds the input under way, for whoever finds this
process dead (a signal, a sanitizer, an exception, an input that takes longer than INPUT_SECONDS). `keep` reduces the corpus to the
fewest inputs that cover as much and writes them to the tree.
"""
import contextlib
import ctypes
import gc
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.fuzz.target import Target, seeds

SEED = "KVMAPP_FUZZ_SEED"                         # in the environment: begins with the same inputs again
INPUT_SECONDS = 120                              # on a machine that is busy with other things too
INPUT_MOST = 400                                 # bytes
TURN = 400                                       # inputs on one board; then what it held must have been given back
KEPT_MOST = 40                                   # inputs of one device in the tree
LEAK_MOST = 24 << 20                             # growth that is no leak: allocators keep some
CORPUS = Path(__file__).with_name("corpus")
NO_THP = 41                                      # PR_SET_THP_DISABLE: a touched byte of guest memory costs a page, not 2 MiB


class Coverage:
    def __init__(self):
        library = ctypes.CDLL(None)
        library.coverage_constants.restype = ctypes.POINTER(ctypes.c_uint64)
        self.library, self.constants = library, library.coverage_constants()

    def of(self, work) -> int:
        """Runs `work`; how much of what it covered is new."""
        self.library.coverage_switch(1)
        work()
        self.library.coverage_switch(0)
        return self.library.coverage_take()

    def edges(self) -> int:
        return self.library.coverage_edges()

    def constant(self, chance: random.Random) -> int:
        return self.constants[chance.randrange(256)]


class Worker:
    def __init__(self, profile, folder: Path, chance: random.Random):
        self.profile, self.folder, self.chance = profile, folder, chance
        self.coverage = Coverage()
        self.now = note(folder / f"{profile.name}.now")
        self.target: Target | None = None
        self.inputs: list[bytes] = []
        self.runs = 0

    def run(self, data: bytes) -> int:
        """One input, noted down before it runs."""
        if self.target is None:
            self.target = Target(self.profile)
        self.now[:4 + len(data)] = len(data).to_bytes(4, "little") + data
        signal.alarm(INPUT_SECONDS)
        fresh = self.coverage.of(lambda: self.target.run(data))
        signal.alarm(0)
        self.runs += 1
        if self.runs % TURN == 0:
            self.renew()
        return fresh

    def renew(self) -> None:
        """A new board; of the old one nothing may be left."""
        if self.target:
            self.target.close()
        self.target = None
        gc.collect()
        here = len(os.listdir("/proc/self/fd")), resident()
        if self.runs == 2 * TURN:
            self.level = here
        elif self.runs > 2 * TURN:
            assert here[0] <= self.level[0], f"descriptors leak: {self.level[0]} became {here[0]} in {self.runs} inputs"
            assert here[1] <= self.level[1] + LEAK_MOST, f"memory leaks: {self.level[1]} became {here[1]} in {self.runs} inputs"

    def fuzz(self, seconds: float) -> None:
        end = time.process_time() + seconds
        for data in self.beginnings():
            if self.run(data):
                self.inputs.append(data)
        self.inputs = self.inputs or [b""]
        try:
            while time.process_time() < end:
                data = self.mutate(self.chance.choice(self.inputs[-64:] if self.chance.random() < 0.5 else self.inputs))
                if self.run(data):
                    self.inputs.append(data)
        finally:                                     # whoever ended it, or whatever was found: the next run goes on from here
            write_corpus(self.folder / f"{self.profile.name}.hex", self.inputs)

    def beginnings(self) -> list[bytes]:
        return [*seeds(self.profile), *read_corpus(CORPUS / f"{self.profile.name}.hex"),
                *read_corpus(self.folder / f"{self.profile.name}.hex")]

    def mutate(self, data: bytes) -> bytes:
        chance, piece = self.chance, bytearray(data)
        for _ in range(1 << chance.randrange(4)):
            place = chance.randrange(len(piece) + 1)
            kind = chance.randrange(8)
            if kind == 0 and piece:
                piece[place % len(piece)] ^= 1 << chance.randrange(8)
            elif kind == 1 and piece:
                piece[place % len(piece)] = chance.randrange(256)
            elif kind == 2:
                del piece[place:place + chance.randrange(1, 16)]
            elif kind == 3:
                piece[place:place] = chance.randbytes(chance.randrange(1, 12))
            elif kind == 4:                          # a part of another input, steps and all
                other = chance.choice(self.inputs)
                start = chance.randrange(len(other) + 1)
                piece[place:place] = other[start:start + chance.randrange(1, 64)]
            elif kind == 5:
                piece[place:place] = piece[place:place + chance.randrange(1, 32)]
            elif kind == 6:                          # a constant that the code looked for
                width = chance.choice((1, 2, 4, 8))
                value = self.coverage.constant(chance) & ((1 << 8 * width) - 1)
                piece[place:place + width] = value.to_bytes(width, "little")
            else:                                    # ... as a number of the stream
                piece[place:place] = b"\xf0" + self.coverage.constant(chance).to_bytes(8, "little")
        return bytes(piece[:INPUT_MOST])

    def keep(self) -> None:
        """The corpus of the tree: each input, shortest first, that covers what those before it do not."""
        inputs = sorted(set(self.beginnings()), key=lambda data: (len(data), data))
        self.coverage.library.coverage_forget()
        gains = [(self.run(data), data) for data in inputs]
        best = sorted((gain, data) for gain, data in gains if gain)[-KEPT_MOST:]
        write_corpus(CORPUS / f"{self.profile.name}.hex", [data for _, data in best])


def note(path: Path) -> mmap.mmap:
    """A file that stays as it is when its writer is killed."""
    with open(path, "w+b") as file:
        file.truncate(4096)
        return mmap.mmap(file.fileno(), 4096)


def noted(path: Path) -> bytes:
    data = path.read_bytes()
    return data[4:4 + int.from_bytes(data[:4], "little")]


def read_corpus(path: Path) -> list[bytes]:
    return [bytes.fromhex(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_corpus(path: Path, inputs: list[bytes]) -> None:
    path.write_text("".join(f"{data.hex()}\n" for data in sorted(set(inputs), key=lambda data: (len(data), data)) if data))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def main() -> None:
    name, seconds, folder, *keep = sys.argv[1:]
    from kvmapp.devices import set_log
    from tests.device.profiles import PROFILES
    set_log(os.open(os.devnull, os.O_WRONLY))
    ctypes.CDLL(None).prctl(NO_THP, 1, 0, 0, 0)
    [profile] = [profile for profile in PROFILES if profile.name == name]
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
    for number in (signal.SIGINT, signal.SIGTERM):   # a long run in the background is ended, too, without losing its corpus
        signal.signal(number, signal.default_int_handler)
    worker = Worker(profile, Path(folder), random.Random(seed))
    with contextlib.suppress(KeyboardInterrupt):
        worker.fuzz(float(seconds))
    worker.renew()                                   # an interrupted board is in the middle of an input
    if keep:
        worker.keep()
    print(f"{worker.runs} inputs in {time.process_time():.0f} s, {worker.coverage.edges()} edges, {len(worker.inputs)} kept, seed {seed}")


if __name__ == "__main__":
    main()
