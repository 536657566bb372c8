"""What a training method is: the types that the step and a method share.

A method reads like its paper in two parts. `forward` is what a chunk of
examples does by itself (encoders, captioning, masked reconstruction);
`couple` is what makes all examples of the batch meet (contrastive terms,
queues). The split is what lets `train_step` accumulate gradients exactly for
every method.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding

from vlp_jax.errors import UserError
from vlp_jax.losses import captioning
from vlp_jax.methods import _start

Batch = Mapping[str, jax.Array]
Params = Any
MethodState = dict[str, Any]
Pictures = Callable[[], Iterator[np.ndarray]]


class Mean(NamedTuple):
  """A weighted mean over the whole batch, kept as two sums.

  Attributes:
    total: scalar, the weighted sum.
    weight: scalar, the sum of weights; carries no gradient.
  """

  total: jax.Array
  weight: jax.Array

  @classmethod
  def of(cls, values: jax.Array, weights: jax.Array | None = None) -> Mean:
    """Sums values, with weights (of the same shape) or each counted once."""
    values = values.astype(jnp.float32)
    if weights is None:
      return cls(jnp.sum(values), jnp.float32(values.size))
    return cls(jnp.sum(values * weights), jnp.sum(weights))


class Output(NamedTuple):
  """What `Method.forward` returns for a chunk of b examples.

  Attributes:
    shared: float arrays `[b, ...]` that `couple` needs of every example.
    terms: loss terms that need no other example, unweighted.
    report: values to log; never part of the loss.
  """

  shared: dict[str, jax.Array]
  terms: dict[str, Mean]
  report: dict[str, Mean]


class Coupled(NamedTuple):
  """What `Method.couple` returns for the whole batch."""

  terms: dict[str, Mean]
  report: dict[str, Mean]
  method_state: MethodState


class Context(NamedTuple):
  """What the step tells a method beside parameters and batch.

  Attributes:
    step: int32 scalar, updates finished so far.
    rngs: one key a stream (`ops.rng.STREAMS`), folded with the step.
    ema_params: the momentum teacher's parameters, or None.
    method_state: queues and the like; read in `forward`, replaced in `couple`.
    train: a Python bool; False switches dropout and token masks off.
    sharding: of a batch over devices; None is one device.
  """

  step: jax.Array
  rngs: dict[str, jax.Array]
  ema_params: Params | None
  method_state: MethodState
  train: bool
  sharding: NamedSharding | None = None


class Method(Protocol):
  """A pretraining method: a frozen dataclass around one linen module.

  It is hashable and static under `jit`. Evaluators ask for further
  capabilities by attribute: `caption_score`, `generate`, `patch_text_map`,
  `attention_maps`, `reconstruct`, `match_state`, `match_score`, `keywords`.

  Attributes:
    match_group: examples among which matching draws its negatives (1: none).
    uses_ema: whether the loss itself needs `ema_params`.
  """

  match_group: int = 1
  uses_ema: bool = False

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, MethodState]:
    """Makes parameters and state; only the shapes of `batch` are used."""

  def start(
    self, params: Params, method_state: MethodState, pictures: Pictures
  ) -> tuple[Params, MethodState]:
    """Changes what `init` made, on the host, before the first step.

    For what a new run takes from files or from the training pictures: weights
    to start from, a visual tokenizer.

    Args:
      params: of `init`.
      method_state: of `init`.
      pictures: a call begins a pass over the training pictures as evaluation
        sees them, uint8 batches `[B, H, W, 3]`.
    """

  def forward(self, params: Params, batch: Batch, ctx: Context) -> Output:
    """Runs the encoders and per-example losses on a chunk."""

  def couple(
    self,
    params: Params,
    shared: dict[str, jax.Array],
    batch: Batch,
    ctx: Context,
  ) -> Coupled:
    """Computes the terms in which examples meet, in global order."""

  def term_weights(self, step: jax.Array) -> dict[str, float | jax.Array]:
    """Returns the weight of each term; a Python 0 means not computed."""

  def project(self, params: Params) -> Params:
    """Maps parameters back to their domain after each update."""

  def encode_image(self, params: Params, batch: Batch) -> jax.Array:
    """Returns L2-normalised image embeddings `[B, E]`, float32."""

  def encode_text(self, params: Params, batch: Batch) -> jax.Array:
    """Returns L2-normalised text embeddings `[B, E]`, float32."""


@dataclasses.dataclass(frozen=True)
class ModuleMethod:
  """What every method does that is built around one linen module.

  Attributes:
    module: the linen module; its parameters are the method's.
    start_file: parameters that a new run starts from, see `_start.load`; a
      field of those methods whose config has `model.start`.
  """

  module: nn.Module
  start_file = ""
  uses_ema = False

  def apply(self, params: Params, name: str, *args, dropout=None, **kwargs):
    """Calls a method of the module, by name; with a key, dropout is on."""
    rngs = None if dropout is None else {"dropout": dropout}
    return self.module.apply(
      {"params": params}, *args, method=name, rngs=rngs, **kwargs
    )

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, MethodState]:
    """Makes parameters, and no state."""
    variables = self.module.init(
      key, batch["image"], batch["text"], batch["text_len"]
    )
    return variables["params"], {}

  def start(self, params, method_state, pictures):
    """Puts in the parameters of `start_file`, if there is one."""
    del pictures
    if self.start_file:
      params = _start.load(params, self.start_file)
    return params, method_state

  def encode_image(self, params: Params, batch: Batch) -> jax.Array:
    """Embeds `batch["image"]`: float32 `[B, E]`, of unit length."""
    return self.apply(params, "encode_image", batch["image"])

  def encode_text(self, params: Params, batch: Batch) -> jax.Array:
    """Embeds `batch["text"]`: float32 `[B, E]`, of unit length."""
    return self.apply(params, "encode_text", batch["text"], batch["text_len"])

  def _frames(self, values: jax.Array, batch: Batch) -> jax.Array:
    """Puts `[..., F N]`, the patches' values, on `[..., F, rows, columns]`."""
    height, width = batch["image"].shape[-3:-1]
    size = self.module.vision.patch_size
    grid = (-1, height // size, width // size)
    return values.reshape(*values.shape[:-1], *grid)

  def _map(self, values: jax.Array, batch: Batch) -> jax.Array:
    """As `_frames` for `[B, F N]`; pictures' maps are `[B, rows, columns]`."""
    maps = self._frames(values, batch)
    return maps if batch["image"].ndim == 5 else maps[:, 0]


@dataclasses.dataclass(frozen=True)
class DualEncoderMethod(ModuleMethod):
  """What every method does whose module is a `models.DualEncoder`."""

  match_group = 1

  def project(self, params: Params) -> Params:
    """Keeps the inverse temperature between 1 and 100, as CLIP does."""
    temperature = dict(params["temperature"])
    temperature["logit_scale"] = jnp.clip(
      temperature["logit_scale"], 0, np.log(100)
    )
    return {**params, "temperature": temperature}

  @property
  def readouts(self) -> tuple[str, ...]:
    """The maps that `patch_text_map` can make."""
    additive = self.module.image_pool.kind == "attention"
    return ("contribution", "cosine") if additive else ("cosine",)

  def patch_text_map(
    self,
    params: Params,
    batch: Batch,
    readout: str,
    token_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Says where in a picture a caption is.

    Args:
      params: parameters.
      batch: `image`, `text` and `text_len`.
      readout: one of `readouts`. `contribution`: what each patch adds to the
        similarity of picture and caption. `cosine`: of each patch with the
        caption. `cross_attention`: where the decoder looks while it writes.
      token_mask: bool `[B, L]`, the tokens that `cross_attention` averages
        over; None takes all real tokens but the first.

    Returns:
      float32 `[B, rows, columns]`, of clips `[B, F, rows, columns]`; only the
      order of its values has meaning.
    """
    names = {"contribution": "patch_contributions", "cosine": "patch_cosines"}
    args = (batch["image"], batch["text"], batch["text_len"])
    return self._map(self.apply(params, names[readout], *args), batch)


@dataclasses.dataclass(frozen=True)
class CaptionerMethod(DualEncoderMethod):
  """What every method does whose module is a `models.Captioner`."""

  def generate(
    self, params: Params, batch: Batch, max_len: int, bos_id: int, eos_id: int
  ) -> jax.Array:
    """Writes captions greedily: int32 `[B, max_len]`; see `Captioner`."""
    return self.apply(
      params, "generate", batch["image"], max_len, bos_id, eos_id
    )

  def caption_score(self, params: Params, batch: Batch) -> jax.Array:
    """Mean log-likelihood of a caption's tokens given the picture, `[B]`."""
    args = (batch["image"], batch["text"], batch["text_len"])
    logits = self.apply(params, "caption_logits", *args)
    labels, weights = captioning.targets(batch["text"], batch["text_len"])
    nll, _ = captioning.cross_entropy(lambda x: x, logits, labels)
    total = jnp.sum(nll * weights, axis=1)
    return -total / jnp.maximum(jnp.sum(weights, axis=1), 1)

  @property
  def readouts(self) -> tuple[str, ...]:
    spatial = self.module.image_pool.kind in ("attention", "cls")
    return super().readouts + (("cross_attention",) if spatial else ())

  def patch_text_map(
    self,
    params: Params,
    batch: Batch,
    readout: str,
    token_mask: jax.Array | None = None,
  ) -> jax.Array:
    if readout != "cross_attention":
      return super().patch_text_map(params, batch, readout)
    args = (batch["image"], batch["text"], batch["text_len"])
    _, state = self.module.apply(
      {"params": params},
      *args,
      method="caption_logits",
      mutable=["intermediates"],
    )
    stack = state["intermediates"]["decoder"]["transformer"]["layers"]
    (probabilities,) = stack["attention_map"]  # [layers, B, heads, L - 1, N]
    rows = jnp.mean(probabilities, axis=(0, 2))
    # The row that writes token t is the one of token t - 1.
    weights = captioning.targets(batch["text"], batch["text_len"])[1]
    if token_mask is not None:
      weights = weights * token_mask[:, 1:]
    total = jnp.einsum("bln,bl->bn", rows, weights)
    total = total / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)
    return self._map(total, batch)


def available() -> list[str]:
  """Lists the names that `get` accepts."""
  import vlp_jax.methods as package

  names = [module.name for module in pkgutil.iter_modules(package.__path__)]
  return sorted(n for n in names if n != "base" and not n.startswith("_"))


def get(name: str, config) -> Method:
  """Builds the method `vlp_jax/methods/<name>.py` from a config.

  Raises:
    UserError: if there is no such method; the message lists those that exist.
  """
  if name not in available():
    raise UserError(
      f"config.method.name is {name!r}, but the methods are "
      f"{', '.join(available())}"
    )
  return importlib.import_module(f"vlp_jax.methods.{name}").build(config)


def of_stream(config, stream) -> Method:
  """Builds the method for batches of one of a run's streams.

  The parameters are the run's: positions of a picture's patches are made for
  its `data.image_size`, and resized for pictures of another.

  Args:
    config: of the run.
    stream: a copy of it, where `data` and `batch_size` are the stream's.

  Raises:
    UserError: as `get`.
  """
  view = stream.copy_and_resolve_references()
  view.data.image_size = config.data.image_size
  return get(config.method.name, view)
