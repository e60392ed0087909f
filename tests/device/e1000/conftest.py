"""The card's tests begin with one that is started."""
import pytest

from tests.device.e1000.driver import Rig


@pytest.fixture
def rig(guest):
    rig = Rig(guest)
    rig.start()
    return rig
