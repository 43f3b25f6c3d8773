"""The errors of the sidecar, cut by what happens next.

SidecarError
├── HandoffError    a bug of ours: the request is answered with 500 and logged
├── AgentLostError  the agent in the pod's own engine cannot be asked: ask again in a while
└── SettingsError   a flag or file cannot be used: the process does not start
"""


class SidecarError(Exception):
    """Base of everything the sidecar raises on purpose, refusals apart."""


class HandoffError(SidecarError):
    """An event came that the table of transitions does not list for its state."""

    def __init__(self, state: object, event: object, why: str) -> None:
        # The event's type only: an event can hold a ticket.
        super().__init__(f"state {state} got {type(event).__name__}: {why}")
        self.state = state
        self.event_type = type(event)


class AgentLostError(SidecarError):
    """The agent in the pod's own engine could not be asked to probe."""


class SettingsError(SidecarError):
    """A setting has a value that cannot be used.

    Attributes:
        setting: the flag or file at fault.
    """

    def __init__(self, setting: str, value: object, remedy: str) -> None:
        super().__init__(f"{setting} is {value!r}: {remedy}")
        self.setting = setting
        self.value = value
