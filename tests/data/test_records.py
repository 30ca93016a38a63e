"""Files of every format give the same rows; damage costs a row or the rest of a file, and is named."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from hhjax.data.records import MAX_LINE, DataError, DataReport, Malformed, read_records

ROWS = [{"chosen": "a\u2028b\u0085c", "rejected": "d"}, {"chosen": "e", "rejected": "é😀"}]
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", LINES), ("a.jsonl.gz", LINES), ("a.json", json.dumps(ROWS).encode()),
    ("a.json.gz", json.dumps(ROWS).encode()),
    ("lines.json", LINES), ("crlf.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")), ("open.jsonl", LINES[:-1])])
def test_every_json_format(tmp_path, name, content):
    assert [row for _, row in read_records(write(tmp_path / name, content))] == ROWS


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == [(1, ROWS[0]), (2, ROWS[1])]


def test_each_bad_line_is_named_and_the_rest_is_read(tmp_path):
    lines = [b'{"a": 1}', b'{"a": ', b'"\xff"', b'{"a": "' + b"x" * MAX_LINE + b'"}', b"", b'{"a": 2}', b"1" * 5000,
             b"[" * 100_000]
    got = list(read_records(write(tmp_path / "a.jsonl", b"\n".join(lines))))
    assert [(line, row) for line, row in got if isinstance(row, dict)] == [(1, {"a": 1}), (6, {"a": 2})]
    assert [(line, row.reason) for line, row in got if isinstance(row, Malformed)] == [
        (2, "invalid JSON"), (3, "invalid UTF-8"), (4, "line over 1 MB"), (7, "invalid JSON"), (8, "invalid JSON")]


def test_a_line_that_ends_too_soon_is_told_by_its_own_column(tmp_path):
    (_, told), _ = read_records(write(tmp_path / "a.jsonl", b'{"chosen": "a"\n{"chosen": "b"}\n'))
    assert str(told) == "invalid JSON (Expecting ',' delimiter, column 15)"


def test_a_line_of_exactly_1_mb_is_read(tmp_path):
    line = b'"' + b"x" * (MAX_LINE - 3) + b'"\n'
    assert [len(row) for _, row in read_records(write(tmp_path / "a.jsonl", line))] == [MAX_LINE - 3]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_truncated_gzip_keeps_what_came_before(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"".join(b'{"n": %d}\n' % n for n in range(100_000)))[:-2000])
    *rows, last = [row for _, row in read_records(path)]
    assert last.reason == "damaged gzip"
    assert rows == [{"n": n} for n in range(len(rows))]
    assert rows or name == "a.json.gz"


@pytest.mark.parametrize("name, reason", [("a.jsonl.gz", "damaged gzip"), ("a.parquet", "damaged parquet"),
                                          ("a.json", "invalid JSON")])
def test_what_is_no_such_file_at_all(tmp_path, name, reason):
    (tmp_path / name).write_bytes(b"[nonsense")
    assert [row.reason for _, row in read_records(tmp_path / name)] == [reason]


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(DataError, match="no file .*gone.jsonl"):
        read_records(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="a.csv has no known format: name it .jsonl"):
        read_records(write(tmp_path / "a.csv", b""))


def test_the_report_counts_reasons_and_adds(tmp_path):
    report = DataReport(read=2, kept=1)
    report.skip("a.jsonl", 2, Malformed("empty reply", "chosen"))
    total = report + report
    assert (total.read, total.kept, total.reasons) == (4, 2, {"empty reply": 2})
    assert "4 rows read, 2 kept, 2 skipped" in str(total) and "a.jsonl:2: empty reply (chosen)" in str(total)
    with pytest.raises(DataError, match="strict"):
        report.require_clean()
