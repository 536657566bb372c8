"""Blockwise masks over a grid of patches (Bao et al. 2022, algorithm 1)."""

import jax
import jax.numpy as jnp

from vlp_jax.ops import layout, rng

_ATTEMPTS = 10  # at a block, before a mask is left as it is
_ASPECT = 0.3  # the least ratio of a block's sides; its inverse is the greatest


def draw(
  key: jax.Array,
  index: jax.Array,
  grid: tuple[int, int],
  most: int,
  least: int,
) -> jax.Array:
  """Draws masks, each example's from its own key.

  Blocks of random size, shape and place are added until `most` patches are
  hidden or ten attempts in a row hide no further one; never more than `most`.

  Args:
    key: the key of a stream at a step.
    index: int32 `[B]`, the examples' places in the global batch.
    grid: rows and columns of patches.
    most: number of patches that a mask should hide.
    least: the area that a block has at least, if as many are still to hide.

  Returns:
    bool `[B, N]`, True = hidden.
  """
  one = jax.vmap(lambda k: _one(k, grid, most, least))
  masks = layout.on_each_device(one, rng.per_example(key, index))
  return masks.reshape(len(index), -1)


def _one(key, grid, most, least) -> jax.Array:
  rows, columns = jnp.arange(grid[0])[:, None], jnp.arange(grid[1])[None]

  def unfinished(carry):
    mask, failures, _ = carry
    return (jnp.sum(mask) < most) & (failures < _ATTEMPTS)

  def attempt(carry):
    mask, failures, number = carry
    u = jax.random.uniform(jax.random.fold_in(key, number), (4,))
    left_over = most - jnp.sum(mask)
    area = least + (left_over - least) * u[0]
    log_ratio = jnp.log(_ASPECT) * (1 - 2 * u[1])
    sides = jnp.sqrt(area) * jnp.exp(jnp.array([0.5, -0.5]) * log_ratio)
    height, width = jnp.round(sides).astype(jnp.int32)
    # Corners are uniform over all places; a block as large as the grid is none.
    top = jnp.floor(u[2] * (grid[0] - height + 1)).astype(jnp.int32)
    left = jnp.floor(u[3] * (grid[1] - width + 1)).astype(jnp.int32)
    block = (rows >= top) & (rows < top + height)
    block &= (columns >= left) & (columns < left + width)
    new = jnp.sum(block & ~mask)
    fits = (height < grid[0]) & (width < grid[1])
    fits &= (new > 0) & (new <= left_over)
    mask = jnp.where(fits, mask | block, mask)
    return mask, jnp.where(fits, 0, failures + 1), number + 1

  empty = jnp.zeros(grid, bool)
  return jax.lax.while_loop(unfinished, attempt, (empty, 0, 0))[0]


def places(mask: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Lists the hidden patches of masks that hide at most `count`.

  Args:
    mask: bool `[B, N]`.
    count: K.

  Returns:
    int32 `[B, K]`, the hidden ones first, in order; and float32 `[B, K]`, 1
    where the patch is hidden.
  """
  order = jnp.argsort(~mask, axis=1, stable=True)[:, :count]
  hidden = jnp.take_along_axis(mask, order, axis=1)
  return order.astype(jnp.int32), hidden.astype(jnp.float32)
