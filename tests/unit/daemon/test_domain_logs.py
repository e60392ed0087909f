"""Logs that are set aside by size."""
import errno
import io
import os

from kvmapp.daemon import domainlog


def test_a_full_disk_costs_no_older_log(tmp_path, monkeypatch):
    log = tmp_path / "web.log"
    older = {f"web.log.{number}": b"%d" % number * 100 for number in (1, 2, 3)}
    for name, data in older.items():
        (tmp_path / name).write_bytes(data)
    log.write_bytes(b"x" * 1000)

    def full(path, backup, most):
        os.close(domainlog.private(backup, os.O_WRONLY | os.O_CREAT))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(domainlog, "copy", full)
        for _ in range(3):
            domainlog.rotate(str(log), 1000, 3, in_use=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {**older, "web.log": b"x" * 1000}
    domainlog.rotate(str(log), 1000, 3, in_use=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "web.log": b"", "web.log.1": b"x" * 1000, "web.log.2": older["web.log.1"], "web.log.3": older["web.log.2"]}


def test_of_a_log_without_end_only_the_end_is_copied(tmp_path):
    """All of it would take minutes, in which nobody is answered."""
    log = tmp_path / "web.log"
    with log.open("wb") as file:
        file.truncate(1 << 40)                           # sparse, and more than any copy could hold
        file.seek(0, os.SEEK_END)
        file.write(b"the last line\n")
    domainlog.rotate(str(log), 1000, 1, in_use=True)
    kept = (tmp_path / "web.log.1").read_bytes()
    assert len(kept) == 4000 and kept.endswith(b"\0the last line\n") and log.stat().st_size == 0


def test_a_log_that_grows_while_its_end_is_read_is_not_read_whole(monkeypatch):
    """Its writer may be hostile, and make it as long as it likes."""
    class Growing(io.BytesIO):
        def seek(self, place, whence=os.SEEK_SET):
            found = super().seek(place, whence)
            if whence == os.SEEK_END:
                self.write(b"y\n" * 100_000)
            return found
    monkeypatch.setattr(domainlog, "open", lambda *_: Growing(b"x\n" * 10), raising=False)
    assert sum(map(len, domainlog.last_lines("/x", 10))) < 400 * 10
