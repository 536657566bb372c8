"""Binding: which attribute belongs to which object.

'a red circle and a blue square' against 'a blue circle and a red square'; of
clips, 'a red circle moves left and a blue star grows' against 'a red circle
grows and a blue star moves left'.
"""

from vlp_jax.evaluators import _probe


class Evaluator(_probe.Probe):
  """What `Probe` measures, on the records' `binding` pairs."""

  annotations = ("binding",)
