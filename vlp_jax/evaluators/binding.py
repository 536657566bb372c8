"""Binding: which attribute belongs to which object.

'a red circle and a blue square' against 'a blue circle and a red square'.
"""

from vlp_jax.evaluators import _probe


class Evaluator(_probe.Probe):
  """What `Probe` measures, on the records' `binding` pairs."""

  annotation = "binding"
