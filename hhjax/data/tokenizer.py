"""Text to token ids and back: trained SentencePiece models, and foreign .model and tokenizer.json files."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hhjax.data.records import DataError
from hhjax.types import Vocabulary

PAD, EOT, EOC = "<pad>", "<eot>", "<eoc>"  # ids 0, 1, 2 of a trained model
MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")

_PIECES = ("\n\nHuman:", "\n\nAssistant:", "\n\n", "\n")  # never split: a turn's header is one token
ALGORITHMS = ("unigram", "bpe")
_SPACE = "\u2581"  # SentencePiece writes a space so; as a character of the text it needs its bytes
_NO_DUMMY_PREFIX = bytes((0x1A, 2, 0x18, 0))  # ModelProto{normalizer_spec{add_dummy_prefix: false}}; appending merges


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as a record of pure functions, with the files that make it again.

    eot_id ends documents and Assistant turns and is the sampling stop, eoc_id is where the PM
    scores (the paper's end-of-context token). No text, "<eot>" included, encodes to one of the
    three special ids. vocab_size counts the rows of the embedding, special ones included.
    """

    pad_id: int
    eot_id: int
    eoc_id: int
    vocab_size: int
    encode_batch: Callable[[Sequence[str]], list[list[int]]]  # texts -> ids, without special ones
    decode_plain: Callable[[list[int]], str]  # ids without special ones -> text
    files: dict[str, bytes]

    @property
    def vocabulary(self) -> Vocabulary:
        """The special ids and the size, as sampling needs them."""
        return Vocabulary(self.pad_id, self.eot_id, self.eoc_id, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special ones."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are left out. For trained models decode(encode(text)) == text."""
        special = (self.pad_id, self.eot_id, self.eoc_id)
        return self.decode_plain([int(i) for i in ids if i not in special])

    def save(self, folder: str | Path) -> None:
        """Write the files that `load_tokenizer(folder)` reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.json, else tokenizer.model) or of one such file.

    A foreign tokenizer's EOS serves as <eot>; <pad> and <eoc> are two rows added at its end.
    Raises DataError if there is no such file, or no EOS in it.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in (JSON_FILE, MODEL_FILE) if (path / name).is_file()), path)
    if not path.is_file():
        raise DataError(f"no {JSON_FILE} or {MODEL_FILE} at {path}: name a folder that holds one, or the file")
    if path.suffix == ".json":
        return _hugging_face(path)
    return _sentencepiece(path.read_bytes(), str(path))


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: str | Path | None = None, seed: int = 0,
                    algorithm: str = "unigram", max_chars: int = 10_000_000) -> Tokenizer:
    """A lossless SentencePiece model of `vocab_size` rows, saved in `out_dir` if given.

    Nothing is normalised, digits stand alone, unknown characters fall back to bytes; ids 0 to 3 are
    <pad>, <eot>, <eoc>, <unk>. Learns from the first `max_chars` characters of a permutation of
    the texts by `seed`; equal arguments give equal bytes. algorithm: one of ALGORITHMS.
    Raises DataError if the texts cannot fill, or do not fit, the vocabulary.
    """
    import sentencepiece

    lines, model = _sample_lines(list(texts), seed, max_chars), io.BytesIO()
    if not lines:
        raise DataError("no text to train a tokenizer on: name a text source")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type=algorithm,
            pad_id=0, pad_piece=PAD, eos_id=1, eos_piece=EOT, control_symbols=[EOC], unk_id=3, unk_piece="<unk>",
            bos_id=-1, user_defined_symbols=list(_PIECES), byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, max_sentence_length=1 << 16, minloglevel=2,
            num_threads=4)  # the same on every machine: sums depend on it
    except RuntimeError as error:
        raise DataError(f"vocab {vocab_size} does not suit these {len(lines):,} lines of text: use another size or "
                        f"more text ({str(error).rsplit('] ', 1)[-1]})") from None
    tokenizer = _sentencepiece(model.getvalue(), "the trained model")
    if out_dir is not None:
        tokenizer.save(out_dir)
    return tokenizer


def _sample_lines(texts: list[str], seed: int, max_chars: int) -> list[str]:
    lines, chars = [], 0
    for i in np.random.Generator(np.random.Philox(seed)).permutation(len(texts)):
        if chars >= max_chars:
            break
        lines += [line for line in texts[i].split("\n") if line.strip()]
        chars += len(texts[i])
    return lines


def _sentencepiece(model: bytes, name: str) -> Tokenizer:
    """Without the space that some models put before every text: turns are encoded one by one and joined."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
    except RuntimeError:
        raise DataError(f"{name} is no SentencePiece model: name a {MODEL_FILE}") from None
    size = processor.get_piece_size()
    own = size > 3 and [processor.id_to_piece(i) for i in range(3)] == [PAD, EOT, EOC]
    if processor.eos_id() < 0:
        raise DataError(f"{name} has no EOS piece, which is needed as the stop: use a model with one")
    special = (0, 1, 2, size) if own else (size, processor.eos_id(), size + 1, size + 2)
    bytes_of_space = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    has_bytes = all(map(processor.is_byte, bytes_of_space))

    def encode_batch(texts):
        ids = processor.encode(list(texts), num_threads=4)
        for i, text in enumerate(texts):
            if has_bytes and _SPACE in text:
                first, *rest = processor.encode(text.split(_SPACE))
                ids[i] = first + [token for part in rest for token in bytes_of_space + part]
        return ids

    return Tokenizer(*special, encode_batch, processor.decode, {MODEL_FILE: model})


def _hugging_face(path: Path) -> Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is no Hugging Face tokenizer ({error}): name a {JSON_FILE}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" written by a user is text
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    eos = next((name for name in (_configured_eos(path), *EOS_NAMES) if name in vocab), None)
    if eos is None:
        raise DataError(f"{path} has no EOS token: write eos_token into {path.with_name(CONFIG_FILE)}")
    size = max(vocab.values()) + 1
    files = {JSON_FILE: path.read_bytes(), CONFIG_FILE: json.dumps({"eos_token": eos}).encode()}

    def encode_batch(texts):
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False)

    return Tokenizer(size, vocab[eos], size + 1, size + 2, encode_batch, decode, files)


def _configured_eos(path: Path) -> str | None:
    """The eos_token of the tokenizer_config.json beside `path`, a string or an object with "content"."""
    config = path.with_name(CONFIG_FILE)
    eos = json.loads(config.read_text()).get("eos_token") if config.is_file() else None
    return eos.get("content") if isinstance(eos, dict) else eos
