"""Rows of every layout, malformed rows, mixtures, and a split that keeps openings apart."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hhjax.data.comparisons import (Comparison, ComparisonData, check_data, load_comparisons, mix, opening,
                                    opening_hash, read_comparisons, to_comparison)
from hhjax.data.records import DataError, Malformed

PROMPT = "\n\nHuman: Hi\n\nAssistant:"
CHAT = [{"role": "user", "content": "Hi"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def row(number, chosen="yes", rejected="no"):
    prompt = f"\n\nHuman: Question {number}?\n\nAssistant:"
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("layout", [
    {"chosen": PROMPT + " yes", "rejected": PROMPT + " no"},
    {"prompt": PROMPT, "chosen": " yes", "rejected": "no\n"},
    {"prompt": "\n\nHuman: Hi", "chosen": "yes", "rejected": "no"},
    {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
    {"prompt": "Hi", "chosen": "\n\nAssistant: yes", "rejected": "Assistant: no"},
    {"prompt": "Hi", "chosen": PROMPT + " yes", "rejected": PROMPT + " no"},
    {"prompt": CHAT, "chosen": say("yes"), "rejected": say("no")},
    {"prompt": CHAT, "chosen": "yes", "rejected": "no"},
    {"prompt": "Hi", "chosen": CHAT + say("yes"), "rejected": CHAT + say("no")},
    {"chosen": CHAT + say("yes"), "rejected": CHAT + say("no"), "score": 3}])
def test_every_layout_is_the_same_comparison(layout):
    assert to_comparison(layout) == Comparison(PROMPT, "yes", "no")


def test_a_system_message_goes_before_the_first_human_text():
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert to_comparison({"prompt": chat, "chosen": "yes", "rejected": "no"}).prompt == (
        "\n\nHuman: Be brief.\n\nHi\n\nAssistant:")


@pytest.mark.parametrize("bad, reason", [
    ([1], "not an object"), (None, "not an object"),
    ({"chosen": PROMPT + " yes"}, "missing key"),
    ({"chosen": "yes", "rejected": "no"}, "missing key"),
    ({"chosen": PROMPT + " yes", "rejected": None}, "null"),
    ({"chosen": PROMPT + " yes", "rejected": 3}, "wrong type"),
    ({"prompt": CHAT, "chosen": [3], "rejected": "no"}, "wrong type"),
    ({"prompt": [{"role": "tool", "content": "x"}], "chosen": "yes", "rejected": "no"}, "unknown role"),
    ({"prompt": [{"role": "user", "content": "x\n\nAssistant: y"}], "chosen": "yes", "rejected": "no"},
     "a message holds a turn marker"),
    ({"prompt": "Hi", "chosen": [], "rejected": "no"}, "no turn"),
    (row(1, chosen=""), "empty reply"), (row(1, rejected=" \n"), "empty reply"),
    (row(1, "same", "same "), "identical replies"),
    (row(1, "yes\n\nHuman: go on"), "the last turn is not the Assistant's"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "no shared Assistant turn"),
    ({"prompt": "\n\nAssistant:", "chosen": "yes", "rejected": "no"}, "no Human turn"),
    ({"prompt": "", "chosen": "yes", "rejected": "no"}, "empty prompt"),
    ({"prompt": PROMPT + " done", "chosen": "yes", "rejected": "no"}, "the prompt ends in an Assistant turn"),
    ({"prompt": "Once\n\nHuman: Hi", "chosen": "yes", "rejected": "no"}, "text before the first turn"),
    ({"prompt": "Hi", "chosen": PROMPT + " yes", "rejected": "no"},
     "one reply repeats the prompt and the other does not"),
    ({"prompt": "Hi", "chosen": "\ud800", "rejected": "no"}, "invalid UTF-8"),
    ({"prompt": "Hi", "chosen": "x" * (1 << 20), "rejected": "no"}, "row over 1 MB")])
def test_malformed_rows_say_why(bad, reason):
    with pytest.raises(Malformed) as error:
        to_comparison(bad)
    assert error.value.reason == reason


def test_bad_rows_are_skipped_with_file_and_line_or_fail_when_strict(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(1), row(2, chosen=""), row(3), {"chosen": "SECRET"}])
    rows, report = read_comparisons(path)
    assert [opening(each.prompt) for each in rows] == ["Question 1?", "Question 3?"]
    assert [(skip.file, skip.line, skip.reason) for skip in report.skipped] == [
        (path, 2, "empty reply"), (path, 4, "missing key")]
    assert (report.read, report.kept) == (4, 2)
    with pytest.raises(DataError, match=r"a.jsonl:2: empty reply \(chosen\)"):
        read_comparisons(path, strict=True)


def test_check_data_reports_a_folder_without_its_contents(tmp_path):
    write(tmp_path / "a.jsonl", [row(1), {"chosen": "SECRET", "rejected": "SECRET"}])
    write(tmp_path / "deep" / "b.jsonl.gz", [row(2)])
    report = check_data(tmp_path)
    assert (report.read, report.kept) == (3, 2)
    assert "2 files" in str(report) and "a.jsonl:2" in str(report) and "SECRET" not in str(report)
    with pytest.raises(DataError):
        check_data(tmp_path, strict=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no comparison file"):
        check_data(tmp_path / "empty")


def test_opening_hash_is_the_rule_of_the_data():
    prompt = "\n\nHuman:  What is bread? \n\nAssistant: Food.\n\nHuman: Thanks\n\nAssistant:"
    assert opening(prompt) == "What is bread?"
    assert opening_hash(prompt) == 0x587D692B  # sha256sum of the text


@pytest.fixture
def house(tmp_path):
    """A data folder: helpful-base only in the split, harmless-base with official files too."""
    for part, some in (("train", range(60)), ("test", range(60, 80))):
        write(tmp_path / "hh-rlhf-split" / "helpful-base" / f"{part}.jsonl.gz", map(row, some))
        write(tmp_path / "hh-rlhf-split" / "harmless-base" / f"{part}.jsonl.gz", map(row, range(300, 310)))
    write(tmp_path / "hh-rlhf" / "helpful-base" / "test.jsonl", map(row, range(80)))
    for part, some in (("train", range(100, 140)), ("test", range(140, 150))):
        write(tmp_path / "hh-rlhf" / "harmless-base" / f"{part}.jsonl", map(row, some))
    return tmp_path


def numbers(rows):
    return [int(opening(each.prompt).split()[1][:-1]) for each in rows]


def test_folds_cover_every_row_once_as_test(house):
    seen = []
    for fold in range(5):
        data = ComparisonData(("helpful-base",), fold=fold)
        train, test = (load_comparisons(data, split, house)[0] for split in ("train", "test"))
        assert sorted(numbers(train) + numbers(test)) == list(range(80))
        assert all(opening_hash(each.prompt) % 5 == fold for each in test)
        seen += numbers(test)
    assert sorted(seen) == list(range(80))


def test_official_files_win_and_have_no_folds(house):
    data = ComparisonData(("harmless-base",))
    assert numbers(load_comparisons(data, "test", house)[0]) == list(range(140, 150))
    assert sorted(numbers(load_comparisons(data, "train", house)[0])) == list(range(100, 140))
    with pytest.raises(DataError, match="fold 2, but harmless-base has test rows of its own"):
        load_comparisons(ComparisonData(("harmless-base",), fold=2), "train", house)


def test_the_report_says_where_rows_came_from(house):
    notes = "\n".join(load_comparisons(ComparisonData(), "train", house)[1].notes)
    assert "helpful-base: official test rows in" in notes and "fold 0 of 5" in notes
    assert "harmless-base: official train and test files" in notes


def test_a_file_and_a_folder_by_path(house, tmp_path):
    file = write(tmp_path / "mine.jsonl", map(row, range(50)))
    train, test = (load_comparisons(ComparisonData((file,)), split, house)[0] for split in ("train", "test"))
    assert sorted(numbers(train) + numbers(test)) == list(range(50)) and test
    inside = ComparisonData(("hh-rlhf/harmless-base",))
    assert numbers(load_comparisons(inside, "test", house)[0]) == list(range(140, 150))


def test_an_opening_on_both_sides_is_an_error_or_is_dropped(house, tmp_path):
    file = write(tmp_path / "mine.jsonl", map(row, range(140, 145)))
    sources = ("harmless-base", file)
    with pytest.raises(DataError, match=r"\d training rows have an opening prompt that is also in test.*'drop'"):
        load_comparisons(ComparisonData(sources), "train", house)
    rows, report = load_comparisons(ComparisonData(sources, overlap="drop"), "train", house)
    assert not set(numbers(rows)) & set(range(140, 150)) and set(range(100, 140)) <= set(numbers(rows))
    assert any("training rows dropped" in note for note in report.notes)


def test_fresh_replies_to_training_prompts_are_for_training(house, tmp_path):
    """A tranche of an online round beside the tranche that its prompts are from: nothing is lost, and nothing of it becomes a test."""
    fresh = write(tmp_path / "fresh.jsonl", [{**row(n), "chosen": f"{row(n)['chosen']} indeed"} for n in range(100, 140)])
    data = ComparisonData(("harmless-base", fresh))
    train, test = (load_comparisons(data, split, house)[0] for split in ("train", "test"))
    assert sorted(numbers(train)) == sorted([*range(100, 140)] * 2) and numbers(test) == list(range(140, 150))
    alone = ComparisonData((fresh,))
    assert load_comparisons(alone, "test", house)[0]  # by the hash, as any file


def test_halves_are_disjoint_and_leave_the_test_side_alone(house):
    halves = {half: numbers(load_comparisons(ComparisonData(half=half), "train", house)[0])
              for half in ("A", "B", None)}
    assert not set(halves["A"]) & set(halves["B"])
    assert sorted(halves["A"] + halves["B"]) == sorted(halves[None])
    assert min(len(halves["A"]), len(halves["B"])) > 30
    tests = [load_comparisons(ComparisonData(half=half), "test", house)[0] for half in ("A", None)]
    assert tests[0] == tests[1]


def test_shares_weights_and_limit(house):
    data = ComparisonData(shares=(3, 1), loss_weights=(1.0, 0.5), limit=40)
    rows, _ = load_comparisons(data, "train", house)
    counts = [sum(each.source == name for each in rows) for name in data.sources]
    assert counts == [30, 10]
    assert {(each.source, each.weight) for each in rows} == {("helpful-base", 1.0), ("harmless-base", 0.5)}
    uneven = load_comparisons(ComparisonData(shares=(1, 4)), "train", house)[0]
    assert [sum(each.source == name for each in uneven) for name in data.sources] == [10, 40]
    only = load_comparisons(ComparisonData(shares=(0, 1)), "train", house)[0]
    assert {each.source for each in only} == {"harmless-base"}
    with pytest.raises(DataError, match="limit 1000 rows"):
        load_comparisons(ComparisonData(limit=1000), "train", house)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(any), st.integers(1, 40), st.integers(0, 40))
def test_mixtures_nest_and_keep_their_shares(sizes, small, more):
    groups = [[(number, k) for k in range(size)] for number, size in enumerate(sizes)]
    everything = mix(groups)
    assert sorted(everything) == sorted(sum(groups, []))
    large = min(small + more, len(everything))
    small = min(small, large)
    few, many = mix(groups, limit=small), mix(groups, limit=large)
    assert many[:small] == few
    for number, size in enumerate(sizes):
        assert abs(sum(group == number for group, _ in few) - small * size / sum(sizes)) <= 1 + len(sizes) / 2


@pytest.mark.parametrize("wrong, message", [
    ({"shares": (1,)}, "shares"), ({"loss_weights": (1, -1)}, "loss_weights"), ({"fold": 5}, "fold 5"),
    ({"half": "C"}, "half 'C'"),
    ({"overlap": "ignore"}, "overlap 'ignore'"), ({"limit": 0}, "limit 0"), ({"sources": ()}, "sources")])
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(DataError, match=message):
        ComparisonData(**wrong)


def test_the_red_team_has_no_comparisons(house):
    with pytest.raises(DataError, match="rated transcripts, not comparisons"):
        load_comparisons(ComparisonData(("red-team-attempts",)), "train", house)


DATA = Path(os.environ.get("HHJAX_DATA", "data"))


@pytest.mark.skipif(not (DATA / "hh-rlhf-split").is_dir(), reason="real comparisons are never shipped: point HHJAX_DATA at a folder with hh-rlhf-split")
def test_fold_0_is_the_shipped_split_of_real_data():
    for name, counts in (("helpful-base", (1859, 493)), ("harmless-base", (1842, 470))):
        for split, count in zip(("train", "test"), counts):
            rows, report = read_comparisons(DATA / "hh-rlhf-split" / name / f"{split}.jsonl.gz")
            assert report.read == count and set(report.reasons) <= {"empty reply"}
            loaded, _ = load_comparisons(ComparisonData((name,)), split, DATA)
            assert sorted(each[:3] for each in loaded) == sorted(each[:3] for each in rows)
