"""The models in NumPy, float64, as their papers write them."""

import math

import numpy as np

_erf = np.vectorize(math.erf)
ACTIVATIONS = {
  "gelu": lambda x: x * (1 + _erf(x / 2**0.5)) / 2,
  "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
  "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def layer_norm(p, x, epsilon=1e-5):
  """Layer norm."""
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
  return x * p["scale"] + p["bias"]


def attention(q, k, v, mask=None):
  """`[T, N, H]`, `[S, N, H]` twice, bool `[T, S]`: `[T, N, H]` and weights."""
  scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
  if mask is not None:
    scores = np.where(mask, scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("nts,snh->tnh", weights, v), weights


def linear(p, x, inputs=1):
  """A dense layer whose kernel's first `inputs` axes are summed over."""
  out = np.tensordot(x, p["kernel"], inputs)
  return out + p["bias"] if "bias" in p else out


def mlp(p, x, activation):
  """Two matrices and what is between them."""
  return linear(p["down"], ACTIVATIONS[activation](linear(p["up"], x)))


def block(p, x, mask, context, context_mask, activation, cross_mlp):
  """A pre-norm block on one sequence `[T, D]`."""
  qkv = linear(p["self_attention"]["qkv"], layer_norm(p["self_norm"], x))
  heads, _ = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], mask)
  x = x + linear(p["self_attention"]["out"]["proj"], heads, 2)
  if context is not None:
    if cross_mlp:
      x = x + mlp(p["self_mlp"], layer_norm(p["self_mlp_norm"], x), activation)
    cross = p["cross_attention"]
    q = linear(cross["q"], layer_norm(p["cross_norm"], x))
    kv = linear(cross["kv"], layer_norm(p["context_norm"], context))
    heads, _ = attention(q, kv[:, 0], kv[:, 1], context_mask)
    x = x + linear(cross["out"]["proj"], heads, 2)
  return x + mlp(p["mlp"], layer_norm(p["mlp_norm"], x), activation)


def post_norm_block(p, x, mask, context, context_mask, epsilon):
  """BERT's block with GELU on one sequence `[T, D]`; a context or None."""

  def add(norm, branch):
    return layer_norm(p[norm], x + branch, epsilon)

  own = p["self_attention"]
  qkv = linear(own["qkv"], x)
  heads, _ = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], mask)
  x = add("self_norm", linear(own["out"]["proj"], heads, 2))
  if context is not None:
    cross = p["cross_attention"]
    kv = linear(cross["kv"], context)
    heads, _ = attention(
      linear(cross["q"], x), kv[:, 0], kv[:, 1], context_mask
    )
    x = add("cross_norm", linear(cross["out"]["proj"], heads, 2))
  return add("mlp_norm", mlp(p["mlp"], x, "gelu"))


def transformer(
  p,
  x,
  mask=None,
  context=None,
  context_mask=None,
  *,
  activation="gelu",
  cross_mlp=False,
):
  """A stack whose layers lie along each leaf's first axis."""
  layers = p["layers"]
  for i in range(len(layers["self_norm"]["scale"])):
    layer = pick(layers, i)
    x = block(layer, x, mask, context, context_mask, activation, cross_mlp)
  return x


def pick(tree, i):
  """One layer of a stack's parameters."""
  if isinstance(tree, dict):
    return {name: pick(leaf, i) for name, leaf in tree.items()}
  return np.asarray(tree[i], np.float64)


def attention_pool(p, tokens):
  """Learned queries over `[N, C]`; returns `[Q, D]`."""
  tokens = layer_norm(p["token_norm"], tokens)
  q = linear(p["q"], layer_norm(p["query_norm"], p["query"]))
  heads, _ = attention(q, linear(p["k"], tokens), linear(p["v"], tokens))
  return linear(p["out"], heads, 2)


def unit(x):
  """Scales the last axis to length 1."""
  return x / np.linalg.norm(x, axis=-1, keepdims=True)
