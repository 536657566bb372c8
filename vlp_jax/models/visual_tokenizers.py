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
    for batch in batches:
      batch = np.asarray(batch)[: self.num_pictures - seen]
      cut = patches_lib.patchify(batch, self.patch_size)
      cut = cut.reshape(-1, kept.shape[1])
      kept = np.concatenate([kept, cut])
      lots = np.concatenate([lots, draw.random(len(cut))])
      if len(lots) > self.num_patches:
        lowest = np.argpartition(lots, self.num_patches)[: self.num_patches]
        kept, lots = kept[lowest], lots[lowest]
      seen += len(batch)
      if seen >= self.num_pictures:
        break
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
    path: the weights, as `python -m vlp_jax.convert.dalle` writes them.
    grid: rows (and columns) of patches of a picture.
    vocab_size, width, blocks, dtype: see `DalleEncoder`; the released encoder
      by default.
  """

  path: str
  grid: int
  vocab_size: int = 8192
  width: int = 256
  blocks: int = 2
  dtype: Any = jnp.float32

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
    # Bicubic weights are negative in places, and overshoot at edges.
    pixels = jnp.clip(pixels, 0, 1)
    variables = {"params": lax.stop_gradient(state)}
    logits = self._encoder().apply(variables, pixels)
    codes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return codes.reshape(len(image), self.grid**2)

  def _encoder(self) -> dalle.DalleEncoder:
    # No parent: a method may call `codes` from inside a module of its own.
    return dalle.DalleEncoder(
      self.width, self.blocks, self.vocab_size, self.dtype, parent=None
    )

  def _shapes(self) -> State:
    side = dalle.STRIDE
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    init = self._encoder().init
    return jax.eval_shape(init, jax.random.key(0), pixels)["params"]


def _load(path: str, shapes: dict) -> dict[str, np.ndarray]:
  """Reads arrays of these names and shapes.

  Raises:
    UserError: if the file is missing, or holds something else.
  """
  name = path or "(no path)"
  make = "write it with `python -m vlp_jax.convert.dalle encoder.pkl FILE.npz`"
  try:
    with np.load(pathlib.Path(path).expanduser()) as file:
      arrays = {key: np.asarray(file[key], np.float32) for key in file}
  except OSError as error:
    reason = error.strerror or error
    raise UserError(
      f"no weights of DALL-E's encoder in {name} ({reason}); {make}"
    ) from None
  except (EOFError, TypeError, ValueError, zlib.error, zipfile.BadZipFile):
    # A pickle, a single array, text, half a file: NumPy has a word for each.
    raise UserError(f"{name} is no .npz file of arrays; {make}") from None
  wrong = [f"{key} is missing" for key in shapes if key not in arrays]
  wrong += [f"{key} is unknown" for key in arrays if key not in shapes]
  wrong += [
    f"{key} is {array.shape} instead of {shapes[key].shape}"
    for key, array in arrays.items()
    if key in shapes and array.shape != shapes[key].shape
  ]
  if wrong:
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise UserError(
      f"{name} is not of this DALL-E encoder: {wrong[0]}{more}; {make}"
    )
  return arrays
