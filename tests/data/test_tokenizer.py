import io
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from vlp_jax.data import sources
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError

CAPTIONS = [
  *("a red square", "a blue circle above a red square", "Two green RINGS"),
  *(
    "ein grüner Kreis über dem Quadrat",
    "forêt à l'automne",
    "赤い 四角 と 青い 円",
  ),
  *("красный квадрат слева от круга", "ένας κύκλος", "a small ﬁsh, ½ price"),
]


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.Tokenizer(tokenizer_lib.train(CAPTIONS, 512))


def train_plain(**kwargs):
  """Trains a model with SentencePiece's own defaults."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CAPTIONS),
    model_writer=model,
    vocab_size=200,
    hard_vocab_limit=False,
    minloglevel=3,
    **kwargs,
  )
  return model.getvalue()


# --- Encoding ---------------------------------------------------------------


def test_encode_against_sentencepiece(tokenizer):
  processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  assert processor.pad_id() == 0 and processor.unk_id() == 1
  assert processor.bos_id() == 2 and processor.eos_id() == 3
  assert tokenizer.vocab_size == processor.get_piece_size()
  for caption in CAPTIONS:
    expected = [2, *processor.encode(caption), 3]
    ids, length = tokenizer.encode(caption, 100)
    assert ids.dtype == np.int32 and ids.shape == (100,)
    assert length == len(expected)
    np.testing.assert_array_equal(ids[:length], expected)
    np.testing.assert_array_equal(ids[length:], 0)


def test_long_captions_end_in_eot(tokenizer):
  full, _ = tokenizer.encode(CAPTIONS[1], 100)
  for max_len in range(2, 8):
    ids, length = tokenizer.encode(CAPTIONS[1], max_len)
    assert length == max_len
    np.testing.assert_array_equal(ids, [*full[: max_len - 1], 3])


def test_empty_string(tokenizer):
  ids, length = tokenizer.encode("", 5)
  np.testing.assert_array_equal(ids, [2, 3, 0, 0, 0])
  assert length == 2
  assert tokenizer.decode(ids) == ""
  assert tokenizer.pieces("") == []


def test_encode_batch(tokenizer):
  ids, lengths = tokenizer.encode_batch(CAPTIONS, 9)
  assert ids.shape == (len(CAPTIONS), 9)
  assert ids.dtype == lengths.dtype == np.int32
  for row, caption in enumerate(CAPTIONS):
    one, length = tokenizer.encode(caption, 9)
    np.testing.assert_array_equal(ids[row], one)
    assert lengths[row] == length
  ids, lengths = tokenizer.encode_batch([], 9)
  assert ids.shape == (0, 9) and lengths.shape == (0,)


@pytest.mark.parametrize("vocab_size", [512, 2048])
def test_round_trip(vocab_size):
  tokenizer = tokenizer_lib.Tokenizer(tokenizer_lib.train(CAPTIONS, vocab_size))
  for caption in CAPTIONS[:-1]:
    ids, _ = tokenizer.encode(caption, 100)
    assert tokenizer.unk_id not in ids
    expected = caption.lower().replace("ς", "σ")  # the fold of a final sigma
    assert tokenizer.decode(ids) == expected
  # NFKC takes ligatures and fractions apart.
  ids, _ = tokenizer.encode(CAPTIONS[-1], 100)
  assert tokenizer.decode(ids) == "a small fish, 1⁄2 price"


def test_large_vocabularies_spell_unseen_characters():
  tokenizer = tokenizer_lib.Tokenizer(tokenizer_lib.train(CAPTIONS, 2048))
  assert tokenizer.decode(tokenizer.encode("日本 ж 🙂", 100)[0]) == "日本 ж 🙂"


def test_decode_stops_at_eot_and_drops_specials(tokenizer):
  ids, length = tokenizer.encode("a red square", 20)
  ids[length:] = ids[1]  # what a decoder may write after EOT
  assert tokenizer.decode(ids) == "a red square"
  assert tokenizer.decode([0, 2, 1, *ids[1:length].tolist()]) == "a red square"
  assert tokenizer.decode([]) == ""


def test_pieces(tokenizer):
  for caption in [*CAPTIONS, "  A  red   Square ", "½ ﬁ É!"]:
    pieces = tokenizer.pieces(caption)
    _, length = tokenizer.encode(caption, 100)
    assert len(pieces) == length - 2
    end = 0
    for _, start, stop in pieces:
      assert start >= end and stop >= start
      end = stop
    joined = "".join(caption[start:stop] for _, start, stop in pieces)
    assert joined == caption.strip()
  text = "Two green RINGS"
  spans = [s for s in tokenizer.pieces(text) if s[1] < 3]
  assert text[: spans[-1][2]] == "Two"


def test_picklable(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.sha256 == tokenizer.sha256
  assert copy.pieces("a red ring") == tokenizer.pieces("a red ring")


# --- Training ---------------------------------------------------------------


@pytest.mark.parametrize(
  "captions", [["a"], ["cat"], ["a red cat"], ["x" * 5000], ["", "one"]]
)
def test_train_on_little(captions):
  tokenizer = tokenizer_lib.Tokenizer(tokenizer_lib.train(captions, 512))
  ids, _ = tokenizer.encode(captions[-1][:50], 100)
  assert tokenizer.decode(ids) == captions[-1][:50]


def test_training_is_deterministic_in_other_processes(tmp_path):
  program = (
    "import sys; from vlp_jax.data import tokenizer as t; captions = "
    "[f'a picture of number {i} and {i * i}' for i in range(500)]; "
    "print(t.Tokenizer(t.train(captions, 300)).sha256)"
  )
  run = [
    subprocess.run(
      [sys.executable, "-c", program],
      env={**os.environ, "PYTHONHASHSEED": seed},
      capture_output=True,
      text=True,
      check=True,
    )
    for seed in ("1", "2")
  ]
  assert run[0].stdout == run[1].stdout and len(run[0].stdout) == 65
  assert run[0].stderr == ""  # SentencePiece is quiet


def test_train_samples_evenly(monkeypatch):
  monkeypatch.setattr(tokenizer_lib, "_MAX_CAPTIONS", 10)
  kept = tokenizer_lib._sample(str(i) for i in range(100))
  assert kept == [str(i) for i in range(0, 100, 16)]


def test_more_characters_than_pieces():
  captions = ["".join(map(chr, range(0x4E00, 0x4E00 + 900)))]
  with pytest.raises(
    UserError, match=r"vocab_size=512 is too small .*900 diff"
  ):
    tokenizer_lib.train(captions, 512)
  # Where most of the text is in few characters, the rest goes into bytes.
  captions += ["a red square and a blue circle"] * 10_000
  tokenizer = tokenizer_lib.Tokenizer(tokenizer_lib.train(captions, 512))
  assert tokenizer.vocab_size <= 512
  text = "一 red 丁"
  assert tokenizer.decode(tokenizer.encode(text, 50)[0]) == text


def test_no_text_at_all():
  with pytest.raises(UserError, match="no caption to train"):
    tokenizer_lib.train(["", " "], 512)


# --- Keeping ----------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  return tmp_path / "home"


def models(directory):
  return sorted(directory.rglob("*.model"))


def forbid_training(monkeypatch):
  def fail(*args):
    raise AssertionError("trained again")

  monkeypatch.setattr(tokenizer_lib, "train", fail)


def test_kept_beside_a_jsonl(jsonl_config, home, tmp_path, monkeypatch):
  first = tokenizer_lib.get_tokenizer(jsonl_config)
  (kept,) = models(tmp_path)
  assert kept.parent == tmp_path / ".vlp_jax"
  assert kept.name.startswith("tokenizer-512-")
  assert [*kept.parent.iterdir()] == [kept]  # no temporary files
  assert kept.read_bytes() == first.model
  forbid_training(monkeypatch)
  assert tokenizer_lib.get_tokenizer(jsonl_config).sha256 == first.sha256


def test_kept_beside_tfds_data(config, toy_tfds, home):
  config.data.name = "toy"
  tokenizer = tokenizer_lib.get_tokenizer(config)
  # Other tests keep theirs there, too.
  kept = models(toy_tfds / "toy" / "1.0.0")
  (kept,) = (path for path in kept if path.read_bytes() == tokenizer.model)
  assert kept.name.startswith(f"tokenizer-{config.tokenizer.vocab_size}-")
  ids, _ = tokenizer.encode("a naïve picture 3", 30)
  assert tokenizer.decode(ids) == "a naïve picture 3"


def test_only_training_captions_are_used(jsonl_config, write_jsonl, home):
  rows = [{"caption": "one", "split": "train"}]
  rows += [{"caption": "zwei", "split": "test"}]
  jsonl_config.data.source = str(write_jsonl(rows))
  test = sources.open_source(jsonl_config.data, "test")
  tokenizer = tokenizer_lib.get_tokenizer(jsonl_config, test)
  assert tokenizer.unk_id in tokenizer.encode("zwei", 9)[0]
  assert tokenizer.unk_id not in tokenizer.encode("one", 9)[0]


def test_changed_captions_make_another(
  jsonl_config, write_jsonl, home, tmp_path
):
  first = tokenizer_lib.get_tokenizer(jsonl_config)
  write_jsonl([{"caption": "something else", "split": "train"}])
  second = tokenizer_lib.get_tokenizer(jsonl_config)
  assert first.sha256 != second.sha256
  jsonl_config.tokenizer.vocab_size = 40
  tokenizer_lib.get_tokenizer(jsonl_config)
  names = [path.name.split("-")[1] for path in models(tmp_path)]
  assert sorted(names) == ["40", "512", "512"]


def test_damaged_model_is_made_again(jsonl_config, home, tmp_path):
  first = tokenizer_lib.get_tokenizer(jsonl_config)
  (kept,) = models(tmp_path)
  kept.write_bytes(kept.read_bytes()[:100])
  assert tokenizer_lib.get_tokenizer(jsonl_config).sha256 == first.sha256
  assert kept.read_bytes() == first.model


def test_falls_back_to_the_cache(jsonl_config, home, tmp_path, monkeypatch):
  (tmp_path / ".vlp_jax").write_text("in the way")
  first = tokenizer_lib.get_tokenizer(jsonl_config)
  (kept,) = models(tmp_path)
  assert kept.parent == home / ".cache" / "vlp_jax"
  forbid_training(monkeypatch)
  assert tokenizer_lib.get_tokenizer(jsonl_config).sha256 == first.sha256


def test_nowhere_to_keep_it(jsonl_config, home, tmp_path, capsys):
  (tmp_path / ".vlp_jax").write_text("in the way")
  home.write_text("in the way")
  assert tokenizer_lib.get_tokenizer(jsonl_config).vocab_size > 4
  assert "warning: the tokenizer could not be kept" in capsys.readouterr().err


def test_processes_at_the_same_time(jsonl_config, home, tmp_path):
  program = (
    "import sys; from vlp_jax import config as c; from vlp_jax.data import "
    "tokenizer as t; config = c.default_config(); "
    "config.data.source = sys.argv[1]; print(t.get_tokenizer(config).sha256)"
  )
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", program, jsonl_config.data.source],
      stdout=subprocess.PIPE,
      text=True,
    )
    for _ in range(3)
  ]
  outputs = {process.communicate()[0] for process in processes}
  (kept,) = models(tmp_path)
  kept = tokenizer_lib.Tokenizer(kept.read_bytes())
  assert outputs == {kept.sha256 + "\n"}


# --- Given models -----------------------------------------------------------


def test_given_model(config, tmp_path, tokenizer):
  path = tmp_path / "given.model"
  path.write_bytes(tokenizer.model)
  config.tokenizer.path = str(path)
  config.data.source = "not/needed.jsonl"
  assert tokenizer_lib.get_tokenizer(config).sha256 == tokenizer.sha256


def test_given_model_with_other_special_ids(config, tmp_path):
  path = tmp_path / "plain.model"
  path.write_bytes(train_plain())  # unk 0, bos 1, eos 2, no pad
  config.tokenizer.path = str(path)
  tokenizer = tokenizer_lib.get_tokenizer(config)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
  ids, length = tokenizer.encode("a red square", 20)
  assert ids[0] == 1 and ids[length - 1] == 2 and not ids[length:].any()
  assert tokenizer.decode(ids) == "a red square"


@pytest.mark.parametrize("kwargs", [{"bos_id": -1}, {"eos_id": -1}])
def test_given_model_without_bos_or_eos(config, tmp_path, kwargs):
  path = tmp_path / "odd.model"
  path.write_bytes(train_plain(**kwargs))
  config.tokenizer.path = str(path)
  with pytest.raises(UserError, match=r"odd.model: .* no BOS or no EOS"):
    tokenizer_lib.get_tokenizer(config)


def test_given_model_missing_or_broken(config, tmp_path):
  config.tokenizer.path = str(tmp_path / "none.model")
  with pytest.raises(UserError, match=r"none.model: No such file"):
    tokenizer_lib.get_tokenizer(config)
  for content in (b"", b"no model at all", bytes(range(256))):
    path = pathlib.Path(config.tokenizer.path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"none.model: not a SentencePiece"):
      tokenizer_lib.get_tokenizer(config)


# --- Few different words ----------------------------------------------------


def test_words_of_a_small_language_are_pieces():
  """No word has a substring in common with another: none is spelt out."""
  captions = ["a big fox", "two shy pug", "a shy fox"] * 20
  tokenizer = tokenizer_lib.Tokenizer(tokenizer_lib.train(captions, 64))
  for caption in captions[:3]:
    words = [f"▁{word}" for word in caption.split()]
    assert [piece for piece, _, _ in tokenizer.pieces(caption)] == words
    assert tokenizer.length(caption) == len(words) + 2


def test_cut_captions_are_told(jsonl_config, capsys):
  source = sources.open_source(jsonl_config.data, "train")
  tokenizer = tokenizer_lib.get_tokenizer(jsonl_config, source)
  lengths = [tokenizer.length(caption) for caption in source.captions()]
  jsonl_config.tokenizer.max_len = max(lengths)
  tokenizer_lib.warn_cut(tokenizer, source, jsonl_config)
  assert capsys.readouterr().err == ""
  jsonl_config.tokenizer.max_len -= 1
  tokenizer_lib.warn_cut(tokenizer, source, jsonl_config)
  cut = lengths.count(max(lengths))
  message = capsys.readouterr().err
  assert message.startswith(f"warning: {cut} of the first {len(lengths)} ")
  assert f"up to {max(lengths)} tokens" in message
