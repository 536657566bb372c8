"""Visual tokenizers: a discrete code for every patch of a picture.

Masked image modelling predicts such codes (Bao et al. 2022, "BEiT"). A
tokenizer is frozen: what it has learned is a state, which is made once on the
host, travels with the training state, and gets no gradient.

- `PatchCodes` groups the training patches by their pixels. It needs no file,
  and costs one matrix product a step.
- `DalleCodes` is what BEiT and SIMLA use: the released DALL-E encoder, 8,192
  codes, as costly as one and a half passes of a ViT-B.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from vlp_jax.errors import UserError
from vlp_jax.models import dalle
from vlp_jax.ops import kmeans
from vlp_jax.ops import patches as patches_lib

State = Any  # a tree of float32 arrays
Pictures = Callable[[], Iterator[np.ndarray]]


class VisualTokenizer(Protocol):
  """Names each patch of a picture by a code; hashable, static under `jit`.

  Attributes:
    vocab_size: codes are 0 ... vocab_size - 1.
  """

  vocab_size: int

  def empty(self) -> State:
    """Makes a state of the right shapes: zeros. May be traced."""

  def start(self, pictures: Pictures) -> State:
    """Makes the state of a new run, on the host: fits it or loads it.

    Several hosts must start alike: let one do it and the others have its
    result, or give all the same pictures.

    Args:
      pictures: a call begins a pass over training pictures, uint8 batches
        `[B, S, S, 3]`; it may never end.

    Returns:
      A tree of NumPy arrays, as `empty` has it.

    Raises:
      UserError: if there is nothing to fit on, or nothing right to load.
    """

  def codes(self, state: State, image: jax.Array) -> jax.Array:
    """Names patches; no gradient goes through.

    Args:
      state: from `start`.
      image: uint8 `[B, S, S, 3]`.

    Returns:
      int32 `[B, N]`, a code for every patch of the vision tower, row by row.
    """


@dataclasses.dataclass(frozen=True)
class PatchCodes:
  """The nearest of `vocab_size` patches, which k-means has found.

  Pixels are compared as the vision tower sees them, normalised. Patches are
  drawn from the first `num_pictures` pictures, each as likely as any other;
  where those have fewer than `num_patches`, all are used. Where there are no
  more different patches than codes, each is a code of its own, and the codes
  left over never occur (`kmeans.fit`).

  Attributes:
    vocab_size: number of codes.
    patch_size: side of the vision tower's patches, in pixels.
    num_patches: patches to fit on.
    iterations: of k-means.
    num_pictures: pictures to take them from.
  """

  vocab_size: int
  patch_size: int
  num_patches: int = 50_000
  iterations: int = 20
  num_pictures: int = 2048

  def empty(self) -> State:
    """See `VisualTokenizer`."""
    width = 3 * self.patch_size**2
    return {"centroids": jnp.zeros((self.vocab_size, width))}

  def start(self, pictures: Pictures) -> State:
    """Fits on training pictures, the same way each time."""
    sample = self._sample(pictures())
    pixels = patches_lib.normalize(sample.reshape(len(sample), -1, 3))
    points = np.asarray(pixels).reshape(sample.shape)
    return {"centroids": kmeans.fit(points, self.vocab_size, self.iterations)}

  def codes(self, state: State, image: jax.Array) -> jax.Array:
    """See `VisualTokenizer`; sides of `image` are multiples of the patch's."""
    pixels = patches_lib.patch_pixels(image, self.patch_size)
    return kmeans.nearest(pixels, lax.stop_gradient(state["centroids"]))

  def _sample(self, batches: Iterator[np.ndarray]) -> np.ndarray:
    """Draws patches, uint8 `[num_patches or fewer, D]`.

    Each patch draws a number and the lowest stay: even, however many patches
    there will have been.
    """
    draw = np.random.default_rng(0)
    kept = np.zeros((0, 3 * self.patch_size**2), np.uint8)
    lots, seen = np.zeros(0), 0
    while (
      seen < self.num_pictures and (batch := next(batches, None)) is not None
    ):
      batch = np.asarray(batch)[: self.num_pictures - seen]
      cut = patches_lib.patchify(batch, self.patch_size).reshape(
        -1, kept.shape[1]
      )
      kept = np.concatenate([kept, cut])
      lots = np.concatenate([lots, draw.random(len(cut))])
      if len(lots) > self.num_patches:
        lowest = np.argpartition(lots, self.num_patches)[: self.num_patches]
        kept, lots = kept[lowest], lots[lowest]
      seen += len(batch)
    if not len(kept):
      raise UserError("no training picture to fit the visual tokenizer on")
    return kept


@dataclasses.dataclass(frozen=True)
class DalleCodes:
  """The most likely code of DALL-E's encoder, for every patch.

  The encoder names squares of 8 x 8 pixels, so a picture is first resized, to
  8 pixels a patch (bicubic, antialiased, on the device): one code a patch
  whatever the patch's size, as in BEiT.

  Attributes:
    path: the weights, `.npz`, as `python -m vlp_jax.convert.dalle` writes
      them.
    grid: rows (and columns) of patches of a picture.
    encoder: the network; the released one by default.
  """

  path: str
  grid: int
  encoder: dalle.DalleEncoder = dalle.DalleEncoder()

  @property
  def vocab_size(self) -> int:
    """Number of codes; 8,192 as released."""
    return self.encoder.vocab_size

  def empty(self) -> State:
    """See `VisualTokenizer`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes())

  def start(self, pictures: Pictures) -> State:
    """Loads the weights; `pictures` is not called."""
    del pictures
    shapes = traverse_util.flatten_dict(self._shapes(), sep="/")
    return traverse_util.unflatten_dict(_load(self.path, shapes), sep="/")

  def codes(self, state: State, image: jax.Array) -> jax.Array:
    """See `VisualTokenizer`; `image` is square, of any size."""
    side = dalle.STRIDE * self.grid
    pixels = image.astype(jnp.float32) / 255
    shape = (len(image), side, side, 3)
    pixels = jax.image.resize(pixels, shape, "cubic", antialias=True)
    # Bicubic weights are negative in places, and leave the range at edges.
    pixels = jnp.clip(pixels, 0, 1)
    logits = self.encoder.apply({"params": lax.stop_gradient(state)}, pixels)
    codes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return codes.reshape(len(image), self.grid**2)

  def _shapes(self) -> State:
    pixels = jax.ShapeDtypeStruct(
      (1, dalle.STRIDE, dalle.STRIDE, 3), jnp.float32
    )
    init = self.encoder.init
    return jax.eval_shape(init, jax.random.key(0), pixels)["params"]


def _load(path: str, shapes: dict) -> dict[str, np.ndarray]:
  """Reads arrays of these names and shapes.

  Raises:
    UserError: if the file is missing, or holds something else.
  """
  make = "write one with `python -m vlp_jax.convert.dalle encoder.pkl FILE.npz`"
  try:
    with np.load(pathlib.Path(path).expanduser()) as file:
      arrays = {name: np.asarray(file[name], np.float32) for name in file}
  except OSError as error:
    raise UserError(
      f"cannot read DALL-E's encoder from {path or 'no path'} "
      f"({error.strerror or error}); {make}"
    ) from None
  except (
    *(AttributeError, EOFError, TypeError, ValueError, zlib.error),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
  ):
    # A pickle, a single array, text, half a file: NumPy says it in many ways.
    raise UserError(f"{path} is no .npz of arrays; {make}") from None
  wrong = [
    f"no {name}"
    if name not in arrays
    # Shapes are told as they are: the file may be of another encoder.
    else f"{name} {arrays[name].shape} instead of {leaf.shape}"
    for name, leaf in shapes.items()
    if name not in arrays or arrays[name].shape != leaf.shape
  ]
  wrong += [f"a {name} too many" for name in sorted(arrays.keys() - shapes)]
  if wrong:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise UserError(f"{path} is not of this encoder: {wrong[0]}{more}; {make}")
  return arrays
