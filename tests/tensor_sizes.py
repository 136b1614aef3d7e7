"""A mode that notes the size of every tensor any operator makes, forward and backward: memory claims checked without measuring memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorSizes(TorchDispatchMode):
    """Inside, `largest` is the largest number of elements in one storage made by an operator; `counts` all of them by operator."""

    def __init__(self):
        super().__init__()
        self.made = []
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                self.made.append(x.untyped_storage().nbytes() // x.itemsize)
        return result

    @property
    def largest(self):
        return max(self.made, default=0)
