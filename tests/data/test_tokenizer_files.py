"""Vocabularies of other projects: BERT's, CLIP's, RoBERTa's."""

import gzip
import json
import pickle
import unicodedata

import numpy as np
import pytest
import tokenizers

from tests.data import tokenizer_reference as reference
from vlp_jax import config as config_lib
from vlp_jax.data import clip_text, pipeline, sources, tokenizer
from vlp_jax.errors import UserError

KINDS = ("bert", "bert-cased", "clip", "clip-gz", "roberta", "json")
SPECIALS = {
  "bert": ("[CLS]", "[SEP]", "[PAD]"),
  "clip": ("<|startoftext|>", "<|endoftext|>", "!"),
  "roberta": ("<s>", "</s>", "<pad>"),
}
LENGTH = 400


def load(path, vocab_size=100_000):
  config = config_lib.default_config()
  config.tokenizer.path = str(path)
  config.tokenizer.vocab_size = vocab_size
  return tokenizer.get_tokenizer(config)


def write(folder, kind):
  """Writes a vocabulary; returns its path, pieces, and `text -> pieces`."""
  if kind.startswith("bert"):
    lowercase = kind == "bert"
    path, vocab = reference.write_bert(folder, lowercase)
    return (
      path,
      vocab,
      lambda text: [
        piece
        for word in reference.bert_words(text, lowercase)
        for piece in reference.wordpiece(word, set(vocab))
      ],
    )
  base = "clip" if kind.startswith("clip") else "roberta"
  path, vocab, merges = reference.write_bpe(folder, base)
  if kind == "clip-gz":
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
  if kind == "json":
    path = folder / "tokenizer.json"
    path.write_text(hugging_face_json(vocab, merges))

  def split(text):
    if base == "roberta":
      return reference.gpt2_words(text)
    text = unicodedata.normalize("NFC", clip_text.clean(text))
    return reference.clip_words(text.lower())

  suffix = "</w>" if base == "clip" else ""
  return (
    path,
    vocab,
    lambda text: [
      piece
      for word in split(text)
      for piece in reference.byte_bpe(word, merges, suffix)
    ],
  )


def hugging_face_json(vocab, merges) -> str:
  """Writes RoBERTa's `tokenizer.json` with all that could get in the way."""
  library = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {piece: i for i, piece in enumerate(vocab)},
      [tuple(merge.split(" ")) for merge in merges],
    )
  )
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  library.decoder = tokenizers.decoders.ByteLevel()
  library.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
  library.post_processor = tokenizers.processors.RobertaProcessing(
    ("</s>", vocab.index("</s>")), ("<s>", vocab.index("<s>"))
  )
  library.enable_truncation(3)
  library.enable_padding(length=7)
  return library.to_str()


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
  """A kind: (name, tokenizer, pieces of the vocabulary, text -> pieces)."""
  folder = tmp_path_factory.mktemp(request.param)
  path, vocab, expected = write(folder, request.param)
  return request.param, load(path), vocab, expected


def specials(kind):
  return SPECIALS[{"json": "roberta"}.get(kind, kind.split("-")[0])]


# --- The interface ----------------------------------------------------------


def test_ids_against_the_reference(case):
  kind, made, vocab, expected = case
  assert made.vocab_size == len(vocab)
  bos, eos, pad = map(vocab.index, specials(kind))
  assert (made.bos_id, made.eos_id, made.pad_id) == (bos, eos, pad)
  for text in reference.TEXTS + reference.UNTIDY:
    ids, length = made.encode(text, LENGTH)
    assert ids.dtype == np.int32 and ids.shape == (LENGTH,)
    assert [ids[0], ids[length - 1]] == [bos, eos]
    found = [vocab[i] for i in ids[1 : length - 1]]
    assert found == expected(text), text
    assert (ids[length:] == pad).all()
    assert made.length(text) == length


def test_long_texts_end_in_eos(case):
  _, made, _, _ = case
  full, _ = made.encode(reference.CORPUS, LENGTH)
  for max_len in (2, 3, 9):
    ids, length = made.encode(reference.CORPUS, max_len)
    assert length == max_len
    np.testing.assert_array_equal(ids, [*full[: max_len - 1], made.eos_id])


def test_batches(case):
  _, made, _, _ = case
  ids, lengths = made.encode_batch(reference.TEXTS, 12)
  assert ids.dtype == lengths.dtype == np.int32
  for row, text in enumerate(reference.TEXTS):
    one, length = made.encode(text, 12)
    np.testing.assert_array_equal(ids[row], one)
    assert lengths[row] == length


def test_spans_cover_the_text(case):
  _, made, vocab, _ = case
  for text in reference.TEXTS + reference.UNTIDY:
    pieces = made.pieces(text)
    ids, length = made.encode(text, LENGTH)
    assert [p for p, _, _ in pieces] == [vocab[i] for i in ids[1 : length - 1]]
    end = pieces[0][1] if pieces else 0
    for _, start, stop in pieces:
      assert start == end <= stop <= len(text)
      end = stop
  spans = made.pieces("a  red square")
  words = "".join("a  red square"[a:b] for _, a, b in spans)
  assert words == "a  red square"


def test_spans_are_of_the_given_text(case):
  kind, made, _, _ = case
  if kind.startswith("clip"):
    text = "&lt;b&gt; ﬁ 🙂 “red”"
    told = [(p, text[a:b]) for p, a, b in made.pieces(text)]
    assert told[:2] == [("<</w>", "&lt;"), ("b</w>", "b")]
    assert told[2] == ("></w>", "&gt;")
    assert "".join(part for _, part in told) == text
    assert [part for _, part in told if "🙂" in part] == ["🙂"]


def test_decoding(case):
  kind, made, _, _ = case
  text = "a red square, it's 12 cats"
  ids, length = made.encode(text, 60)
  ids[length:] = ids[1]  # what a decoder may write after the end
  decoded = made.decode(ids)
  if kind.startswith(("bert", "clip")):  # blanks around marks are not kept
    assert decoded.replace(" ", "") == text.replace(" ", "")
    assert decoded.startswith("a red square")
  else:
    assert decoded == text
  assert made.decode([]) == ""
  inner = [made.bos_id, *ids[1:length]]
  assert made.decode([*inner[:-1], made.mask_id]) == decoded
  if not kind.startswith("bert"):
    for text in ("日本 🙂 café", "a\u00a0b"):
      decoded = made.decode(made.encode(text, 99)[0])
      assert decoded == (" ".join(text.split()) if "clip" in kind else text)


def test_specials_in_a_text_are_spelt_out(case):
  _, made, vocab, _ = case
  names = {"[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<mask>", "<pad>"}
  names |= {"<|startoftext|>", "<|endoftext|>"}
  special = [vocab.index(name) for name in names & set(vocab)]
  for name in sorted(names):
    ids, length = made.encode(f"a {name} b", 60)
    assert not np.isin(ids[1 : length - 1], special).any(), name


def test_picklable_and_known_by_its_hash(case, tmp_path):
  _, made, _, _ = case
  copy = pickle.loads(pickle.dumps(made))
  assert copy.sha256 == made.sha256 and copy.model == made.model
  assert copy.pieces("a red ring") == made.pieces("a red ring")
  kept = tmp_path / "tokenizer.model"  # as in a run's folder
  kept.write_bytes(made.model)
  again = load(kept)
  assert again.sha256 == made.sha256
  for text in reference.TEXTS:
    np.testing.assert_array_equal(
      again.encode(text, 50)[0], made.encode(text, 50)[0]
    )


def test_the_hash_is_in_the_fingerprint(case, jsonl_config, tmp_path):
  kind, made, _, _ = case
  source = sources.open_source(jsonl_config.data, "train")
  first = pipeline.data_fingerprint(source, made, jsonl_config)
  assert first["tokenizer"] == made.sha256
  path, _, _ = write(tmp_path, kind)
  assert load(path).sha256 == made.sha256  # the same vocabulary, read again
  if kind.startswith("bert"):
    path.write_text(path.read_text().replace("square", "squash"))
    assert load(path).sha256 != made.sha256


def test_clip_files_are_one_vocabulary(tmp_path):
  models = set()
  for kind in ("clip", "clip-gz"):
    folder = tmp_path / kind
    folder.mkdir()
    models.add(load(write(folder, kind)[0]).sha256)
  assert len(models) == 1


# --- Words ------------------------------------------------------------------


def words_of(made, text):
  """The parts of a text that are whole words, as it was written."""
  ids = made.word_ids(text, 60)
  length = made.length(text)
  assert ids.dtype == np.int32 and ids.shape == (60,)
  assert ids[0] == -1 and (ids[length - 1 :] == -1).all()
  numbers = ids[1 : length - 1]
  assert numbers[0] == 0 and set(np.diff(numbers)) <= {0, 1}
  words = [""] * (numbers[-1] + 1)
  for number, (_, start, end) in zip(numbers, made.pieces(text), strict=True):
    words[number] += text[start:end]
  return words


@pytest.mark.parametrize(
  "kind, expected",
  [
    ("bert", ["red", "-", "rings", ",", "it", "'", "s", "12", "cats"]),
    ("clip", ["red", "-", "rings", ",", "it", "'s", "1", "2", "cats"]),
    ("roberta", ["red-rings,", "it's", "12", "cats"]),
    ("json", ["red-rings,", "it's", "12", "cats"]),
  ],
)
def test_whole_words(tmp_path, kind, expected):
  made = load(write(tmp_path, kind)[0])
  words = words_of(made, "red-rings, it's 12 cats")
  assert [word.strip() for word in words] == expected
  assert made.length("red-rings, it's 12 cats") > len(expected) + 2


def test_whole_words_of_other_scripts(tmp_path):
  made = load(write(tmp_path, "bert")[0])
  assert words_of(made, "赤い a") == ["赤", "い", " a"]
  (tmp_path / "b").mkdir()
  made = load(write(tmp_path / "b", "clip")[0])
  assert words_of(made, "日本 🙂 a") == ["日本", " 🙂", " a"]


def test_whole_words_of_sentencepiece():
  made = tokenizer.Tokenizer(tokenizer.train([reference.CORPUS], 90))
  words = words_of(made, "it's a red-hot ring, 12 cats")
  expected = ["it's", "a", "red-hot", "ring,", "12", "cats"]
  assert [word.strip() for word in words] == expected


def test_words_of_a_text_that_is_cut(case):
  _, made, _, _ = case
  full = made.word_ids(reference.CORPUS, LENGTH)
  cut = made.word_ids(reference.CORPUS, 9)
  np.testing.assert_array_equal(cut, [*full[:8], -1])
  np.testing.assert_array_equal(made.word_ids("", 4), -1)


# --- Mistakes ---------------------------------------------------------------


def test_a_bert_vocabulary_that_has_capitals_keeps_them(tmp_path):
  path, vocab = reference.write_bert(tmp_path, lowercase=False)
  made = load(path)
  ids, _ = made.encode("The Red the", 9)
  assert [vocab[i] for i in ids[1:4]] == ["The", "Red", "the"]


def test_windows_line_ends(tmp_path):
  path, vocab = reference.write_bert(tmp_path)
  unix = load(path)
  path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
  assert load(path).sha256 == unix.sha256 and unix.vocab_size == len(vocab)


def error_of(path, **kwargs):
  with pytest.raises(UserError) as caught:
    load(path, **kwargs)
  message = str(caught.value)
  assert "\n" not in message and message.startswith(f"tokenizer.path={path}")
  return message


@pytest.mark.parametrize("name", ["[CLS]", "[SEP]", "[UNK]"])
def test_a_vocabulary_without_its_specials(tmp_path, name):
  path, _ = reference.write_bert(tmp_path)
  path.write_text(path.read_text().replace(name, "[other]"))
  assert f"has no {name}" in error_of(path)


def test_missing_merges(tmp_path):
  path, _, _ = reference.write_bpe(tmp_path, "roberta")
  (tmp_path / "merges.txt").unlink()
  assert f"no {tmp_path / 'merges.txt'}" in error_of(path)


def test_broken_merges(tmp_path):
  path, _, _ = reference.write_bpe(tmp_path, "roberta")
  merges = tmp_path / "merges.txt"
  good = merges.read_text()
  merges.write_text(good + "one two three\n")
  assert "merge 61 is not two pieces: 'one two three'" in error_of(path)
  merges.write_text(good + "nosuch piece\n")
  assert "cannot" in error_of(path) or "can be read" in error_of(path)
  assert "name the vocab.json" in error_of(merges)


def test_a_vocabulary_that_is_not_of_bytes(tmp_path):
  path, _, _ = reference.write_bpe(tmp_path, "roberta")
  ids = json.loads(path.read_text())
  path.write_text(json.dumps({**ids, "more": len(ids) + 1}))
  assert "without a gap" in error_of(path)
  missing = {p: i for i, p in enumerate(p for p in ids if p != "Ġ")}
  path.write_text(json.dumps(missing))
  assert "lacks 1 of the 256 pieces" in error_of(path)
  no_start = {p.replace("<s>", "<t>"): i for p, i in ids.items()}
  path.write_text(json.dumps(no_start))
  assert "no symbols for the start" in error_of(path)


@pytest.mark.parametrize(
  "name, content, hint",
  [
    ("notes.txt", b"some\nlines\n", "unknown kind"),
    ("vocab.txt", b"\xff\xfe[CLS]", "not UTF-8"),
    ("vocab.json", b'{"a": ', "not JSON"),
    ("vocab.json", b'{"a": "b"}', "unknown kind"),
    ("vocab.json", b"{}", "merges"),
    ("tokenizer.json", b'{"model": {"type": "Nonsense"}}', "can be read"),
    ("merges.txt.gz", b"\x1f\x8bnonsense", "damaged .gz"),
    ("tokenizer.model", b"\x00\x01", "not a SentencePiece model"),
    ("tokenizer.model", b'{"type": "wordpiece"}', "can be read"),
  ],
)
def test_files_of_another_kind(tmp_path, name, content, hint):
  path = tmp_path / name
  path.write_bytes(content)
  assert hint in error_of(path)


def test_a_model_that_marks_no_words(tmp_path):
  library = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a")
  )
  path = tmp_path / "tokenizer.json"
  path.write_text(library.to_str())
  assert "WordLevel" in error_of(path)


def test_more_pieces_than_the_model_has_rows(tmp_path):
  path, vocab = reference.write_bert(tmp_path)
  size = len(vocab)
  load(path, vocab_size=size)
  message = error_of(path, vocab_size=size - 1)
  assert f"--config.tokenizer.vocab_size={size}" in message
