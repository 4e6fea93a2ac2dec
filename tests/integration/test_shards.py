"""Index files with arbitrary content."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anew import UserError
from anew.data.shards import DataFolder

KEYS = [
    "version",
    "dtype",
    "shards",
    "tokenizer",
    "source",
    "revision",
    "name",
    "tokens",
    "sha256",
    "split",
]
JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
)


@settings(max_examples=200, deadline=None)
@given(JSON_VALUES)
def test_index_with_arbitrary_json_is_refused_with_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        DataFolder.open(folder)
