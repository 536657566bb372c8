"""Relation: which object stands where.

'a red circle left of a blue square' against 'a blue square left of a red
circle'.
"""

from vlp_jax.evaluators import _probe


class Evaluator(_probe.Probe):
  """What `Probe` measures, on the records' `relation` pairs."""

  annotations = ("relation",)
