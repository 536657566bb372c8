"""Greedy decoding against a plain loop."""

import jax
import numpy as np
import pytest

from vlp_jax.ops import decoding

BOS, EOS, PAD, VOCAB = 2, 3, 0, 9


def _table(seed, end):
  """Logits of the next token by place, by the sum so far, by the last token."""
  table = np.random.default_rng(seed).normal(size=(12, 7, VOCAB, VOCAB))
  table[..., BOS] += 5  # tempt it with what may never be chosen
  table[..., EOS] += end
  return table.astype(np.float32)


def _loop(table, start, max_len):
  ids, total = [BOS], start
  while len(ids) < max_len:
    total = (total + ids[-1]) % 7
    logits = table[len(ids) - 1, total, ids[-1]].copy()
    logits[BOS] = -np.inf
    token = int(logits.argmax())
    token = EOS if len(ids) == max_len - 1 else token
    ids.append(token)
    if token == EOS:
      break
  return ids + [PAD] * (max_len - len(ids))


@pytest.mark.parametrize("max_len", [2, 5, 12])
@pytest.mark.parametrize("end", [-9.0, 0.5, 9.0])
def test_greedy(max_len, end):
  table, start = _table(0, end), np.arange(6)

  def step(total, token, t):
    total = (total + token) % 7
    return jax.numpy.asarray(table)[t, total, token], total

  ids = jax.jit(
    lambda cache: decoding.greedy(
      step, cache, len(start), max_len, bos_id=BOS, eos_id=EOS
    )
  )(start)
  assert ids.dtype == np.int32
  expected = [_loop(table, s, max_len) for s in start]
  np.testing.assert_array_equal(ids, expected)


def test_it_stops_when_all_have_ended():
  calls, tokens = [], np.array([5, 6])

  def step(cache, token, t):
    jax.debug.callback(lambda t: calls.append(int(t)), t)
    return jax.nn.one_hot(jax.numpy.where(t < 2, tokens, EOS), VOCAB), cache

  decoding.greedy(step, (), 2, 12, bos_id=BOS, eos_id=EOS).block_until_ready()
  jax.effects_barrier()
  assert calls == [0, 1, 2]
