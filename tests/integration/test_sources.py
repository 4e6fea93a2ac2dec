"""The standard library as a source of text."""

from anew.data import sources
from tests.support.data_folders import file_names


def test_stdlib_source_has_megabytes_of_python_in_a_fixed_order() -> None:
    source = sources.find("stdlib")
    names = set(file_names(source))
    assert {"argparse.py", "dataclasses.py", "json"} & names
    assert sum(map(len, source.documents())) > 5_000_000
    assert source.files == sources.find("stdlib").files
