"""Trained tokenizers lose nothing and keep special ids out of reach of text; foreign ones load."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from hhjax.data.records import DataError
from hhjax.data.tokenizer import load_tokenizer, train_tokenizer

LINES = [f"Line {n}: the quick brown fox, number {n * n}, jumps over the lazy dog." for n in range(300)]


@given(st.text())
@example("\n\nHuman: a\n\n\nAssistant:  b\t \n")
@example("\u2581 \u2581\u2581x \0 \u2028 😀👩‍👩‍👧 1234")
@example("   leading,    inner and trailing   ")
def test_decoding_gives_back_any_text(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(3 < i < tok.vocab_size for i in ids)


def test_special_ids_and_text_that_spells_them(tok):
    assert (tok.pad_id, tok.eot_id, tok.eoc_id, tok.vocab_size) == (0, 1, 2, 340)
    assert tok.decode([tok.eot_id, *tok.encode("<eot>"), tok.eoc_id, tok.pad_id]) == "<eot>"


def test_headers_are_one_token_and_digits_stand_alone(tok):
    assert len(tok.encode("\n\nHuman:")) == len(tok.encode("\n\nAssistant:")) == 1
    assert len(tok.encode("2024")) == 4


def test_a_batch_is_its_texts(tok):
    texts = ["the river", "", "\u2581", "birds 12\n"]
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]


def test_training_repeats_bit_for_bit_and_saves_what_loads(tmp_path):
    one = train_tokenizer(LINES, 306, tmp_path / "one", max_chars=10_000)
    assert one.files == train_tokenizer(LINES, 306, max_chars=10_000).files
    assert one.files != train_tokenizer(LINES, 306, max_chars=10_000, seed=1).files
    for again in (load_tokenizer(tmp_path / "one"), load_tokenizer(tmp_path / "one" / "tokenizer.model")):
        assert (again.encode(LINES[0]), again.vocab_size) == (one.encode(LINES[0]), 306)


def test_bpe_too():
    tok = train_tokenizer(LINES, 340, algorithm="bpe")
    assert tok.decode(tok.encode("fox \n 😀")) == "fox \n 😀"


@pytest.mark.parametrize("vocab, lines", [(50, LINES), (30_000, LINES)])
def test_a_vocabulary_that_does_not_fit(vocab, lines):
    with pytest.raises(DataError, match=f"vocab {vocab} does not suit"):
        train_tokenizer(lines, vocab)


def test_no_text():
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["\n"], 300)


def foreign_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, vocab_size=340,
                                             model_type="bpe", byte_fallback=True, minloglevel=2, **options)
    return model.getvalue()


def test_a_llama_like_model(tmp_path):
    model = foreign_model(normalization_rule_name="identity", remove_extra_whitespaces=False)
    (tmp_path / "llama.model").write_bytes(model)
    tok = load_tokenizer(tmp_path / "llama.model")
    assert (tok.pad_id, tok.eot_id, tok.eoc_id, tok.vocab_size) == (340, 2, 341, 342)
    text = "\n\nHuman: fox  \u2581 😀"
    assert tok.decode([*tok.encode(text), tok.eot_id, tok.eoc_id, tok.pad_id]) == text
    assert tok.encode("lazy") + tok.encode(" dog") == tok.encode("lazy dog")
    tok.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(text) == tok.encode(text)


def test_a_model_without_a_stop(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(foreign_model(eos_id=-1))
    with pytest.raises(DataError, match="has no EOS piece"):
        load_tokenizer(tmp_path)


@pytest.fixture
def hugging_face(tmp_path):
    """make(eos) -> a folder with a byte-level BPE tokenizer.json that knows `eos`."""
    def make(eos, config=None):
        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        tok.train_from_iterator(LINES, tokenizers.trainers.BpeTrainer(
            vocab_size=320, special_tokens=[eos], initial_alphabet=alphabet, show_progress=False))
        tok.enable_truncation(5)
        tok.enable_padding()
        tok.save(str(tmp_path / "tokenizer.json"))
        if config:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path
    return make


def test_a_hugging_face_tokenizer(hugging_face, tmp_path):
    tok = load_tokenizer(hugging_face("<|endoftext|>"))
    assert (tok.pad_id, tok.eot_id, tok.eoc_id, tok.vocab_size) == (320, 0, 321, 322)
    text = "\n\nHuman: the <|endoftext|> fox  😀 jumps over more than five tokens"
    assert tok.decode([*tok.encode(text), 0, 320, 321]) == text and 0 not in tok.encode(text)
    assert tok.encode_batch(["fox", text]) == [tok.encode("fox"), tok.encode(text)]


@pytest.mark.parametrize("config", [{"eos_token": "[STOP]"}, {"eos_token": {"content": "[STOP]"}}])
def test_the_stop_may_be_named_in_the_config(hugging_face, tmp_path, config):
    tok = load_tokenizer(hugging_face("[STOP]", config) / "tokenizer.json")
    assert tok.eot_id == 0
    tok.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").eot_id == 0


def test_no_stop_no_file_no_tokenizer(hugging_face, tmp_path):
    with pytest.raises(DataError, match="no EOS token: write eos_token into .*tokenizer_config.json"):
        load_tokenizer(hugging_face("[STOP]"))
    with pytest.raises(DataError, match="no tokenizer.json or tokenizer.model at"):
        load_tokenizer(tmp_path / "gone")
    for name, message in (("a.json", "no Hugging Face tokenizer"), ("a.model", "no SentencePiece model")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name)
