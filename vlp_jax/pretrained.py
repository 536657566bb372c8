"""Uses what `vlp_jax.export` wrote, from Python."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vlp_jax import checkpoint, train_state
from vlp_jax import config as config_lib
from vlp_jax.data import captions, joint, pipeline, transforms
from vlp_jax.data import clips as clips_lib
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError
from vlp_jax.evaluators import base
from vlp_jax.methods import base as methods
from vlp_jax.methods.base import Method, Params

Picture = str | os.PathLike | bytes | np.ndarray
Clip = str | os.PathLike | bytes | Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A trained model, ready to be used.

  Attributes:
    config: as it was trained.
    method: the method; for what is not offered here.
    params: its parameters.
    tokenizer: its tokenizer.
  """

  config: ConfigDict
  method: Method
  params: Params
  tokenizer: tokenizer_lib.Tokenizer

  def preprocess(self, pictures: Sequence[Picture]) -> np.ndarray:
    """Reads pictures as the model expects them.

    Args:
      pictures: paths, encoded bytes (PNG, JPEG), or uint8 arrays `[H, W, 3]`.

    Returns:
      uint8 `[B, S, S, 3]`.
    """
    geometry = transforms.eval_geometry(self.config.data)
    return np.stack([_read(picture, geometry) for picture in pictures])

  def preprocess_clips(self, clips: Sequence[Clip]) -> np.ndarray:
    """Reads clips as the model expects them: F frames, evenly spread.

    Args:
      clips: paths or bytes of films (GIF; with the extra `video` MP4, WebM and
        others), or lists of frames, each as a picture of `preprocess`.

    Returns:
      uint8 `[B, F, S, S, 3]`.

    Raises:
      UserError: if the model was not trained on clips, or cannot read one.
    """
    config = self.config
    if joint.has_clips(config):
      config = joint.of_clips(config)
    if not config.data.num_frames:
      raise UserError(f"this {config.method.name} was not trained on clips")
    geometry = transforms.eval_geometry(config.data)
    count = config.data.num_frames
    return np.stack([_read_clip(clip, count, geometry) for clip in clips])

  def encode_image(self, pictures: Sequence[Picture]) -> np.ndarray:
    """Embeds pictures: float32 `[B, E]`, of unit length."""
    batch = {"image": self.preprocess(pictures)}
    return np.asarray(self._encode_image(self.params, batch))

  def encode_clip(self, clips: Sequence[Clip]) -> np.ndarray:
    """Embeds clips: float32 `[B, E]`, of unit length."""
    batch = {"image": self.preprocess_clips(clips)}
    return np.asarray(self._encode_image(self.params, batch))

  def encode_text(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds texts: float32 `[B, E]`, of unit length."""
    ids, lengths = self._tokenize(texts)
    batch = {"text": ids, "text_len": lengths}
    return np.asarray(self._encode_text(self.params, batch))

  def match(
    self, pictures: Sequence[Picture], texts: Sequence[str]
  ) -> np.ndarray:
    """Says how likely each text belongs to each picture.

    Returns:
      float32 `[B, K]`, probabilities among pairs of which the wrong ones look
      alike; for K texts.

    Raises:
      UserError: if the method has no matching head.
    """
    return self._probabilities(self.preprocess(pictures), texts)

  def match_clips(
    self, clips: Sequence[Clip], texts: Sequence[str]
  ) -> np.ndarray:
    """As `match`, for clips."""
    return self._probabilities(self.preprocess_clips(clips), texts)

  def caption(self, pictures: Sequence[Picture]) -> list[str]:
    """Writes a caption for each picture.

    Raises:
      UserError: if the method writes no captions.
    """
    if not hasattr(self.method, "generate"):
      raise UserError(f"{self.config.method.name} writes no captions")
    ids = self._generate(self.params, {"image": self.preprocess(pictures)})
    return [
      base.decode(self.tokenizer, row.tolist()) for row in np.asarray(ids)
    ]

  def _probabilities(self, image, texts: Sequence[str]) -> np.ndarray:
    if not hasattr(self.method, "match_score"):
      raise UserError(f"{self.config.method.name} has no matching head")
    ids, lengths = self._tokenize(texts)
    return np.asarray(self._match(self.params, {"image": image}, ids, lengths))

  def _tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    clean = captions.cleaner(self.config.data)
    return self.tokenizer.encode_batch(
      [clean(text) for text in texts], self.config.tokenizer.max_len
    )

  @functools.cached_property
  def _encode_image(self):
    return jax.jit(self.method.encode_image)

  @functools.cached_property
  def _encode_text(self):
    return jax.jit(self.method.encode_text)

  @functools.cached_property
  def _match(self):
    def match(params, batch, text, text_len):
      rows = len(batch["image"])
      text = jnp.broadcast_to(text, (rows, *text.shape))
      text_len = jnp.broadcast_to(text_len, (rows, *text_len.shape))
      state = self.method.match_state(params, batch)
      scores = self.method.match_score(params, state, text, text_len)
      return jax.nn.sigmoid(scores)

    return jax.jit(match)

  @functools.cached_property
  def _generate(self):
    return jax.jit(
      functools.partial(
        self.method.generate,
        max_len=self.config.tokenizer.max_len,
        bos_id=self.tokenizer.bos_id,
        eos_id=self.tokenizer.eos_id,
      )
    )


def load(directory: str | os.PathLike) -> Pretrained:
  """Loads what `python -m vlp_jax.export` wrote, on one device.

  Raises:
    UserError: if the folder holds no export.
  """
  directory = pathlib.Path(directory)
  if not (directory / "config.json").is_file():
    raise UserError(f"no export in {directory}: it holds no config.json")
  config = config_lib.from_json((directory / "config.json").read_text())
  # What suits this machine, not the one that trained.
  config.model.attention = "auto"
  method = methods.get(config.method.name, config)
  abstract = train_state.abstract_params(method, config)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
  )
  params = checkpoint.load_params(directory / "params", abstract)
  proto = (directory / "tokenizer.model").read_bytes()
  return Pretrained(config, method, params, tokenizer_lib.Tokenizer(proto))


def _read(picture: Picture, geometry: transforms.Geometry) -> np.ndarray:
  if isinstance(picture, np.ndarray):
    return geometry(Image.fromarray(picture))
  return pipeline.decode_image(_bytes(picture), geometry)


def _read_clip(
  clip: Clip, num_frames: int, geometry: transforms.Geometry
) -> np.ndarray:
  if isinstance(clip, (str, os.PathLike, bytes)):
    frames = clips_lib.DecodeClip(num_frames)(_bytes(clip))
    return np.stack([geometry(frame) for frame in frames])
  places = clips_lib.places(len(clip), num_frames)
  return np.stack([_read(clip[place], geometry) for place in places])


def _bytes(file: str | os.PathLike | bytes) -> bytes:
  if isinstance(file, bytes):
    return file
  try:
    return pathlib.Path(file).read_bytes()
  except OSError as error:
    raise UserError(f"cannot read {file}: {error.strerror}") from None
