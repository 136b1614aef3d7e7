"""The plain model behind tests/handwritten_programs: a causal language model of MLPs with a cumulative mean over the sequence."""

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, INNER, LAYERS, LENGTH = 11, 6, 8, 2, 8


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.up = nn.Linear(WIDTH, INNER, bias=True)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        y = F.gelu(self.up(self.norm(x)))
        counts = torch.arange(1, y.size(1) + 1, dtype=y.dtype)[:, None]
        return x + self.down(y.cumsum(1) / counts)


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, labels):
        """Sum of the losses of the tokens that count."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def build(tied=False, dtype=torch.float64):
    """The same weights every time."""
    torch.manual_seed(0)
    return Model(tied).to(dtype)


def batch(index):
    """One micro-batch of two rows: labels shifted, some not counting (a different number in each micro-batch)."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(VOCAB, (2, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, : 1 + index % 5] = -100
    labels[:, -1] = -100
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}
