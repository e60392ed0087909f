"""The table of `kvmapp run --timing`."""
import time

from kvmapp.timing import MARKS_MOST, Timing, process_start


def test_a_guests_markers_are_heard_and_still_logged():
    timing = Timing()
    logged: list[str] = []
    log = timing.hearing(logged.append)
    for line in ("debug: timing: init", "debug: timings", "warning: timing: no guest's", "debug: timing: shell is up"):
        log(line)
    assert [name for name, _ in timing.marks[2:]] == ["guest: init", "guest: shell is up"]
    assert len(logged) == 4


def test_marks_stand_in_the_order_of_their_times():
    timing = Timing()
    timing.marks = [("start", 1_000_000), ("late", 31_500_000), ("early", 2_500_000)]
    assert timing.table().splitlines()[1:] == [
        "       0.0       +0.0  start", "       1.5       +1.5  early", "      30.5      +29.0  late"]


def test_a_guest_cannot_fill_the_host_with_marks():
    timing = Timing()
    for _ in range(2 * MARKS_MOST):
        timing.mark("again")
    assert len(timing.marks) == MARKS_MOST


def test_this_process_started_before_now():
    assert 0 < process_start() <= time.monotonic_ns()
