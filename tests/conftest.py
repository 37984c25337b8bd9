"""What all tests share."""

from hypothesis import settings

# A busy machine is not a failure: no example has a deadline.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
