"""The package imports without side effects."""
import kvmapp


def test_package_has_a_version():
    assert kvmapp.__version__.count(".") == 2
