"""What every test of this folder starts from."""

import os

from hypothesis import settings

# No deadline: a test that says how long one example may take says how busy the machine is. In CI the same examples
# every time, so that a change is judged by what it changed; elsewhere new ones, which is how new faults are found.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")
