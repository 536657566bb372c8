"""What ALBEF and SIMLA share: momentum contrast, matching, hidden words.

Li et al. 2021, "Align before fuse", arXiv 2107.07651, sections 3.2 and 3.4;
Khan et al. 2022 (SIMLA), section 2.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.losses import contrastive, distillation, matching
from vlp_jax.methods._matcher import Matcher, stack_rows, unstack_rows
from vlp_jax.methods.base import Batch, Coupled, Mean, Params
from vlp_jax.models.transformer import take_rows
from vlp_jax.ops import layout, masking, rng, token_mask
from vlp_jax.ops.rows import Rows, map_rows
from vlp_jax.ops.token_mask import HiddenWords

TEMPERATURE = (0.001, 0.5)  # where it is kept


class Embeddings(NamedTuple):
  """Unit embeddings of pictures and of captions, `[B, E]` each."""

  image: jax.Array
  text: jax.Array


@dataclasses.dataclass(frozen=True)
class FusionMethod(Matcher):
  """What every method does whose module is a `models.FusionEncoder`.

  Attributes:
    match_group: examples among which matching draws its negatives.
    mask_id: the id that hides a word.
    mask_ratio: share of words that are hidden.
    alpha: the teacher's weight in soft targets, once it has grown to it.
    alpha_ramp_steps: updates in which it grows from 0.
    queue_size: the teacher's embeddings of earlier examples, as further
      negatives; 0 takes the batch alone.
    same_image: whether pairs of the same picture are left out of negatives
      (in ALBEF's and SIMLA's releases they are not).
    teacher_dropout: whether the teacher's dropout is on (in the releases it
      is).
    itc_chunk: rows of ITC's logits that a device holds at a time; 0 is all.
    word_chunk: captions whose words have logits at a time, on a device.
    start_file: see `ModuleMethod`.
  """

  match_group: int
  mask_id: int
  mask_ratio: float = 0.15
  alpha: float = 0.4
  alpha_ramp_steps: int = 1
  queue_size: int = 0
  same_image: bool = True
  teacher_dropout: bool = False
  itc_chunk: int = 0
  word_chunk: int = 0
  start_file: str = ""
  uses_ema = True

  # --- What the step asks for ------------------------------------------------

  def init(self, key: jax.Array, batch: Batch):
    """Makes parameters, and queues of random unit embeddings."""
    params_key, image_key, text_key = jax.random.split(key, 3)
    params, _ = super().init(params_key, batch)
    if not self.queue_size:
      return params, {}
    shape = (self.queue_size, self.module.image_projection.features)

    def draw(key):
      rows = jax.random.normal(key, shape)
      return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)

    state = {
      "image_queue": draw(image_key),
      "text_queue": draw(text_key),
      "queue_id": jnp.full((self.queue_size,), -1, jnp.int32),
      "queue_pointer": jnp.int32(0),
    }
    return params, state

  def project(self, params: Params) -> Params:
    """Keeps the temperature between 0.001 and 0.5."""
    value = jnp.clip(params["temperature"]["value"], *TEMPERATURE)
    return {**params, "temperature": {"value": value}}

  def couple(self, params, shared, batch, ctx) -> Coupled:
    """ITC: contrast with the teacher's batch and its queue."""
    text, image = shared["teacher_text"], shared["teacher_image"]
    state, ids = ctx.method_state, batch["image_id"]
    key_ids, size = ids, len(ids)
    text_keys, image_keys = text, image
    if self.queue_size:
      text_keys = jnp.concatenate([text, state["text_queue"]])
      image_keys = jnp.concatenate([image, state["image_queue"]])
      key_ids = jnp.concatenate([ids, state["queue_id"]])
    compared = ids, key_ids
    if not self.same_image:
      compared = jnp.arange(size), jnp.arange(len(key_ids))
    temperature, alpha = self.divisor(params), self.alpha_at(ctx.step)
    rows = Rows(self.itc_chunk, ctx.sharding)
    settings = (temperature, alpha, *compared, rows)
    i2t, i2t_right = distillation.contrastive(
      shared["image"], text_keys, image, *settings
    )
    t2i, t2i_right = distillation.contrastive(
      shared["text"], image_keys, text, *settings
    )
    report = {
      "i2t_accuracy": Mean.of(i2t_right),
      "t2i_accuracy": Mean.of(t2i_right),
      "temperature": Mean.of(temperature[None]),
    }
    if self.queue_size:
      # Round the end of the queue; a slice would stop there.
      at = (state["queue_pointer"] + jnp.arange(size)) % self.queue_size
      state = {
        **state,
        "image_queue": state["image_queue"].at[at].set(image),
        "text_queue": state["text_queue"].at[at].set(text),
        "queue_id": state["queue_id"].at[at].set(ids),
        "queue_pointer": (state["queue_pointer"] + size) % self.queue_size,
      }
    return Coupled({"itc": Mean.of((i2t + t2i) / 2)}, report, state)

  # --- Pieces of a step -------------------------------------------------------

  def divisor(self, params: Params) -> jax.Array:
    """The temperature, within its bounds."""
    return jnp.clip(self.apply(params, "divisor"), *TEMPERATURE)

  def alpha_at(self, step: jax.Array) -> jax.Array:
    """The teacher's weight: grows linearly, then stays."""
    share = step.astype(jnp.float32) / max(self.alpha_ramp_steps, 1)
    return self.alpha * jnp.minimum(share, 1.0)

  def dropout_keys(self, ctx):
    """Returns two functions, of the student and of the teacher.

    Each maps the number of a pass to a key, or to None where dropout is off.
    """
    key = ctx.rngs["dropout"]

    def student(number):
      return jax.random.fold_in(key, number) if ctx.train else None

    def teacher(number):
      return student(number + 100) if self.teacher_dropout else None

    return student, teacher

  def hide_words(self, batch: Batch, ctx, every: bool = False) -> HiddenWords:
    """Draws the words that MLM hides, of `shorten`ed captions.

    Half of a caption's places, and at least 12, are enough: at 15 % more are
    hidden once in 100,000 captions of 25 tokens. With `every` all places are
    listed, those that count first.
    """
    length = batch["text"].shape[1]
    count = length if every else min(length, max(12, length // 2))
    return token_mask.draw(
      ctx.rngs["token_mask"],
      batch["index"],
      batch["text"],
      batch["text_len"],
      ratio=self.mask_ratio,
      mask_id=self.mask_id,
      vocab_size=self.module.stream.vocab_size,
      count=count,
    )

  def negative_noise(self, batch: Batch, ctx) -> jax.Array:
    """Draws Gumbel noise `[2, B, g]` for the hard negatives."""
    keys = rng.per_example(ctx.rngs["negatives"], batch["index"])
    size = (2, self.match_group)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, size))(keys)
    return noise.swapaxes(0, 1)

  def negatives(self, params, student, teacher, image_id, noise):
    """Draws a picture for each text and a text for each picture.

    Args:
      params: parameters, for the temperature.
      student: `Embeddings`.
      teacher: `Embeddings`.
      image_id: int32 `[B]`.
      noise: of `negative_noise`; zeros take the most similar.

    Returns:
      Two pairs (int32 `[G, g]`, places in the group; float32 `[B]`, 0 where
      there is none): pictures for the texts, and texts for the pictures.
    """
    g = self.match_group

    def groups(x):
      return x.reshape(-1, g, *x.shape[1:])

    admissible = matching.admissible(groups(image_id), self.same_image)

    def draw(query, key, noise):
      similarity = contrastive.similarity(groups(query), groups(key))
      index, exists = matching.hard_negatives(
        similarity / self.divisor(params), admissible, groups(noise)
      )
      return index, exists.reshape(-1)

    return (
      draw(student.text, teacher.image, noise[0]),
      draw(student.image, teacher.text, noise[1]),
    )

  def fuse(self, params, patches, text, hidden, text_len, negatives, key):
    """Lets captions attend to pictures, four ways in one pass.

    Keys and values of a picture are made once for all, if a device holds whole
    groups. Else what travels is the pictures, once, and not their keys and
    values in every layer.

    Args:
      params: parameters.
      patches: `[B, 1 + N, D]`.
      text: captions, ready for the layers with cross-attention, `[B, L, D]`.
      hidden: the same with hidden words, `[B, L, D]`; None leaves them out.
      text_len: int32 `[B]`.
      negatives: what `negatives` returns.
      key: of dropout, or None.

    Returns:
      `[B, L, D]` each: captions given their pictures, captions given other
      pictures, other captions given the pictures, and captions with hidden
      words given their pictures.
    """
    (pictures, _), (captions, _) = negatives
    own = jnp.broadcast_to(jnp.arange(self.match_group), pictures.shape)
    shown = patches
    if not layout.holds_groups(len(patches), self.match_group):
      shown = stack_rows(patches, take_rows(patches, pictures))
      own, pictures = (jnp.full((len(patches), 1), i) for i in range(2))
    ways = [
      (own, text, text_len),
      (pictures, text, text_len),
      (own, take_rows(text, captions), take_rows(text_len, captions)),
    ]
    if hidden is not None:
      ways.append((own, hidden, text_len))
    rows, texts, lengths = zip(*ways, strict=True)
    fused = self.apply(
      params,
      "text_given_image",
      stack_rows(*texts),
      stack_rows(*lengths),
      self.apply(params, "project", shown),
      jnp.stack(rows, axis=-1).reshape(len(own), -1),
      dropout=key,
    )
    return unstack_rows(fused, len(ways))

  def fuse_own(self, params, patches, text, text_len, key):
    """Lets captions attend to their own pictures: `[B, L, D]`."""
    return self.apply(
      params,
      "text_given_image",
      text,
      text_len,
      self.apply(params, "project", patches),
      jnp.zeros((len(text), 1), jnp.int32),
      dropout=key,
    )

  def share(self, student: Embeddings, teacher: Embeddings) -> dict:
    """What `couple` reads of each example; no gradient in the teacher's."""
    teacher = jax.lax.stop_gradient(teacher)
    return {
      "image": student.image,
      "text": student.text,
      "teacher_image": teacher.image,
      "teacher_text": teacher.text,
    }

  def match_terms(self, params, fused, negatives):
    """ITM of `fuse`'s first three: the term, and its accuracy."""
    (_, picture_exists), (_, caption_exists) = negatives
    logits = [self.apply(params, "match_logits", x) for x in fused[:3]]
    logits = jnp.stack(logits)
    match = jnp.zeros(logits.shape[:2], jnp.int32).at[0].set(1)
    weights = jnp.ones_like(picture_exists), picture_exists, caption_exists
    weights = jnp.stack(weights)
    right = jnp.argmax(logits, axis=-1) == match
    return (
      {"itm": Mean.of(matching.match_loss(logits, match), weights)},
      {"itm_accuracy": Mean.of(right, weights)},
    )

  def word_terms(self, params, hidden, teacher, words, ctx, *, axis=-1):
    """MLM: the term, and its accuracy.

    Args:
      params: parameters.
      hidden: fused captions with hidden words `[B, L, D]`.
      teacher: (its parameters, the same from the teacher).
      words: `HiddenWords`.
      ctx: of the step.
      axis: see `distillation.cross_entropy`.
    """
    teacher_params, teacher_hidden = teacher
    alpha = self.alpha_at(ctx.step)

    def some(part):
      hidden, teacher_hidden, labels = part
      logits = self.apply(params, "word_logits", hidden)
      teacher_logits = self.apply(teacher_params, "word_logits", teacher_hidden)
      return distillation.cross_entropy(
        logits, labels, teacher_logits, alpha, axis=axis
      )

    hidden, teacher_hidden = (
      masking.take(x, words.places) for x in (hidden, teacher_hidden)
    )
    loss, right = map_rows(
      some,
      (hidden, teacher_hidden, words.labels),
      Rows(self.word_chunk, ctx.sharding),
    )
    return (
      {"mlm": Mean.of(loss, words.weights)},
      {"mlm_accuracy": Mean.of(right, words.weights)},
    )
