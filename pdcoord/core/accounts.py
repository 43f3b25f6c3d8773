"""The accounts that a coordinator keeps: requests of its own and of others are entered in the same ones."""

from dataclasses import dataclass

from pdcoord.core.fleet import Fleet
from pdcoord.core.ledger import Ledger
from pdcoord.core.lessons import Lessons
from pdcoord.core.paths import PathTable
from pdcoord.core.ports import SpeedModel
from pdcoord.core.progress import Progress
from pdcoord.core.silent import SilentFailures


@dataclass(frozen=True, slots=True)
class Accounts:
    """One of each; who is given them enters what it hears in those that it touches."""

    fleet: Fleet
    ledger: Ledger
    paths: PathTable
    silent: SilentFailures
    lessons: Lessons
    speed: SpeedModel
    progress: Progress
