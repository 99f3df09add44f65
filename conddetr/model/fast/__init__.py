"""The forward pass of plain models on a GPU, from fused operations: few launches, each byte moved once.

What a model is stays in `conddetr.model`: modules with the official names, that anybody may hook, wrap or replace. Here
are functions that compute the same from the parameters of parts that are no more than their classes say. Whoever is
more is called as the module that it is.
"""

from conddetr.model.fast.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
