"""Operators: how a user registers one, what PyTorch's own mean in the annotation language, and the check that both tell the truth."""

from seqloom.ops.registry import register_op

__all__ = ["register_op"]
