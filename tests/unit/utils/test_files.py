"""Renames on Windows, and links."""

import os
import sys
from pathlib import Path

import pytest

from anew.utils.files import link_or_copy, rename


def test_rename_waits_on_windows_until_the_file_is_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "new"
    target = tmp_path / "old"
    source.write_text("new")
    target.write_text("old")
    real_replace = os.replace
    refusals = [PermissionError(13, "in use")] * 3

    def busy(a: Path, b: Path) -> None:
        if refusals:
            raise refusals.pop()
        real_replace(a, b)

    monkeypatch.setattr(os, "replace", busy)
    # On other systems, a refusal is an error that waiting does not cure.
    with pytest.raises(PermissionError):
        rename(source, target)
    monkeypatch.setattr(sys, "platform", "win32")
    rename(source, target)
    assert target.read_text() == "new"
    assert not refusals


def test_link_is_a_second_name_and_a_copy_where_links_are_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_text("text")
    link_or_copy(source, tmp_path / "link")
    assert (tmp_path / "link").samefile(source)

    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    link_or_copy(source, tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(source)
    assert (tmp_path / "copy").read_text() == "text"
