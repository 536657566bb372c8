"""Made-up data, and a method whose answers are set by hand."""

import io

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from vlp_jax import config as config_lib
from vlp_jax import sharding
from vlp_jax.data import motion_language, scenes_language, sources
from vlp_jax.evaluators import _matching, base

IMAGE_SIZE = 16
MAX_LEN = 8


def picture(number: int, size=(IMAGE_SIZE, IMAGE_SIZE)) -> bytes:
  """A PNG whose colour tells its number."""
  color = (number % 256, number // 256, 0)
  file = io.BytesIO()
  Image.new("RGB", size, color).save(file, "PNG")
  return file.getvalue()


def records(captions, **annotations) -> list[dict]:
  """One record for each list of captions; annotations are lists, too."""
  return [
    {"image": picture(i), "image_id": i, "captions": list(texts)}
    | {name: values[i] for name, values in annotations.items()}
    for i, texts in enumerate(captions)
  ]


class Source(sources.Source):
  """Records in memory."""

  name = fingerprint = "fake"

  def __init__(self, records):
    self._records = list(records)

  @property
  def language(self):
    fields = self._records[0] if self._records else ()
    if "objects" not in fields:
      return None
    return motion_language if "motion" in fields else scenes_language

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    return dict(self._records[index])


class Tokenizer:
  """Numbers texts in the order in which they come; a text is one token."""

  vocab_size, bos_id, eos_id = 1000, 2, 3

  def __init__(self, texts=()):
    self.texts = ["", *texts]

  def encode_batch(self, texts, max_len):
    ids = np.zeros((len(texts), max_len), np.int32)
    ids[:, 0], ids[:, 2] = 2, 3
    for row, text in enumerate(texts):
      if text not in self.texts:
        self.texts.append(text)
      ids[row, 1] = self.texts.index(text)
    return ids, np.full(len(texts), 3, np.int32)

  def decode(self, ids) -> str:
    return self.texts[int(ids[1])]


def number(image) -> jax.Array:
  """Reads the number of each picture, or clip, off its colour."""
  image = image[:, 0] if image.ndim == 5 else image
  pixel = image[:, 0, 0].astype(jnp.int32)
  return pixel[:, 0] + 256 * pixel[:, 1]


class Dual:
  """A method that looks its embeddings up: `params['image'|'text']`."""

  def __init__(self):
    self.calls = 0

  def encode_image(self, params, batch):
    self.calls += 1
    return params["image"][number(batch["image"])]

  def encode_text(self, params, batch):
    return params["text"][batch["text"][:, 1]]


class Captioner(Dual):
  """Looks up captions and scores, too, and points with hand-set maps."""

  readouts = ("contribution", "cosine")

  def caption_score(self, params, batch):
    return params["score"][number(batch["image"]), batch["text"][:, 1]]

  def generate(self, params, batch, max_len, bos_id, eos_id):
    rows = number(batch["image"])
    ids = jnp.zeros((len(rows), max_len), jnp.int32).at[:, 0].set(bos_id)
    return ids.at[:, 1].set(params["caption"][rows]).at[:, 2].set(eos_id)

  def patch_text_map(self, params, batch, readout, token_mask=None):
    del token_mask
    return params[readout][number(batch["image"]), batch["text"][:, 1]]


class Matcher(Dual):
  """Looks match scores up, `params['match']` `[pictures, texts]`.

  Its state is a tree whose leaves have different ranks, as a real one's may.
  """

  def __init__(self):
    super().__init__()
    self.traced = 0

  def match_state(self, params, batch):
    rows = number(batch["image"])
    return {"row": params["match"][rows], "layers": [rows[:, None, None]]}

  def match_score(self, params, state, text, text_len):
    self.traced += 1
    score = jnp.take_along_axis(state["row"], text[:, :, 1], axis=1)
    # Fails if a text is not one of those that exist.
    return jnp.where(text_len == 3, score, jnp.nan)


class Gradcam(Matcher):
  """As SIMLA and ALBEF: matches, has one readout, and writes nothing."""

  readouts = ("gradcam",)

  def patch_text_map(self, params, batch, readout, token_mask=None):
    del token_mask
    return params[readout][number(batch["image"]), batch["text"][:, 1]]


class Attentive(Dual):
  """Looks the attention of a text's tokens up: `[pictures, L, F, gh, gw]`."""

  def attention_maps(self, params, batch):
    return params["attention"][number(batch["image"])]


class Speller(Dual):
  """Finds keywords: the caption's own number, and the one after it."""

  keyword_weight = 1.0

  def keywords(self, params, batch):
    own = batch["text"][:, 1:2]
    none = jnp.full_like(own, -1)
    return {
      "chosen": jnp.where(own > 1, jnp.concatenate([own, own], 1), none),
      "added": own + 1,
    }


def watch_states(monkeypatch) -> list[list[int]]:
  """Keeps the numbers of the pictures of every batch that gets a state."""
  seen = []
  compiled = _matching._compiled_state

  def watched(method, mesh):
    make = compiled(method, mesh)

    def state(params, batch):
      seen.append(np.asarray(number(batch["image"])).tolist())
      return make(params, batch)

    return state

  monkeypatch.setattr(_matching, "_compiled_state", watched)
  return seen


def environment(source, tokenizer=None, devices=1) -> base.Env:
  """An environment whose every split is `source`."""
  config = config_lib.default_config()
  config.data.update(image_size=IMAGE_SIZE, name="fake")
  config.tokenizer.max_len = MAX_LEN
  config.method.name = "fake"
  mesh = sharding.make_mesh((devices, 1, 1), jax.devices()[:devices])
  env = base.Env(config, mesh, tokenizer or Tokenizer())
  for split in ("train", "validation", "test", "comp"):
    env._sources[split] = Source(source)
  return env


def build(kind, method, env, **fields) -> base.Evaluator:
  """Builds an evaluator of a type."""
  config = ml_collections.ConfigDict({"type": kind, "batch_size": 4} | fields)
  return base.build(kind, config, method, env)


def unit(array) -> np.ndarray:
  """Normalises the last axis."""
  return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(
    np.float32
  )
