import pytest

from vlp_jax import config as config_lib
from vlp_jax.data import captions, sources
from vlp_jax.data import tokenizer as tokenizer_lib


@pytest.mark.parametrize(
  "text, cleaned",
  [
    ("A dog, running.", "a dog running"),
    ("What's this?! It's \"it\" (yes)", "whats this its it yes"),
    ("*#:;~ a:b;c", "abc"),
    ("black-and-white / grey", "black and white grey"),
    ("<PERSON> and <person>.", "person and person"),
    ("  a \t b\n c  ", "a b c"),
    ("a < b & c_d", "a < b & c_d"),
    ("ÉTÉ à Paris", "été à paris"),
    ("?!", ""),
    ("", ""),
  ],
)
def test_rules(text, cleaned):
  assert captions.CleanCaption()(text) == cleaned


def test_words_are_counted_after_cleaning():
  clean = captions.CleanCaption(max_words=3)
  assert clean("One - two/three four") == "one two three"
  assert clean("one two") == "one two"
  assert captions.CleanCaption()("a " * 50).count("a") == 50


def test_off_by_default():
  data = config_lib.default_config().data
  assert captions.cleaner(data)("A dog, running.") == "A dog, running."
  data.clean_captions, data.max_words = True, 2
  assert captions.cleaner(data)("A dog, running.") == "a dog"
  assert repr(captions.cleaner(data)) == "CleanCaption(max_words=2)"


def test_a_tokenizer_is_trained_on_clean_captions(config, write_jsonl):
  rows = [{"caption": f"A Thing, no. {i}!", "split": "train"} for i in range(9)]
  config.data.source = str(write_jsonl(rows))
  raw = tokenizer_lib.get_tokenizer(config)
  config.data.clean_captions = True
  clean = tokenizer_lib.get_tokenizer(config)
  assert clean.sha256 != raw.sha256
  source = sources.open_source(config.data, "train")
  cleaner = captions.cleaner(config.data)
  texts = [cleaner(caption) for caption in source.captions()]
  model = tokenizer_lib.train(texts, config.tokenizer.vocab_size)
  assert clean.model == model
