import sys

import pytest


@pytest.fixture(autouse=True)
def quick_turns():
    """Simulated threads that wait at a barrier hand over at once: three times as fast."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(usual)
