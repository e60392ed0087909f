"""A story is told by one host from its first chapter to its last; when the emulated host dies in it, which no chapter can ask for,
the story is told again from the beginning, and this is said.
"""
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from tests.appliance.host import PlainHost
from tests.guest.place import RETOLD

HERE = Path(__file__).parent
TELLINGS = 3
REPORTS = pytest.StashKey[dict[str, list[pytest.TestReport]]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """The first chapter's turn tells the whole story; each chapter's reports are given in its own turn."""
    if item.path.parent != HERE:                         # the hook is called for tests elsewhere too
        return None
    reports = item.session.stash.setdefault(REPORTS, {})
    if item.nodeid not in reports:
        reports.update(tell([other for other in item.session.items if other.path == item.path]))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def tell(chapters: list[pytest.Item]) -> dict[str, list[pytest.TestReport]]:
    """The reports of each chapter, in the last telling; a chapter that failed on a host that lived keeps its failure."""
    kept: dict[str, list[pytest.TestReport]] = {}
    for left in reversed(range(TELLINGS)):
        PlainHost.lost = False
        reports: dict[str, list[pytest.TestReport]] = {}
        for chapter, following in zip(chapters, [*chapters[1:], None], strict=True):
            reports[chapter.nodeid] = runtestprotocol(chapter, nextitem=following, log=False)
            if PlainHost.lost and left:
                break
        if not PlainHost.lost:
            break
        if left:
            chapters[0].session._setupstate.teardown_exact(None)
            failed = {name: told for name, told in reports.items() if any(report.failed for report in told)}
            kept |= {name: told for name, told in failed.items() if name != chapter.nodeid}
            print(*(report.longreprtext for told in failed.values() for report in told if report.failed), sep="\n")
            print(f"\nlab: the emulated host died in {chapter.nodeid}: the story is told again", flush=True)
            chapters[0].config.stash.setdefault(RETOLD, []).append(chapter.path.name)
    return reports | kept
