"""A KUBECONFIG that cannot be used is refused before a process starts."""

from pathlib import Path

import pytest

from pdcoord.feeds.kubeapi import KubeConfigError, require_way_in

HEAD = """\
apiVersion: v1
kind: Config
current-context: here
contexts: [{name: here, context: {cluster: c, user: u}}]
users: [{name: u, user: {token: t}}]
"""
GOOD = HEAD + 'clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]\n'


def test_a_good_one_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(GOOD)
    require_way_in({"KUBECONFIG": str(path)})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not a mapping"),
        ("words", "it is not a mapping"),
        ("- 1\n- 2\n", "it is not a mapping"),
        ('{"a": [', "while parsing a flow node"),
        ("apiVersion: v1\n", "Expected key current-context"),
        (HEAD + "clusters: []\n", "Expected object with name c"),
        (HEAD + "clusters: [{name: c, cluster: {}}]\n", "cluster has no server"),
    ],
)
def test_a_bad_one_is_named_with_what_is_wrong(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(KubeConfigError) as caught:
        require_way_in({"KUBECONFIG": str(path)})
    said = str(caught.value)
    assert said.startswith(f"KUBECONFIG names {path}, which is no kubeconfig: ")
    assert why in said
    assert "\n" not in said
