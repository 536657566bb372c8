"""CoCa against open_clip's, with shared weights: numbers, gradients, captions.

Needs the [parity] extra; see docs/parity.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import open_clip_peer
from tests import toys
from vlp_jax import config as config_lib
from vlp_jax.convert import open_clip as convert
from vlp_jax.methods import base

torch = pytest.importorskip("torch")
try:
  open_clip = open_clip_peer.load()
except ImportError as error:
  pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.parity

BATCH, LENGTH, VOCAB, IMAGE = 8, 16, 101, 32
PAD, SOT, EOT = 0, 99, 100
ATOL = 1e-5
SIZES = (
  f"data.image_size={IMAGE}",
  f"batch_size={BATCH}",
  f"tokenizer.vocab_size={VOCAB}",
  f"tokenizer.max_len={LENGTH}",
  "model.vision.patch_size=8",
  "model.vision.depth=3",
  "model.vision.num_heads=4",
  f"model.text.max_len={LENGTH}",
  *(
    f"model.{tower}.{field}"
    for tower in ("text", "decoder")
    for field in ("width=64", "depth=2", "num_heads=4")
  ),
)
ARRANGEMENTS = {
  # [CLS] and patches; a joint space of another width.
  "coca_base": (
    "model.embed_dim=48",
    "model.vision.width=64",
    "model.pooler.kind=cls",
    "model.pooler.width=64",
  ),
  # An attentional pooler, over a vision tower of another width.
  "coca_ViT-B-32": (
    "model.embed_dim=64",
    "model.vision.width=96",
    "model.pooler.kind=openclip",
    "model.pooler.width=64",
    "model.pooler.num_queries=10",
    "model.pooler.num_heads=8",
  ),
}


class Pair:
  """Two models with the same weights, and what they make of a batch.

  Attributes:
    config: of both.
    method, params: ours.
    peer: open_clip's.
  """

  def __init__(self, arrangement: str, legacy: bool):
    mask = f"model.text.legacy_cls_mask={legacy}"
    overrides = (*SIZES, *ARRANGEMENTS[arrangement], mask)
    self.config = config_lib.load("configs/coca.py:b16", overrides)
    self.method = base.get("coca", self.config)
    self.peer = open_clip_peer.build(self.config).eval()
    self.peer.text.correct_cls_mask = not legacy
    draw_weights(self.peer)
    state = {k: v.numpy() for k, v in self.peer.state_dict().items()}
    self.params = convert.from_open_clip(state, self.config)
    self.batch = draw_batch()

  @functools.cached_property
  def real(self) -> np.ndarray:
    """Which tokens are no padding, bool `[B, L]`."""
    return np.arange(LENGTH) < self.batch["text_len"][:, None]

  @functools.cached_property
  def ours(self) -> dict:
    @toys.jit
    def run(params, batch):
      apply = functools.partial(self.method.apply, params)
      cls, patches = apply("see", apply("embed_patches", batch["image"]))
      image, image_tokens = apply("pool", cls, patches)
      text, text_tokens = apply("read", batch["text"], batch["text_len"])
      names = ("image", "text", "text_len")
      logits = apply("caption_logits", *(batch[name] for name in names))
      (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
      return dict(
        image=image,
        image_tokens=image_tokens,
        text=text,
        text_tokens=text_tokens,
        logits=logits,
        **terms,
        grads=grads,
      )

    def loss(params, batch):
      ctx = toys.context()
      out = self.method.forward(params, batch, ctx)
      coupled = self.method.couple(params, out.shared, batch, ctx)
      terms = {
        name: mean.total / mean.weight
        for name, mean in {**out.terms, **coupled.terms}.items()
      }
      weights = self.method.term_weights(ctx.step)
      return sum(weights[name] * terms[name] for name in terms), terms

    with jax.default_matmul_precision("highest"):
      return jax.device_get(run(self.params, self.batch))

  @functools.cached_property
  def theirs(self) -> dict:
    pixels = open_clip_peer.pixels(self.batch["image"])
    text = torch.from_numpy(self.batch["text"]).long()
    image, image_tokens = self.peer._encode_image(pixels)
    embedding, text_tokens = self.peer._encode_text(text)
    out = self.peer(pixels, text)
    # The weights are the loss's own; its parts come back weighted.
    loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    itc, caption = loss(**out)
    self.peer.zero_grad()
    (itc + caption).backward()
    arrays = dict(
      image=image,
      image_tokens=image_tokens,
      text=embedding,
      text_tokens=text_tokens,
      logits=out["logits"],
      itc=itc,
      caption=caption / 2.0,
    )
    return {k: v.detach().numpy() for k, v in arrays.items()} | dict(
      grads={k: v.grad.numpy() for k, v in self.peer.named_parameters()}
    )


def draw_weights(model) -> None:
  """Draws all weights: no bias is zero, no scale is one.

  open_clip leaves its vocabulary head uninitialised, so that must be drawn in
  any case.
  """
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if name == "logit_scale":
        weight.fill_(np.log(20.0))
      elif weight.ndim == 1 and name.endswith("weight"):  # of a norm
        weight.copy_(1 + 0.2 * noise)
      elif weight.ndim == 1:
        weight.copy_(0.2 * noise)
      elif name.endswith("positional_embedding"):
        weight.copy_(noise)
      else:
        weight.copy_(noise * weight[0].numel() ** -0.5)


def draw_batch() -> dict:
  """Captions of 7 and 5 tokens, a full one, one that is the start symbol."""
  draw = np.random.default_rng(0)
  text_len = np.array([7, 5, LENGTH, 1, 2, 9, 15, 12], np.int32)
  text = draw.integers(1, SOT, (BATCH, LENGTH)).astype(np.int32)
  text[:, 0] = SOT
  ends = text_len > 1
  text[ends, text_len[ends] - 1] = EOT
  text[np.arange(LENGTH) >= text_len[:, None]] = PAD
  # Coarse squares of colour: the mean of pure noise is the same everywhere.
  coarse = draw.integers(0, 256, (BATCH, 2, 2, 3), dtype=np.uint8)
  return dict(
    image=np.kron(coarse, np.ones((1, IMAGE // 2, IMAGE // 2, 1), np.uint8)),
    text=text,
    text_len=text_len,
    image_id=np.arange(BATCH, dtype=np.int32),
    index=np.arange(BATCH, dtype=np.int32),
  )


@functools.cache
def make_pair(arrangement: str, legacy: bool) -> Pair:
  return Pair(arrangement, legacy)


@pytest.fixture(params=ARRANGEMENTS)
def arrangement(request):
  return request.param


@pytest.fixture(params=[True, False], ids=["legacy_mask", "correct_mask"])
def pair(arrangement, request):
  return make_pair(arrangement, request.param)


def close(pair: Pair, name: str, where=...) -> None:
  np.testing.assert_allclose(
    pair.ours[name][where], pair.theirs[name][where], rtol=0, atol=ATOL
  )


@pytest.mark.parametrize("name", ["image", "image_tokens", "text"])
def test_features(pair, name):
  close(pair, name)


def test_text_tokens(pair):
  close(pair, "text_tokens", pair.real)


def test_logits(pair):
  # The row that predicts token t + 1 is the one of token t.
  close(pair, "logits", pair.real[:, :-1])


@pytest.mark.parametrize("name", ["itc", "caption"])
def test_losses(pair, name):
  close(pair, name)


def test_gradients(pair):
  ours = convert.to_open_clip(pair.ours["grads"], pair.config)
  theirs = pair.theirs["grads"]
  assert ours.keys() == theirs.keys()
  for name, gradient in theirs.items():
    # Some are small: so a part of the tensor's largest, too.
    atol = min(ATOL, 1e-4 * np.abs(gradient).max())
    np.testing.assert_allclose(
      ours[name], gradient, rtol=0, atol=atol, err_msg=name
    )


def test_masks_differ(arrangement):
  """The comparison above would notice the wrong mask."""
  legacy, correct = (make_pair(arrangement, value) for value in (True, False))
  padded = legacy.batch["text_len"] < LENGTH
  gap = np.abs(legacy.theirs["text"] - correct.theirs["text"]).max(axis=1)
  assert np.all(gap[padded] > 100 * ATOL)


def test_captions(pair):
  """Greedy decoding with a cache equals the plain loop without one."""
  pixels = open_clip_peer.pixels(pair.batch["image"])
  # Any token may play the end: the one with which captions end at the most
  # different places shows most.
  endless = greedy(pair.peer, pixels, VOCAB)

  def ends(token):
    written = endless == token
    written[:, -1] = True
    return set(written.argmax(axis=1))

  end = max(range(SOT), key=lambda token: len(ends(token)))
  assert len(ends(end)) > 2

  generate = functools.partial(
    pair.method.generate, max_len=LENGTH, bos_id=SOT, eos_id=end
  )
  with jax.default_matmul_precision("highest"):
    ours = toys.jit(generate)(pair.params, {"image": pair.batch["image"]})
  np.testing.assert_array_equal(ours, greedy(pair.peer, pixels, end))


@torch.no_grad()
def greedy(model, pixels, end: int) -> np.ndarray:
  """Writes captions, and runs all of the model for every token."""
  ids = torch.full((len(pixels), 1), SOT)
  done = torch.zeros(len(pixels), dtype=torch.bool)
  for length in range(2, LENGTH + 1):
    logits = model(pixels, ids, output_labels=False)["logits"][:, -1]
    logits[:, [PAD, SOT]] = -torch.inf
    token = logits.argmax(dim=-1)
    if length == LENGTH:
      token[:] = end
    token[done] = PAD
    done |= token == end
    ids = torch.cat([ids, token[:, None]], dim=1)
  return ids.numpy()


def test_token_zero_is_padding_in_open_clip_alone():
  """open_clip's BPE has a "!" at 0, which its masks take for padding."""
  pair = make_pair("coca_base", False)
  text = np.array([[SOT, PAD, PAD, 7, EOT] + [PAD] * (LENGTH - 5)], np.int32)
  run = toys.jit(pair.method.encode_text)

  def ours(length):
    batch = dict(text=text, text_len=np.array([length], np.int32))
    return np.asarray(run(pair.params, batch))

  theirs = pair.peer.encode_text(torch.from_numpy(text).long())
  gap = jnp.abs(ours(5) - theirs.detach().numpy()).max()
  assert gap > 100 * ATOL
