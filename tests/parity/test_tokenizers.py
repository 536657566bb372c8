"""Vocabulary files against the projects' own tokenizers, id by id.

CLIP's vocabulary is the true one, which open_clip brings along. BERT's and
RoBERTa's are small ones: their files are not part of any package.

Needs the [parity] extra; see docs/parity.md.
"""

import pathlib
import unicodedata

import pytest

from benchmarks import open_clip_peer
from tests.data import tokenizer_reference as reference
from vlp_jax import config as config_lib
from vlp_jax.data import tokenizer

pytestmark = pytest.mark.parity

LENGTH = 400
CLIP_IDS = {  # as published with the model
  "a photo of a cat": [320, 1125, 539, 320, 2368],
}


def load(path):
  config = config_lib.default_config()
  config.tokenizer.path = str(path)
  config.tokenizer.vocab_size = 100_000
  return tokenizer.get_tokenizer(config)


def inner(made, text):
  ids, length = made.encode(text, LENGTH)
  return ids[1 : length - 1].tolist()


@pytest.fixture(scope="module")
def open_clip():
  pytest.importorskip("torch")
  try:
    return open_clip_peer.load()
  except ImportError as error:
    pytest.skip(str(error))


def test_clip(open_clip):
  folder = pathlib.Path(open_clip.__file__).parent
  made = load(folder / "bpe_simple_vocab_16e6.txt.gz")
  peer = open_clip.SimpleTokenizer(context_length=LENGTH)
  assert made.vocab_size == peer.vocab_size == 49408
  texts = reference.TEXTS + reference.UNTIDY
  # In a text, `<start_of_text>` is a symbol to open_clip; here it is spelt out.
  expected = peer(texts).numpy()
  ids, lengths = made.encode_batch(texts, LENGTH)
  for row, text in enumerate(texts):
    assert ids[row].tolist() == expected[row].tolist(), text
    assert made.decode(ids[row]) == (
      peer.decode(expected[row][1 : lengths[row] - 1].tolist()).strip()
    )
  for text, published in CLIP_IDS.items():
    assert inner(made, text) == published


def test_clip_cuts_long_texts(open_clip):
  folder = pathlib.Path(open_clip.__file__).parent
  made = load(folder / "bpe_simple_vocab_16e6.txt.gz")
  peer = open_clip.SimpleTokenizer(context_length=9)
  ids, _ = made.encode(reference.CORPUS, 9)
  assert ids.tolist() == peer([reference.CORPUS])[0].tolist()


@pytest.mark.parametrize("lowercase", [True, False])
def test_bert(tmp_path, lowercase):
  legacy = pytest.importorskip(
    "transformers.models.bert.tokenization_bert_legacy"
  )
  path, _ = reference.write_bert(tmp_path, lowercase)
  peer = legacy.BertTokenizerLegacy(str(path), do_lower_case=lowercase)
  made = load(path)
  assert [made.bos_id, made.eos_id] == [peer.cls_token_id, peer.sep_token_id]
  assert [made.pad_id, made.unk_id] == [peer.pad_token_id, peer.unk_token_id]
  assert made.mask_id == peer.mask_token_id
  for text in reference.TEXTS + reference.UNTIDY:
    # In a text, `[SEP]` is a symbol to it; here, and to Google's, spelt out.
    # And it composes accents first, which Google's does not.
    text = unicodedata.normalize("NFC", text.replace("[SEP]", "(SEP)"))
    expected = peer.convert_tokens_to_ids(peer.tokenize(text))
    assert inner(made, text) == expected, text


def test_roberta(tmp_path):
  transformers = pytest.importorskip("transformers")
  path, _, _ = reference.write_bpe(tmp_path, "roberta")
  peer = transformers.RobertaTokenizer(
    vocab=str(path), merges=str(tmp_path / "merges.txt")
  )
  made = load(path)
  assert [made.bos_id, made.eos_id] == [peer.bos_token_id, peer.eos_token_id]
  assert [made.pad_id, made.unk_id] == [peer.pad_token_id, peer.unk_token_id]
  assert made.mask_id == peer.mask_token_id
  for text in reference.TEXTS + reference.UNTIDY:
    text = text.replace("</s>", "(/s)")  # a symbol to it; here spelt out
    expected = peer(text)["input_ids"]
    ids, length = made.encode(text, LENGTH)
    assert ids[:length].tolist() == expected, text
    assert made.decode(ids) == text
