"""The forward pass of plain models on a GPU, from fused operations: few launches, each byte moved once.

`conddetr.model` defines a model: modules with the official names, which users may hook, wrap or replace. The functions
here compute the same from the parameters of plain parts. Parts that are not plain are called as modules.
"""

from conddetr.model.fast.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
