"""Where data is found, the hub (a local folder), and text of every kind."""

import gzip
import json
import zipfile

import pytest

from hhjax.data.comparisons import ComparisonData, load_comparisons
from hhjax.data.records import DataError
from hhjax.data.sources import (TextData, cut, data_files, detokenise, download, find_data_dir, find_source,
                                load_documents, red_team_attempts)
from hhjax.data.transcripts import Turn


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def pair(number):
    prompt = f"\n\nHuman: Question {number}?\n\nAssistant:"
    return {"chosen": prompt + " yes", "rejected": prompt + " no"}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No data folder and no cache but the test's own."""
    monkeypatch.delenv("HHJAX_DATA", raising=False)
    monkeypatch.delenv("HHJAX_HH_REPO", raising=False)
    monkeypatch.setenv("HHJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local folder with the layout of the repository on the hub."""
    repo = tmp_path / "hub"
    for tranche, first in (("helpful-base", 0), ("helpful-online", 100)):
        jsonl(repo / tranche / "train.jsonl.gz", map(pair, range(first, first + 8)))
        jsonl(repo / tranche / "test.jsonl.gz", map(pair, range(first + 8, first + 11)))
    attempt = {"transcript": "\n\nHuman: Say it\n\nAssistant: No", "rating": 1.0,
               "min_harmlessness_score_transcript": -2.5}
    jsonl(repo / "red-team-attempts" / "red_team_attempts.jsonl.gz", [attempt] * 3)
    monkeypatch.setenv("HHJAX_HH_REPO", str(repo))
    return repo


def test_the_order_of_data_folders(tmp_path, monkeypatch):
    assert find_data_dir()[0] is None and "Anthropic/hh-rlhf" in find_data_dir()[1]
    (tmp_path / "here" / "data").mkdir()
    assert find_data_dir()[1] == "data from ./data"
    monkeypatch.setenv("HHJAX_DATA", str(tmp_path))
    assert find_data_dir() == (tmp_path, f"data from {tmp_path} (HHJAX_DATA)")
    assert find_data_dir("data")[1] == "data from data (--data-dir)"
    with pytest.raises(DataError, match="--data-dir is 'gone', which is no folder"):
        find_data_dir("gone")


def test_a_tranche_from_the_hub_is_kept_and_said(hub):
    data = ComparisonData(("helpful-base", "helpful-online"))
    train, report = load_comparisons(data, "train")
    assert len(train) == 16 and len(load_comparisons(data, "test")[0]) == 6
    assert report.notes[0] == f"no data folder: tranches of HH come from {hub} on the hub" and "official files of" in report.notes[1]
    files = data_files(data)
    assert [file.name for file in files] == ["train.jsonl.gz", "test.jsonl.gz"] * 2
    before = [file.read_bytes() for file in files]
    hub.rename(hub.with_name("offline"))
    assert load_comparisons(data, "train")[0] == train
    assert [file.read_bytes() for file in data_files(data)] == before


def test_equal_rows_are_equal_bytes_whenever_they_were_downloaded(hub, tmp_path, monkeypatch):
    one = download("helpful-base", cache=tmp_path / "one") / "train.jsonl.gz"
    monkeypatch.setattr("time.time", lambda: 1e9)
    two = download("helpful-base", cache=tmp_path / "two") / "train.jsonl.gz"
    assert one.read_bytes() == two.read_bytes()


def test_nothing_to_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HHJAX_HH_REPO", str(tmp_path / "no-hub"))
    with pytest.raises(DataError, match="helpful-online is in no data folder .*HHJAX_DATA.*hh-rlhf/helpful-online"):
        find_source("helpful-online")
    with pytest.raises(DataError, match="no data 'helpful-bsae' here.*names known: helpful-base"):
        find_source("helpful-bsae")


def test_a_folder_must_not_be_ambiguous(tmp_path):
    for name in ("train.jsonl", "train.json", "test.jsonl"):
        jsonl(tmp_path / "mine" / name, [pair(1)])
    with pytest.raises(DataError, match="train.json, train.jsonl: keep one"):
        find_source(str(tmp_path / "mine"))


def test_evaluation_sets_are_refused(tmp_path):
    jsonl(tmp_path / "data" / "hhh-alignment" / "a.jsonl", [pair(1)])
    for ask in (lambda: find_source("hhh-alignment", tmp_path / "data"),
                lambda: load_documents(TextData(("hhh-alignment/a.jsonl",)), tmp_path / "data")):
        with pytest.raises(DataError, match="for evaluation only"):
            ask()


def test_the_red_team_is_text_of_human_turns(hub):
    assert red_team_attempts() == [((Turn("Human", "Say it"), Turn("Assistant", "No")), 1.0, -2.5)] * 3
    documents = load_documents(TextData(("red-team-attempts",)))
    assert [doc.turns for doc in documents] == [(Turn("Human", "Say it"),)] * 3


def test_of_comparisons_only_the_human_turns_of_the_training_side_are_text(hub):
    documents = load_documents(TextData(("helpful-base",))) + load_documents(TextData(("helpful-online",)))
    assert {turn.role for doc in documents for turn in doc.turns} == {"Human"}
    assert "Question 8?" not in {turn.text for doc in documents for turn in doc.turns}


@pytest.fixture
def shelf(tmp_path):
    """A data folder with a little of each text source."""
    turns = [{"speaker": "USER", "utterance": "A table for two."}, {"speaker": "SYSTEM", "utterance": "Which city?"}]
    jsonl(tmp_path / "dialogue-sgd" / "train.jsonl.gz", [{"dialogue_id": "1", "turns": turns}])
    (tmp_path / "text-gutenberg").mkdir()
    book = "[ A Book ]\nCHAPTER 1\nIt rained , they said .\n`` Oh ! '' cried he ; `` I would n't go .\n"
    for name in ("a.txt.gz", "austen-emma.raw.txt.gz"):
        (tmp_path / "text-gutenberg" / name).write_bytes(gzip.compress(book.encode()))
    (tmp_path / "text-us-speeches").mkdir()
    with zipfile.ZipFile(tmp_path / "text-us-speeches" / "a.zip", "w") as file:
        file.writestr("a/1.txt", "Fellow citizens of caf\xe9s:\r\nhello.".encode("latin-1"))
        file.writestr("a/README", "not a speech")
    (tmp_path / "text-wikitext2").mkdir()
    wiki = " = Lobster = \n \n It is 0 @.@ 7 m ( 2 ft ) long . The <unk> is blue . It eats 1 @,@ 000 fish . \n"
    (tmp_path / "text-wikitext2" / "valid.txt.gz").write_bytes(gzip.compress(wiki.encode()))
    return tmp_path


def documents(shelf, *names):
    return [doc for split in ("train", "test") for doc in _or_none(TextData(names), shelf, split)]


def _or_none(data, shelf, split):
    try:
        return load_documents(data, shelf, split)
    except DataError:
        return []


def test_each_text_source(shelf):
    turns = Turn("Human", "A table for two."), Turn("Assistant", "Which city?")
    assert documents(shelf, "dialogue-sgd") == [("Human: A table for two.\n\nAssistant: Which city?", turns)]
    assert [doc.text for doc in documents(shelf, "text-gutenberg")] == [
        '[A Book]\nCHAPTER 1\nIt rained, they said. "Oh!" cried he; "I wouldn\'t go.']
    assert [doc.text for doc in documents(shelf, "text-us-speeches")] == ["Fellow citizens of caf\xe9s:\nhello."]
    assert [doc.text for doc in documents(shelf, "text-wikitext2")] == [
        "Lobster\nIt is 0.7 m (2 ft) long. It eats 1,000 fish."]
    assert len(data_files(TextData(), shelf)) == 4


def test_text_by_path(tmp_path):
    (tmp_path / "a.txt").write_text("plain text")
    chat = [{"role": role, "content": said} for role, said in (("system", "x"), ("user", "Hi"), ("assistant", "Yes"))]
    jsonl(tmp_path / "b.jsonl", [{"text": "in a row"}, {"messages": chat}, {"neither": 1}, 7, {"text": "half \ud800"}])
    found = documents(tmp_path, str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    assert {doc.text for doc in found} == {"plain text", "in a row", "Human: Hi\n\nAssistant: Yes", "half ?"}
    with pytest.raises(DataError, match="no known format"):
        (tmp_path / "a.pdf").touch()
        load_documents(TextData((str(tmp_path / "a.pdf"),)))


def test_one_document_in_fifty_is_held_out_and_limits_nest(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": f"document number {number}"} for number in range(2000)])
    data = TextData((str(tmp_path / "a.jsonl"),))
    train, test = load_documents(data), load_documents(data, split="test")
    assert not set(train) & set(test) and len(train) + len(test) == 2000 and 20 <= len(test) <= 60
    small, large = (load_documents(TextData(data.sources, limit)) for limit in (1000, 5000))
    assert large[: len(small)] == small and 900 < sum(len(doc.text) for doc in small) <= 1000


def test_long_text_is_cut_where_it_hurts_least():
    text = "\n\n".join("A sentence of some words. " * 20 for _ in range(10))
    pieces = list(cut(text, 1200))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(600 <= len(piece) <= 1200 for piece in pieces[:-1]) and all(piece.endswith(".") for piece in pieces)
    assert list(cut("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5] and list(cut(" ")) == []


def test_detokenise():
    assert detokenise('He said , `` the King \'s men ( all ) are n\'t here -- no ! \'\'') == (
        'He said, "the King\'s men (all) aren\'t here--no!"')
