"""The errors of transfer, cut by what the caller does next.

TransferError
└── LayoutError   the layout itself is malformed: fix the policy or the engine's declaration
"""


class TransferError(Exception):
    """Base of everything transfer raises on purpose."""


class LayoutError(TransferError):
    """A layout field has a value no engine can have.

    Attributes:
        field: the name of the offending field.
        value: what was given.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} is {value!r}, expected {expected}")
        self.field = field
        self.value = value
