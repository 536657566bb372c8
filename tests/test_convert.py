"""The mapping of open_clip's CoCa, without PyTorch.

`tests/parity` compares what the two models compute.
"""

import jax
import numpy as np
import pytest
from flax import traverse_util

from vlp_jax import config as config_lib
from vlp_jax import train_state
from vlp_jax.convert import open_clip
from vlp_jax.errors import UserError
from vlp_jax.methods import base

LENGTH, VOCAB, EMBED, SIDE, PATCH = 6, 11, 8, 12, 4
TEXT, LAYERS, HEADS = 8, 2, 2
BASE = (
  "data.image_size=12",
  f"tokenizer.vocab_size={VOCAB}",
  f"tokenizer.max_len={LENGTH}",
  f"model.embed_dim={EMBED}",
  f"model.vision.patch_size={PATCH}",
  "model.vision.depth=3",
  f"model.vision.num_heads={HEADS}",
  *(
    f"model.{tower}.{field}"
    for tower in ("text", "decoder")
    for field in (
      f"width={TEXT}",
      f"depth={LAYERS}",
      f"num_heads={HEADS}",
    )
  ),
  f"model.text.max_len={LENGTH}",
)
POOLED = (
  "model.pooler.kind=openclip",
  "model.pooler.num_queries=5",
  f"model.pooler.width={EMBED}",
  "model.pooler.num_heads=4",
)
# The vision tower's width, and the rest of the arrangement.
ARRANGEMENTS = {
  "coca_base": (8, ("model.pooler.kind=cls",)),
  "coca_ViT-B-32": (12, POOLED),
  "coca_ViT-B-32, equal widths": (8, POOLED),
}


def config_for(arrangement):
  width, overrides = ARRANGEMENTS[arrangement]
  overrides = (*BASE, f"model.vision.width={width}", *overrides)
  return config_lib.load("configs/coca.py:b16", overrides)


def block(width, cross=False):
  """Shapes of a `ResidualAttentionBlock`."""
  norms = ["ln_1", "ln_2"] + ["ln_1_kv"] * cross
  shapes = {f"{n}.{k}": (width,) for n in norms for k in ("weight", "bias")}
  return shapes | {
    "attn.in_proj_weight": (3 * width, width),
    "attn.in_proj_bias": (3 * width,),
    "attn.out_proj.weight": (width, width),
    "attn.out_proj.bias": (width,),
    "mlp.c_fc.weight": (4 * width, width),
    "mlp.c_fc.bias": (4 * width,),
    "mlp.c_proj.weight": (width, 4 * width),
    "mlp.c_proj.bias": (width,),
  }


def state_dict_for(arrangement):
  """Random arrays with open_clip's names and shapes."""
  width, overrides = ARRANGEMENTS[arrangement]
  pooled = EMBED if overrides is POOLED else width
  shapes = {
    "logit_scale": (),
    "text.token_embedding.weight": (VOCAB, TEXT),
    "text.cls_emb": (TEXT,),
    "text.positional_embedding": (LENGTH + 1, TEXT),
    "text.ln_final.weight": (TEXT,),
    "text.ln_final.bias": (TEXT,),
    "text.text_projection": (TEXT, EMBED),
    "visual.conv1.weight": (width, 3, PATCH, PATCH),
    "visual.class_embedding": (width,),
    "visual.positional_embedding": ((SIDE // PATCH) ** 2 + 1, width),
    "visual.ln_pre.weight": (width,),
    "visual.ln_pre.bias": (width,),
    "visual.ln_post.weight": (pooled,),
    "visual.ln_post.bias": (pooled,),
    "visual.proj": (pooled, EMBED),
    "text_decoder.ln_final.weight": (TEXT,),
    "text_decoder.ln_final.bias": (TEXT,),
    "text_decoder.text_projection": (TEXT, VOCAB),
  }
  if overrides is POOLED:
    pool = {
      "query": (5, EMBED),
      "ln_q.weight": (EMBED,),
      "ln_q.bias": (EMBED,),
      "ln_k.weight": (width,),
      "ln_k.bias": (width,),
      "attn.in_proj_bias": (3 * EMBED,),
      "attn.out_proj.weight": (EMBED, EMBED),
      "attn.out_proj.bias": (EMBED,),
    }
    if width == EMBED:
      pool["attn.in_proj_weight"] = (3 * EMBED, EMBED)
    else:
      pool["attn.q_proj_weight"] = (EMBED, EMBED)
      pool["attn.k_proj_weight"] = (EMBED, width)
      pool["attn.v_proj_weight"] = (EMBED, width)
    shapes |= {f"visual.attn_pool.{name}": s for name, s in pool.items()}
  for stack, depth, shapes_of_block in (
    ("visual.transformer.resblocks", 3, block(width)),
    ("text.transformer.resblocks", LAYERS, block(TEXT)),
    ("text_decoder.resblocks", LAYERS, block(TEXT)),
    ("text_decoder.cross_attn", LAYERS, block(TEXT, cross=True)),
  ):
    for layer in range(depth):
      for name, shape in shapes_of_block.items():
        shapes[f"{stack}.{layer}.{name}"] = shape
  draw = np.random.default_rng(0)
  return {n: draw.standard_normal(s, np.float32) for n, s in shapes.items()}


@pytest.fixture(params=ARRANGEMENTS)
def arrangement(request):
  return request.param


def test_makes_the_tree_of_the_method(arrangement):
  config = config_for(arrangement)
  params = open_clip.from_open_clip(state_dict_for(arrangement), config)
  abstract = train_state.abstract_params(base.get("coca", config), config)
  expected = jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == expected


def test_there_and_back_is_the_identity(arrangement):
  config, state = config_for(arrangement), state_dict_for(arrangement)
  params = open_clip.from_open_clip(state, config)
  back = open_clip.to_open_clip(params, config)
  assert back.keys() == state.keys()
  for name, array in state.items():
    np.testing.assert_array_equal(back[name], array, err_msg=name)
  again = open_clip.from_open_clip(back, config)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_no_array_is_used_twice(arrangement):
  """Numbers are all different: each of them arrives, once."""
  config, state = config_for(arrangement), state_dict_for(arrangement)
  count = sum(array.size for array in state.values())
  numbers = iter(np.split(np.arange(count, dtype=np.float32), count))
  for name, array in state.items():
    values = [next(numbers) for _ in range(array.size)]
    state[name] = np.concatenate(values).reshape(array.shape)
  params = open_clip.from_open_clip(state, config)
  arrived = np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
  np.testing.assert_array_equal(np.sort(arrived), np.arange(count))


def test_layouts():
  """The entries that transposing or cutting wrongly would swap."""
  state = state_dict_for("coca_ViT-B-32")
  params = open_clip.from_open_clip(state, config_for("coca_ViT-B-32"))
  flat = traverse_util.flatten_dict(params, sep="/")
  x = np.random.default_rng(1).standard_normal(TEXT).astype(np.float32)
  head = TEXT // HEADS

  # PyTorch: rows are queries, keys, values; within each, head by head.
  packed = state["text.transformer.resblocks.1.attn.in_proj_weight"] @ x
  qkv = flat["text/transformer/layers/self_attention/qkv/kernel"][1]
  np.testing.assert_allclose(
    np.einsum("d,dknh->knh", x, qkv), packed.reshape(3, HEADS, head), rtol=1e-5
  )
  packed = state["text_decoder.cross_attn.1.attn.in_proj_weight"] @ x
  layers = "decoder/transformer/layers/cross_attention"
  q, kv = flat[f"{layers}/q/kernel"][1], flat[f"{layers}/kv/kernel"][1]
  np.testing.assert_allclose(
    np.concatenate([np.einsum("d,dnh->nh", x, q).ravel(), *_both(x, kv)]),
    packed,
    rtol=1e-5,
  )
  out = flat[f"{layers}/out/proj/kernel"][0]
  np.testing.assert_allclose(
    np.einsum("nh,nhd->d", x.reshape(HEADS, head), out),
    state["text_decoder.cross_attn.0.attn.out_proj.weight"] @ x,
    rtol=1e-5,
  )
  for name, first in (("vision", 1), ("text", 0)):
    theirs = {"vision": "visual", "text": "text"}[name]
    table = state[f"{theirs}.positional_embedding"]
    cls = table[0 if first else -1]
    np.testing.assert_array_equal(flat[f"{name}/cls_pos"], cls)
    rest = table[first : first + len(table) - 1]
    np.testing.assert_array_equal(flat[f"{name}/pos"], rest)
  patch = flat["vision/patch/kernel"]  # rows, columns, colours, out
  assert patch[1, 2, 0, 7] == state["visual.conv1.weight"][7, 0, 1, 2]


def _both(x, kv):
  return [np.einsum("d,dnh->nh", x, kv[:, i]).ravel() for i in range(2)]


def test_names_what_does_not_fit():
  config, state = config_for("coca_base"), state_dict_for("coca_base")
  del state["text.cls_emb"]
  state["visual.attn_pool.query"] = np.zeros((5, 8))
  state["logit_scale"] = np.zeros(2)
  with pytest.raises(UserError) as error:
    open_clip.from_open_clip(state, config)
  assert "missing: text.cls_emb;" in str(error.value)
  assert "left over: visual.attn_pool.query;" in str(error.value)
  assert "logit_scale (2,) instead of ()" in str(error.value)

  params = open_clip.from_open_clip(state_dict_for("coca_base"), config)
  params["pixels"] = {"bias": np.zeros(3)}
  with pytest.raises(UserError, match="left over: pixels/bias"):
    open_clip.to_open_clip(params, config)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("model.activation", "relu2", "set it to gelu"),
    ("model.vision.cls_token", False, "set it to True"),
    ("model.decoder.cross_mlp", False, "set it to True"),
    ("model.pooler.kind", "cascade", "set it to cls or openclip"),
    ("model.vision.width", 16, "equal widths"),
  ],
)
def test_refuses_another_architecture(field, value, message):
  config = config_for("coca_base")
  section, _, name = field.rpartition(".")
  config[section][name] = value
  with pytest.raises(UserError, match=message):
    open_clip.from_open_clip(state_dict_for("coca_base"), config)


def test_refuses_a_method_without_a_decoder():
  config = config_lib.load("configs/clip.py:b16")
  with pytest.raises(UserError, match=r"clip has no text decoder"):
    open_clip.to_open_clip({}, config)
