"""SCL's releases, CLIP and RoBERTa to the parameters that a run starts from.

What the release computes is written out in `scl_reference`, in NumPy;
`tests/parity` compares with PyTorch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests import scl_reference, toys
from tests.models import two_streams
from vlp_jax.convert import npz, state_dict
from vlp_jax.convert import scl as convert
from vlp_jax.errors import UserError
from vlp_jax.methods import _start
from vlp_jax.ops import patches as patches_lib

L, SIDE, FRAMES = 6, 3, 2
LENGTHS = np.array([6, 3], np.int32)


def _state(layers=2, side=SIDE, frames=4, seed=0):
  config = two_streams.small(frames)
  sizes = dict(layers=layers, side=side, frames=frames)
  return scl_reference.fill(scl_reference.shapes(config, **sizes), seed)


def _dead():
  """What is in a checkpoint and is used nowhere."""
  return {
    "vision_transformer.decoder_blocks.0.norm1.weight": (8,),
    "vision_transformer.mask_token": (1, 1, 8),
    "vision_transformer.visual.visual_mask_token": (1, 12),
    "text_transformer.pooler.dense.weight": (8, 8),
    "text_transformer.embeddings.position_ids": (1, 11),
    "rank_output.weight": (1, 32),
    "vqa_classifier.0.weight": (32, 32),
  }


@functools.cache
def _call(frames):
  """All that the encoder computes of a batch, compiled."""
  encoder = two_streams.build(two_streams.small(frames))

  def run(self, image, text, text_len, keep):
    seen, tokens = self.see(self.embed(image), keep), self.read(text, text_len)
    fused, fused_seen = self.fuse(tokens, text_len, seen)
    return dict(
      image=self.embed_image(seen),
      text=self.embed_text(tokens),
      tokens=jnp.concatenate(seen, 1),
      words=tokens,
      fused=fused,
      seen=jnp.concatenate(fused_seen, 1),
      match=self.match_logits(fused, fused_seen),
      logits=self.word_logits(fused),
    )

  return toys.jit(
    lambda params, *args: encoder.apply({"params": params}, *args, method=run)
  )


def _check(params, state, frames, keep=None):
  """The encoder with `params` computes what the release does with `state`."""
  draw = np.random.default_rng(1)
  image = draw.integers(0, 256, (2, FRAMES, 12, 12, 3), dtype=np.uint8)
  if not frames:  # of pictures alone
    image = image[:, :1]
  text = draw.integers(3, 23, (2, L)).astype(np.int32)
  text[1, 3:] = 1
  got = _call(frames)(params, image, text, LENGTHS, keep)
  for i in range(2):
    expected = scl_reference.run(
      state,
      two_streams.small(frames),
      np.asarray(patches_lib.normalize(image[i]), np.float64),
      text[i],
      LENGTHS[i],
      None if keep is None else keep[i],
    )
    for name, want in expected.items():
      x = got[name][i]
      x = x[: LENGTHS[i]] if name in ("words", "fused", "logits") else x
      np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("frames", [0, 4])
def test_a_release_computes_the_same(frames):
  state = _state(frames=frames)
  params, _ = convert.from_scl(state, two_streams.small(frames))
  _check(params, state, frames)
  if frames:
    _check(params, state, frames, np.array([[4, 0, 7], [1, 8, 2]]))


@pytest.mark.parametrize("frames", [0, 4])
def test_the_tree_and_the_way_back(frames):
  config, state = two_streams.small(frames), _state(frames=frames)
  params, left_out = convert.from_scl(state, config)
  assert not left_out
  args = (np.zeros((1, 12, 12, 3), np.uint8), *(np.ones((1, 4), np.int32),) * 1)
  init = functools.partial(two_streams.build(config).init, jax.random.key(0))
  shapes = jax.eval_shape(init, *args, np.ones((1,), np.int32))["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  back = convert.to_scl(params, config)
  assert back.keys() == state.keys()
  for name, array in state.items():
    np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_what_is_left_out_is_said_and_the_rest_is_strict():
  config, state = two_streams.small(4), _state()
  dead = {k: np.ones(v, np.float32) for k, v in _dead().items()}
  nlvr2 = np.concatenate([state["token_type_embeddings.weight"]] * 2)[:3]
  full = state | dead | {"token_type_embeddings.weight": nlvr2}
  params, left_out = convert.from_scl(full, config)
  assert left_out.keys() == dead.keys()
  toys.assert_trees_equal(params, convert.from_scl(state, config).params)
  name = "cross_modal_text_layers.1.crossattention.self.key.weight"
  for wrong, says in (
    ({k: v for k, v in state.items() if k != name}, f"missing: {name}"),
    (state | {"momentum.weight": dead["rank_output.weight"]}, "left over: mom"),
    (state | {name: np.zeros((16, 8))}, r"another shape.*self.key.weight"),
    (_state(layers=3), "left over: vision_transformer.visual.transformer"),
  ):
    with pytest.raises(UserError, match=says):
      convert.from_scl(wrong, config)


def test_positions_are_resized_and_frames_counted():
  state, small = _state(side=2, frames=4), two_streams.small
  table = state[f"{scl_reference.VISUAL}.positional_embedding"]
  rows = state[f"{scl_reference.VISUAL}.temporal_embed"][0]
  vision = convert.from_scl(state, small(6)).params["vision"]
  resized = patches_lib.resize_positions(table[1:], (2, 2), (3, 3))
  np.testing.assert_array_equal(vision["pos"], resized)
  np.testing.assert_array_equal(vision["cls_pos"], table[0])
  np.testing.assert_array_equal(vision["temporal"][:4], rows)
  assert (
    vision["temporal"].shape == (6, 12) and not vision["temporal"][4:].any()
  )
  # Pictures alone: the first row is in all positions.
  state = _state(frames=4)
  params = convert.from_scl(state, small(0)).params
  assert "temporal" not in params["vision"]
  _check(params, state, 0)
  # The other way round: a video's frames are told apart by nothing at first.
  params = convert.from_scl(_state(frames=0), small(4)).params
  assert not params["vision"]["temporal"].any()


def _towers():
  """A CLIP of one block more and another resolution, and a RoBERTa."""
  clip, roberta = {}, {}
  for name, value in _state(layers=3, side=2, frames=0).items():
    if name.startswith("vision_transformer."):
      clip[name.removeprefix("vision_transformer.")] = value
    if name.startswith("text_transformer."):
      rest = name.removeprefix("text_transformer.")
      roberta[f"roberta.{rest}"] = value
  extra = np.zeros(3, np.float32)
  for name in ("visual.proj", "positional_embedding", "ln_final.bias"):
    clip[name] = extra
  roberta["lm_head.bias"] = roberta["roberta.pooler.dense.bias"] = extra
  return clip, roberta


def test_towers():
  clip, roberta = _towers()
  config = two_streams.small(4)
  params, left_out = convert.towers(config, clip, roberta)
  assert set(params) == {"vision", "vision_norm", "text"}
  released = _state(layers=3, side=2, frames=0)
  cut = {k: v for k, v in released.items() if "resblocks.2." not in k}
  expected = convert.from_scl(cut, config).params
  toys.assert_trees_equal(params, {k: expected[k] for k in params})
  blocks = [name for name in left_out if "resblocks.2." in name]
  assert len(blocks) == 12  # SCL takes all blocks but the last
  assert len(left_out) == 12 + 3 + 2
  bare = {k.removeprefix("roberta."): v for k, v in roberta.items()}
  alone = convert.towers(config, roberta=bare).params
  toys.assert_trees_equal(alone, {"text": expected["text"]})
  with pytest.raises(UserError, match=r"missing: visual\.class_embedding"):
    convert.towers(config, {"visual.proj": np.zeros(3)})


@pytest.fixture
def flags(tmp_path, monkeypatch):
  """The command's flags, with a config of this size."""
  config = two_streams.small(4)
  monkeypatch.setattr(
    convert.config_lib,
    "parse_command_line",
    lambda argv, flags, usage: (
      config,
      flags | dict(x.removeprefix("--").split("=", 1) for x in argv),
    ),
  )
  clip, roberta = _towers()
  for name, state in (
    ("clip", clip),
    ("roberta", roberta),
    ("released", _state() | {"rank_output.bias": np.zeros(1, np.float32)}),
  ):
    np.savez(tmp_path / f"{name}.npz", **state)
  return {
    k: f"--{k}={tmp_path / k}.npz"
    for k in ("clip", "roberta", "released", "output")
  }


def test_the_command(flags, capsys):
  path = flags["output"].removeprefix("--output=")
  config = two_streams.small(4)
  convert.main([flags["released"], flags["output"]])
  said = capsys.readouterr().out
  assert "left out, of another task: rank_output.bias\n" in said
  assert f"parameters, in {path}" in said
  expected = convert.from_scl(_state(), config).params
  toys.assert_trees_equal(
    _start.load(toys.random_like(expected), path), expected
  )
  convert.main([flags["clip"], flags["roberta"], flags["output"]])
  assert "resblocks.2" in capsys.readouterr().out
  before = toys.random_like(expected, seed=1)
  after = traverse_util.flatten_dict(_start.load(before, path))
  found = traverse_util.flatten_dict(convert.towers(config, *_towers()).params)
  before = traverse_util.flatten_dict(before)
  for name, array in after.items():
    np.testing.assert_array_equal(array, found.get(name, before[name]))
  for wrong in ([flags["output"]], [flags["clip"]], list(flags.values())):
    with pytest.raises(UserError, match="--clip=FILE, --roberta=FILE"):
      convert.main(wrong)


def test_files_that_cannot_be_read(tmp_path):
  npz.write(tmp_path / "x.npz", {"a": np.zeros(2)})
  assert state_dict.read(str(tmp_path / "x.npz")).keys() == {"a"}
  (tmp_path / "broken.npz").write_bytes(b"no zip")
  for name, says in (("none.npz", "no such file"), ("broken.npz", "be read")):
    with pytest.raises(UserError, match=says):
      state_dict.read(str(tmp_path / name))
