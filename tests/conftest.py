"""What all tests share: a slow moment of a busy machine is no failure of a property."""
from hypothesis import settings

settings.register_profile("kvmapp", deadline=None)
settings.load_profile("kvmapp")
