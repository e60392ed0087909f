"""The pid file's locks: no user keeps a daemon from coming back, and two never run at once, be one of them older."""
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmapp.daemon.pidfile import DaemonRunning, PidFile
from tests.unit.daemon.host import IS_ROOT, ROOT

# What an older daemon does, which knows the pid file's own lock only; and what anybody can do to it.
OLDER = ("import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644); fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB); "
         "os.ftruncate(fd, 0); os.pwrite(fd, b'%d' % os.getpid(), 0); print('locked', flush=True); sys.stdin.read()")
ANYBODY = ("import fcntl, os, sys; os.geteuid() or os.setuid(65534); fd = os.open(sys.argv[1], os.O_RDONLY); "
           "fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB); print('locked', flush=True); sys.stdin.read()")
NEW = ("import sys; from kvmapp.daemon.pidfile import PidFile; one = PidFile(sys.argv[1]); one.take(); print('locked', flush=True); "
       "sys.stdin.read()")


@pytest.fixture
def path(host):
    return f"{host.root}/kvmapp.pid"


@contextlib.contextmanager
def other(program, path):
    with subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as one:
        assert one.stdin and one.stdout
        one.locked = one.stdout.readline() == "locked\n"                        # type: ignore[attr-defined]
        yield one
        one.stdin.close()
        one.wait(60)


def locks(program, path):
    with other(program, path) as one:
        return one.locked


def test_a_user_who_locks_it_keeps_no_daemon_from_coming_back(path):
    Path(path).write_text("1\n")                # of a daemon that was killed
    os.chmod(path, 0o644)
    mine = PidFile(path)
    with other(ANYBODY, path) as somebody:
        assert somebody.locked and mine.holder() == 0
        mine.take()
        assert os.pread(mine.fd, 32, 0) == b"%d\n" % os.getpid()         # to open it anew would give the lock back
        assert (os.stat(path).st_mode & 0o777, os.stat(mine.lock_path).st_mode & 0o777) == (0o644, 0o600)
        assert not locks(ANYBODY, path) and not locks(OLDER, path) and not locks(NEW, path)
        assert not IS_ROOT or not locks(ANYBODY, mine.lock_path)
    mine.release()
    assert not os.path.lexists(path) and locks(NEW, path)


def test_who_runs_is_told_to_everybody(path):
    with other(NEW, path) as daemon:
        assert PidFile(path).holder() == daemon.pid
        with pytest.raises(DaemonRunning, match=rf"runs already \(pid {daemon.pid}\)"):
            PidFile(path).take()
        ask = f"import os; from kvmapp.daemon.pidfile import PidFile; os.geteuid() or os.setuid(65534); print(PidFile({path!r}).holder())"
        assert subprocess.run([sys.executable, "-c", ask], cwd=ROOT, text=True, capture_output=True, check=True).stdout == f"{daemon.pid}\n"
    assert PidFile(path).holder() == 0


def test_an_older_daemon_keeps_a_newer_one_out(path):
    with other(OLDER, path) as older:
        with pytest.raises(DaemonRunning, match=rf"runs already \(pid {older.pid}\)"):
            PidFile(path).take()
        assert PidFile(path).holder() == older.pid
    mine = PidFile(path)
    mine.take()
    mine.release()


def test_an_older_daemon_that_comes_at_the_same_moment_stays_the_only_one(path, monkeypatch):
    Path(path).write_text("1\n")
    os.chmod(path, 0o644)
    rename = os.rename
    with contextlib.ExitStack() as stack:
        somebody = stack.enter_context(other(ANYBODY, path))

        def meanwhile(*paths):
            somebody.kill()
            somebody.wait()
            assert stack.enter_context(other(OLDER, path)).locked
            rename(*paths)
        monkeypatch.setattr(os, "rename", meanwhile)
        with pytest.raises(DaemonRunning):
            PidFile(path).take()
        assert PidFile(path).holder() and not locks(OLDER, path) and not locks(NEW, path)
