"""docs/man/kvmappctl.1 is committed as the tables make it, names every verb and option, and is sound roff."""
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmapp.cli import manual
from kvmapp.cli.help import verbs_of
from kvmapp.cli.index import GROUPS

ROOT = Path(__file__).resolve().parents[2]
PAGE = manual.manual()


def test_committed_as_made():
    assert (ROOT / manual.PATH).read_text() == PAGE, "run python -m kvmapp.cli.manual and commit"


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
def test_page_is_roff_without_warnings_and_whole():
    done = subprocess.run(["groff", "-man", "-Tascii", "-ww", "-P-cbou", "-rLL=200n"], input=PAGE.encode(), capture_output=True, check=True)
    assert done.stderr == b""
    words = set(done.stdout.decode().replace("[", " ").replace("]", " ").replace(",", " ").split())
    for keyword in GROUPS:
        for verb in verbs_of(keyword):
            assert {verb.name, *(f"--{name}" for name, option in verb.options.items() if not option.many)} <= words
