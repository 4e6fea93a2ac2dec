"""Encodings, tables and files that are not text, as users have them."""

import codecs
import gzip
import logging
from pathlib import Path

import pytest

from anew.cli.main import main
from anew.data import readers, sources
from anew.errors import UserError

TEXT = "Grüße aus Köln: 10 €\r\nZeile zwei"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
        codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_marked_encodings_are_read_without_their_mark(
    content: bytes, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    [document] = sources.find(str(path)).documents()
    assert document == TEXT.encode()


def test_another_encoding_is_refused_and_read_with_the_name_of_the_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.replace("€", "EUR").encode("latin-1"))
    with pytest.raises(UserError, match="not in utf-8; name its encoding"):
        sources.find(str(path))
    source = sources.find(str(path), encoding="latin-1")
    assert list(source.documents()) == [TEXT.replace("€", "EUR").encode()]
    assert source.revision != sources.find(str(path), encoding="cp1252").revision
    with pytest.raises(UserError, match="no encoding 'latin-99'"):
        sources.find(str(path), encoding="latin-99")


def test_encoding_is_for_files_that_are_not_utf8_and_makes_no_text_of_binary_files(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("é".encode())
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    source = sources.find(str(tmp_path), encoding="latin-1")
    assert list(source.documents()) == ["é".encode()] * 2
    assert [path.name for path, _ in source.skipped] == ["c.png"]
    (tmp_path / "a.txt").write_bytes("ab".encode("utf-16-le"))
    [document] = sources.find(str(tmp_path / "a.txt"), encoding="utf-16-le").documents()
    assert document == b"ab"


def test_replaced_characters_are_counted_with_the_name_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"a" * readers.SNIFFED_BYTES + b"\xe9 b \xe9")
    with caplog.at_level(logging.WARNING):
        [document] = sources.find(str(path)).documents()
    assert document.decode().count("\N{REPLACEMENT CHARACTER}") == 2
    assert f"{path}: 2 characters not in utf-8 replaced by U+FFFD" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pdf", b"%PDF-1.7 text", "a PDF; extract its text first"),
        ("a.bin", b"\x7fELF\x00\x00", "binary"),
        ("a.txt", b"", "empty"),
        ("a.txt", "abc".encode("utf-16-le"), r"binary \(UTF-16 without"),
    ],
)
def test_file_that_is_not_text_is_refused_by_name(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read as text: it is {reason}"):
        sources.find(str(path))


def test_column_of_a_table_is_read_also_across_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,body\n1,"one, two\nthree"\n2,\n3,four\n')
    (tmp_path / "b.tsv").write_text("id\tbody\n1\tfive, six\n")
    source = sources.find(str(tmp_path), column="body")
    assert list(source.documents()) == [b"one, two\nthree", b"four", b"five, six"]
    with pytest.raises(UserError, match=r"no column 'text'; choose .* \(id, body\)"):
        sources.find(str(tmp_path))


def test_tables_without_the_column_are_left_out_of_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("kept")
    (tmp_path / "b.csv").write_text("id,body\n1,not text\n")
    (tmp_path / "c.jsonl").write_text('{"text": "kept too"}\n')
    (tmp_path / "d.jsonl").write_text('{"body": "not text"}\n')
    source = sources.find(str(tmp_path))
    assert list(source.documents()) == [b"kept", b"kept too"]
    assert [path.name for path, _ in source.skipped] == ["b.csv", "d.jsonl"]
    assert f"skipped {tmp_path / 'b.csv'}: it is a table without the column 'text'" in caplog.text
    (tmp_path / "e.parquet").write_text("damaged")
    with pytest.raises(UserError, match=r"e\.parquet cannot be read"):
        sources.find(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id;text\n1;"one; two"\n2;three, four\n'),
        ("a.csv", 'text;id\n"one; two";1\nthree, four;2\n'),
        ("a.csv", 'id,text\n1,one; two\n2,"three, four"\n'),
        ("a.csv", 'text\none; two\n"three, four"\n'),
    ],
)
def test_columns_are_separated_by_commas_or_semicolons(
    name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    source = sources.find(str(tmp_path))
    assert list(source.documents()) == [b"one; two", b"three, four"]


def test_lines_without_text_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n\n[1]\n{"text": null}\n{"text": "two"}\n')
    assert list(sources.find(str(path)).documents()) == [b"one", b"two"]
    assert f'{path}: skipped 2 lines without a "text" string in JSON' in caplog.text


def test_row_of_a_table_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n" + b"good\n" * 20_000 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"a\.csv row 20001 is not in utf-8"):
        list(sources.find(str(path)).documents())
    path.write_text("text\n" + "long " * 50_000)
    [document] = sources.find(str(path)).documents()
    assert len(document) == 250_000


def test_line_of_a_table_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read as text: it is not in utf-8"):
        sources.find(str(path))
    path.write_bytes(b'{"text": "good"}\n' * 5000 + b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 5001"):
        list(sources.find(str(path)).documents())


def test_prepare_of_a_mixed_folder_says_what_was_read_and_what_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "good.txt").write_text("Some words. " * 40)
    (texts / "page.html").write_text("<p>Some words.</p> " * 40)
    (texts / "paper.pdf").write_bytes(b"%PDF-1.7")
    (texts / "empty.txt").touch()
    out = tmp_path / "data"
    main(["prepare", str(texts), "--out", str(out), "--tokenizer", "bytes"])
    shown = capsys.readouterr()
    assert "2 files read, 2 skipped; 2 documents, 1,240 bytes of text" in shown.out
    assert f"skipped {texts / 'paper.pdf'}: it is a PDF" in shown.err
    assert f"skipped {texts / 'empty.txt'}: it is empty" in shown.err
    assert "HTML and Markdown are read with their markup (1 of 2 files)" in shown.err
