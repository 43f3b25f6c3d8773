"""A process that cannot start says so in plain words and exits with 2."""

from pathlib import Path

import pytest

from pdcoord.runtime.process import START_FAILED
from pdcoord.runtime.serve import serve
from pdcoord.runtime.settings import load_settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "policy.yaml"),
        ("kind: [", "policy.yaml:1"),
        ("apiVersion: pdcoord.io/v1alpha1\nkind: PoolPolicy\nunknown: 1\n", "policy.yaml:3"),
    ],
)
def test_a_policy_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    path = tmp_path / "policy.yaml"
    if text is not None:
        path.write_text(text)
    assert serve(load_settings(policy=path, port=0, admin_port=0)) == START_FAILED
    error = capsys.readouterr().err
    assert error.startswith("pdcoord serve: not started: ")
    assert said in error
    assert "Traceback" not in error
