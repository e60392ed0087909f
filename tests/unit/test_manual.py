"""docs/man/kvmapp.1 is what the parsers give, and says nothing that groff would not print."""
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmapp import manual

ROOT = Path(__file__).resolve().parents[2]


def test_page_is_what_the_parsers_give():
    assert (ROOT / manual.PATH).read_text() == manual.manual(), "python -m kvmapp.manual"


def test_every_option_is_there():
    page = manual.manual()
    for option in ("--kernel", "--no-enable", "--background", "--config-dir", "--remove"):
        assert f".B {option.replace('-', chr(92) + '-')}" in page
    assert "domain\\-module" not in page


@pytest.mark.skipif(not shutil.which("man"), reason="man is not installed")
def test_man_has_nothing_to_complain_of():
    shown = subprocess.run(["man", "--warnings", "-l", str(ROOT / manual.PATH)], capture_output=True, text=True, check=True,
                           env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C.UTF-8"})
    assert shown.stderr == "" and "--background" in shown.stdout
