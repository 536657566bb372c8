"""SCL's encoder: its size, and that its pieces share what they can share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.models import two_streams
from vlp_jax.models.two_stream import Seen

B, L, N = 2, 6, 9
LENGTHS = np.array([6, 3], np.int32)


def _shapes(config):
  side = config.data.image_size
  image = jnp.zeros((1, side, side, 3), jnp.uint8)
  text, text_len = jnp.zeros((1, 4), jnp.int32), jnp.ones((1,), jnp.int32)
  init = two_streams.build(config).init
  shapes = jax.eval_shape(init, jax.random.key(0), image, text, text_len)
  return shapes["params"]


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Parts, and their parameters at 288 pixels.
PARTS = {
  ("text",): 124_055_040,
  ("vision", "vision_norm"): 78_809_856,
  ("text_in", "image_in"): 1_181_184,
  ("fusion/types",): 1_536,
  ("fusion/layers",): 113_421_312,
  ("fusion/text_pool", "fusion/image_pool"): 1_181_184,
  ("words", "vocabulary"): 39_245_913,
  ("matching",): 3_074,
  ("text_projection", "image_projection"): 1_971_712,
  ("temperature",): 1,
}


def test_parameters_at_the_size_of_the_paper():
  shapes = _shapes(two_streams.paper())
  assert _count(shapes) == sum(PARTS.values()) == 359_870_812
  for names, expected in PARTS.items():
    found = 0
    for name in names:
      part = functools.reduce(lambda x, key: x[key], name.split("/"), shapes)
      found += _count(part)
    assert found == expected, names
  layers = shapes["vision"]["transformer"]["layers"]
  assert _count(layers) == 11 * 7_087_872
  assert _count(shapes["fusion"]["layers"]) == 12 * 9_451_776
  video = _shapes(two_streams.paper(frames=8))
  assert _count(video) == 359_870_812 + 6_144


def test_what_is_new_starts_as_published():
  encoder = two_streams.build(two_streams.small())
  tokens = jnp.ones((1, 2, 16))

  def start(method, *args):
    return encoder.init(jax.random.key(0), *args, method=method)["params"]

  assert start("divisor")["temperature"]["value"] == np.float32(0.07)
  match = start("match_logits", tokens, Seen(tokens, tokens))
  for dense in (match["matching"], *match["fusion"].values()):
    if isinstance(dense, dict):
      assert not dense["bias"].any()
      dense = dense["kernel"]
    assert abs(dense.std() / 0.02 - 1) < 5 / (2 * dense.size) ** 0.5
  for name in ("hidden", "projection"):  # as PyTorch's Linear
    for leaf in start("embed_text", tokens)["text_projection"][name].values():
      assert 0.1 < np.abs(leaf).max() <= 0.25


@functools.cache
def _run(function):
  """A compiled method of the small encoder, with drawn parameters."""
  config = two_streams.small(frames=4)
  encoder, params = two_streams.build(config), _params()
  return toys.jit(
    lambda *args: encoder.apply({"params": params}, *args, method=function)
  )


@functools.cache
def _params():
  return toys.random_like(_shapes(two_streams.small(frames=4)))


def _batch(frames):
  draw = np.random.default_rng(0)
  shape = (B, frames, 12, 12, 3) if frames else (B, 12, 12, 3)
  image = draw.integers(0, 256, shape, dtype=np.uint8)
  return image, draw.integers(3, 23, (B, L)).astype(np.int32)


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_a_step(frames):
  """What a method does: one pass a tower, and rows of several texts."""
  image, text = _batch(frames)
  count = max(frames, 1)
  patches = _run("embed")(image)
  seen = _run("see")(patches)
  assert seen.frames.shape == (B, count, 16)
  assert seen.patches.shape == (B, count * N, 16)
  keep = np.array([[4, 0], [7, 2]])
  part = _run("see")(patches, keep)
  assert part.patches.shape == (B, count * 2, 16)
  # All versions of a text at once, and what they are fused with.
  hidden = np.where(np.arange(L) == 1, 22, text)
  tokens = _run("read")(np.concatenate([text, hidden]), np.tile(LENGTHS, 2))
  for i, version in enumerate((text, hidden)):
    alone = _run("read")(version, LENGTHS)
    both = tokens[i * B : (i + 1) * B]
    np.testing.assert_allclose(both, alone, rtol=1e-5, atol=1e-5)
  fused, fused_seen = _run("fuse")(tokens[:B], LENGTHS, part)
  assert fused.shape == tokens[:B].shape
  assert jax.tree.map(jnp.shape, fused_seen) == jax.tree.map(jnp.shape, part)
  assert _run("match_logits")(fused, fused_seen).shape == (B, 2)
  words = _run("word_logits")(fused[:, :3])
  assert words.shape == (B, 3, 23) and words.dtype == np.float32
  assert _run("divisor")() == _params()["temperature"]["value"]
  for got, want in (
    (_run("encode_image")(image), _run("embed_image")(seen)),
    (_run("encode_text")(text, LENGTHS), _run("embed_text")(tokens[:B])),
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 3])
def test_keeping_all_patches_changes_their_order_alone(frames):
  image, _ = _batch(frames)
  patches = _run("embed")(image)
  order = np.stack([np.random.default_rng(i).permutation(N) for i in range(B)])
  full, kept = _run("see")(patches), _run("see")(patches, order)
  np.testing.assert_allclose(kept.frames, full.frames, rtol=1e-5, atol=1e-5)
  expected = full.patches.reshape(B, frames, N, -1)
  expected = np.take_along_axis(expected, order[:, None, :, None], 2)
  got = kept.patches.reshape(expected.shape)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_video_of_one_frame_is_a_picture():
  image, text = _batch(1)
  tokens = _run("read")(text, LENGTHS)
  video, picture = (_run("see")(_run("embed")(x)) for x in (image, image[:, 0]))
  toys.assert_trees_equal(video, picture)
  toys.assert_trees_equal(
    _run("fuse")(tokens, LENGTHS, video), _run("fuse")(tokens, LENGTHS, picture)
  )


def test_padded_text_is_truncated_text():
  image, text = _batch(3)
  seen = _run("see")(_run("embed")(image))

  def pair(text, rows):
    part = jax.tree.map(lambda x: x[rows], seen)
    tokens = _run("read")(text[rows], LENGTHS[rows])
    fused = _run("fuse")(tokens, LENGTHS[rows], part)
    return fused[0], _run("match_logits")(*fused)

  fused, logits = pair(text, slice(0, 2))
  short, short_logits = pair(text[:, :3], slice(1, 2))
  np.testing.assert_allclose(short[0], fused[1, :3], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(short_logits[0], logits[1], rtol=1e-4, atol=1e-5)


def _outputs(encoder, image, text, text_len):
  seen = encoder.see(encoder.embed(image))
  tokens = encoder.read(text, text_len)
  fused, fused_seen = encoder.fuse(tokens, text_len, seen)
  return dict(
    seen=seen.patches,
    fused=fused,
    image=encoder.embed_image(seen),
    text=encoder.embed_text(tokens),
    match=encoder.match_logits(fused, fused_seen),
    words=encoder.word_logits(fused),
  )


def test_heads_are_float32_where_products_are_bfloat16():
  config = two_streams.small(frames=4)
  encoder = two_streams.build(config, jnp.bfloat16)
  image, text = _batch(2)
  apply = functools.partial(encoder.apply, method=_outputs)
  out = jax.eval_shape(apply, {"params": _params()}, image, text, LENGTHS)
  kinds = {name: x.dtype for name, x in out.items()}
  assert kinds.pop("seen") == kinds.pop("fused") == jnp.bfloat16
  assert set(kinds.values()) == {np.dtype("float32")}


def test_dropout_is_on_where_its_key_is_given():
  """In text and fusion alone; what pictures are, each pass sees the same."""
  encoder = two_streams.build(two_streams.small(frames=4), dropout=0.5)
  image, text = _batch(2)
  run = toys.jit(
    lambda key: encoder.apply(
      {"params": _params()},
      *(image, text, LENGTHS),
      method=_outputs,
      rngs={"dropout": key},
    )
  )
  one, two = run(jax.random.key(0)), run(jax.random.key(1))
  for name in ("fused", "text", "match", "words"):
    assert np.abs(one[name] - two[name]).max() > 1e-2, name
  for name in ("seen", "image"):
    np.testing.assert_array_equal(one[name], two[name])
