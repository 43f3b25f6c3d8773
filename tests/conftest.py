"""Settings that all tests share."""

import os

from hypothesis import settings

# A deadline would let the load of the machine decide a test.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
