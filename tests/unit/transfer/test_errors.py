"""A layout error carries what was wrong, not only text."""

from transfer.errors import LayoutError, TransferError


def test_a_layout_error_names_the_field_the_value_and_the_remedy() -> None:
    error = LayoutError("block_tokens", 0, "a positive whole number")
    assert isinstance(error, TransferError)
    assert (error.field, error.value) == ("block_tokens", 0)
    assert str(error) == "block_tokens is 0, expected a positive whole number"
