"""The accounts that parts of the core share, with nothing in them."""

import pytest

from pdcoord.core.accounts import Accounts
from pdcoord.core.fleet import Fleet
from pdcoord.core.learned import LearnedSpeed
from pdcoord.core.ledger import Ledger
from pdcoord.core.lessons import Lessons
from pdcoord.core.paths import PathTable
from pdcoord.core.progress import Progress
from pdcoord.core.silent import SilentFailures


@pytest.fixture
def accounts() -> Accounts:
    """Of a fleet without endpoints, and a policy without models."""
    fleet, ledger, paths, speed = Fleet(), Ledger(), PathTable(), LearnedSpeed()
    lessons = Lessons(fleet, ledger, paths, speed)
    progress = Progress(fleet, lambda _: None)
    return Accounts(fleet, ledger, paths, SilentFailures(), lessons, speed, progress)
