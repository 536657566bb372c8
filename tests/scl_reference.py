"""A released SCL: names, shapes, and what it computes, in NumPy, float64.

Written from what the release computes, on its tensors as they are: one
sequence at a time, and attention over all tokens under a mask of pairs.
"""

import math

import numpy as np

VISUAL = "vision_transformer.visual"
_erf = np.vectorize(math.erf)


def shapes(config, *, layers: int, side: int, frames: int) -> dict:
  """Shapes by name.

  Args:
    config: sizes.
    layers: blocks of the vision transformer.
    side: patches a side that its positions are for.
    frames: temporal positions; 0 has none, as checkpoints of pictures have.
  """
  found = {}

  def dense(name, out, into):
    found[f"{name}.weight"] = (out, into)
    found[f"{name}.bias"] = (out,)

  def norm(name, width):
    found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

  model, words = config.model, config.tokenizer.vocab_size
  v, t, d = (model[k].width for k in ("vision", "text", "fusion"))
  size = model.vision.patch_size
  found[f"{VISUAL}.conv1.weight"] = (v, 3, size, size)
  found[f"{VISUAL}.class_embedding"] = (v,)
  found[f"{VISUAL}.positional_embedding"] = (1 + side**2, v)
  if frames:
    found[f"{VISUAL}.temporal_embed"] = (1, frames, v)
  norm(f"{VISUAL}.ln_pre", v)
  norm(f"{VISUAL}.ln_post", v)
  for i in range(layers):
    block = f"{VISUAL}.transformer.resblocks.{i}"
    found[f"{block}.attn.in_proj_weight"] = (3 * v, v)
    found[f"{block}.attn.in_proj_bias"] = (3 * v,)
    dense(f"{block}.attn.out_proj", v, v)
    norm(f"{block}.ln_1", v)
    norm(f"{block}.ln_2", v)
    dense(f"{block}.mlp.c_fc", 4 * v, v)
    dense(f"{block}.mlp.c_proj", v, 4 * v)
  embeddings = "text_transformer.embeddings"
  found[f"{embeddings}.word_embeddings.weight"] = (words, t)
  rows = 2 + model.text.max_len
  found[f"{embeddings}.position_embeddings.weight"] = (rows, t)
  found[f"{embeddings}.token_type_embeddings.weight"] = (1, t)
  norm(f"{embeddings}.LayerNorm", t)

  def bert(name, width, attentions):
    for attention in attentions:
      for part in ("self.query", "self.key", "self.value", "output.dense"):
        dense(f"{name}.{attention}.{part}", width, width)
      norm(f"{name}.{attention}.output.LayerNorm", width)
    dense(f"{name}.intermediate.dense", 4 * width, width)
    dense(f"{name}.output.dense", width, 4 * width)
    norm(f"{name}.output.LayerNorm", width)

  for i in range(model.text.depth):
    bert(f"text_transformer.encoder.layer.{i}", t, ("attention",))
  found["token_type_embeddings.weight"] = (2, d)
  for name, width in (("text", t), ("image", v)):
    dense(f"cross_modal_{name}_transform", d, width)
    dense(f"cross_modal_{name}_pooler.dense", d, d)
    for i in range(model.fusion.depth):
      layer = f"cross_modal_{name}_layers.{i}"
      bert(layer, d, ("attention", "crossattention"))
  for name in ("vision_proj", "language_proj"):
    dense(f"{name}.0", d, d)
    norm(f"{name}.1", d)
    dense(f"{name}.3", model.embed_dim, d)
  dense("itm_score.fc", 2, 2 * d)
  dense("mlm_score.transform.dense", d, d)
  norm("mlm_score.transform.LayerNorm", d)
  found["mlm_score.decoder.weight"] = (words, d)
  found["mlm_score.bias"] = (words,)
  found["cl_temp"] = ()
  return found


def fill(shapes: dict, seed: int = 0) -> dict[str, np.ndarray]:
  """Random tensors; norms are near 1, the temperature is 0.2."""
  draw = np.random.default_rng(seed)
  state = {}
  for name, shape in shapes.items():
    x = 0.2 * draw.standard_normal(shape).astype(np.float32)
    one = "LayerNorm.weight" in name or (".ln_" in name and "weight" in name)
    state[name] = 1 + x if one else x
  if "cl_temp" in state:
    state["cl_temp"] = np.float32(0.2)
  return state


def _linear(p, name, x):
  return x @ p[f"{name}.weight"].T.astype(np.float64) + p[f"{name}.bias"]


def _norm(p, name, x, epsilon=1e-5):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
  return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def _gelu(x):
  return x * (1 + _erf(x / 2**0.5)) / 2


def _attend(q, k, v, heads, mask):
  out, size = [], q.shape[-1] // heads
  for i in range(heads):
    part = slice(i * size, (i + 1) * size)
    scores = q[:, part] @ k[:, part].T / size**0.5 - 1e4 * (1 - mask)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
  return np.concatenate(out, -1)


def vision(p, pixels, heads, layers, keep=None, prefix=f"{VISUAL}."):
  """Frame tokens `[F, D]` and patches `[F, K, D]` of `[F, H, W, 3]`.

  Pixels are normalised. Their positions must be for as many patches.
  """
  p = {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}
  kernel = p["conv1.weight"]
  width, _, size, _ = kernel.shape
  rows = []
  for f, picture in enumerate(pixels):
    patches = [
      np.einsum("dcij,ijc->d", kernel, picture[i : i + size, j : j + size])
      for i in range(0, picture.shape[0], size)
      for j in range(0, picture.shape[1], size)
    ]
    x = np.stack([p["class_embedding"], *patches]) + p["positional_embedding"]
    if "temporal_embed" in p:
      x = x + p["temporal_embed"][0, f]
    rows.append(x if keep is None else x[[0, *(1 + np.array(keep))]])
  count = len(rows[0])
  x = _norm(p, "ln_pre", np.concatenate(rows).astype(np.float64))
  place, frame = np.arange(len(x)) % count, np.arange(len(x)) // count
  mask = (frame[:, None] == frame[None]) | (place[:, None] == 0)
  for i in range(layers):
    q = {k: f"transformer.resblocks.{i}.{k}" for k in ("ln_1", "ln_2", "mlp")}
    name = f"transformer.resblocks.{i}.attn"
    y = _norm(p, q["ln_1"], x) @ p[f"{name}.in_proj_weight"].T
    y = np.split(y + p[f"{name}.in_proj_bias"], 3, axis=-1)
    x = x + _linear(p, f"{name}.out_proj", _attend(*y, heads, mask))
    y = _linear(p, f"{q['mlp']}.c_fc", _norm(p, q["ln_2"], x))
    x = x + _linear(p, f"{q['mlp']}.c_proj", y / (1 + np.exp(-1.702 * y)))
  x = _norm(p, "ln_post", x).reshape(len(pixels), count, width)
  return x[:, 0], x[:, 1:]


def _bert(p, name, x, mask, heads, epsilon, other=None, other_mask=None):
  def attend(kind, context, mask):
    q = _linear(p, f"{name}.{kind}.self.query", x)
    k = _linear(p, f"{name}.{kind}.self.key", context)
    v = _linear(p, f"{name}.{kind}.self.value", context)
    y = _attend(q, k, v, heads, mask)
    y = _linear(p, f"{name}.{kind}.output.dense", y)
    return _norm(p, f"{name}.{kind}.output.LayerNorm", x + y, epsilon)

  x = attend("attention", x, mask)
  if other is not None:
    x = attend("crossattention", other, other_mask)
  y = _gelu(_linear(p, f"{name}.intermediate.dense", x))
  y = x + _linear(p, f"{name}.output.dense", y)
  return _norm(p, f"{name}.output.LayerNorm", y, epsilon)


def text(p, ids, length, heads, layers, prefix="text_transformer."):
  """RoBERTa on one text, int `[L]`: `[L, D]`."""
  p = {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}
  real = np.arange(len(ids)) < length
  places = np.cumsum(real) * real + 1
  x = p["embeddings.word_embeddings.weight"][ids].astype(np.float64)
  x = x + p["embeddings.position_embeddings.weight"][places]
  x = x + p["embeddings.token_type_embeddings.weight"][0]
  x = _norm(p, "embeddings.LayerNorm", x)
  for i in range(layers):
    x = _bert(p, f"encoder.layer.{i}", x, real[None], heads, 1e-5)
  return x


def fuse(p, words, length, tokens, heads, layers):
  """Both streams, after the modality Linears: `[L, D]` and `[S, D]`."""
  real = (np.arange(len(words)) < length)[None]
  every = np.ones((1, len(tokens)), bool)
  types = p["token_type_embeddings.weight"]
  words, tokens = words + types[0], tokens + types[1]
  for i in range(layers):
    words, tokens = (
      _bert(
        p,
        f"cross_modal_text_layers.{i}",
        *(words, real, heads, 1e-12, tokens, every),
      ),
      _bert(
        p,
        f"cross_modal_image_layers.{i}",
        *(tokens, every, heads, 1e-12, words, real),
      ),
    )
  return words, tokens


def run(p, config, pixels, ids, length, keep=None) -> dict[str, np.ndarray]:
  """All that a release computes of one pair."""
  model = config.model

  def size(name):
    return model[name].num_heads, model[name].depth

  def project(name, x):
    x = _gelu(_norm(p, f"{name}.1", _linear(p, f"{name}.0", x)))
    x = _linear(p, f"{name}.3", x)
    return x / np.linalg.norm(x)

  frames, patches = vision(p, pixels, *size("vision"), keep)
  tokens = np.concatenate([frames, patches.reshape(-1, frames.shape[-1])])
  tokens = _linear(p, "cross_modal_image_transform", tokens)
  words = text(p, ids, length, *size("text"))
  words = _linear(p, "cross_modal_text_transform", words)
  count = len(frames)
  fused, seen = fuse(p, words, length, tokens, *size("fusion"))
  pooled = [
    np.tanh(_linear(p, f"cross_modal_{name}_pooler.dense", x))
    for name, x in (("text", fused[0]), ("image", seen[:count].mean(0)))
  ]
  hidden = _gelu(_linear(p, "mlm_score.transform.dense", fused))
  hidden = _norm(p, "mlm_score.transform.LayerNorm", hidden, 1e-12)
  return dict(
    image=project("vision_proj", tokens[:count].mean(0)),
    text=project("language_proj", words[0]),
    tokens=tokens,
    words=words[:length],
    fused=fused[:length],
    seen=seen,
    match=_linear(p, "itm_score.fc", np.concatenate(pooled)),
    logits=(hidden @ p["mlm_score.decoder.weight"].T + p["mlm_score.bias"])[
      :length
    ],
  )
