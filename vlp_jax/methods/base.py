"""What a training method is: the types that the step and a method share.

A method reads like its paper in two parts. `forward` is what a chunk of
examples does by itself (encoders, captioning, masked reconstruction);
`couple` is what makes all examples of the batch meet (contrastive terms,
queues). The split is what lets `train_step` accumulate gradients exactly for
every method.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from vlp_jax.errors import UserError

Batch = Mapping[str, jax.Array]
Params = Any
MethodState = dict[str, Any]


class Mean(NamedTuple):
  """A weighted mean over the whole batch, kept as two sums.

  Attributes:
    total: scalar, the weighted sum.
    weight: scalar, the sum of weights; carries no gradient.
  """

  total: jax.Array
  weight: jax.Array


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
  """

  step: jax.Array
  rngs: dict[str, jax.Array]
  ema_params: Params | None
  method_state: MethodState
  train: bool


class Method(Protocol):
  """A pretraining method: a frozen dataclass around one linen module.

  It is hashable and static under `jit`. Evaluators ask for further
  capabilities by attribute: `caption_score`, `generate`, `patch_text_map`,
  `reconstruct`, `match_state`, `match_score`.

  Attributes:
    match_group: examples among which matching draws its negatives (1: none).
    uses_ema: whether the loss itself needs `ema_params`.
  """

  match_group: int = 1
  uses_ema: bool = False

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, MethodState]:
    """Makes parameters and state; only the shapes of `batch` are used."""

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


def available() -> list[str]:
  """Lists the names that `get` accepts."""
  import vlp_jax.methods as package

  names = [module.name for module in pkgutil.iter_modules(package.__path__)]
  return sorted(name for name in names if name != "base")


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
