"""Make a small model of the same architecture, to try a run with: the first layers of a large one.

python create_mini_model.py --model_id meta-llama/Meta-Llama-3-8B-Instruct --output_id ./llama3_mini

Small enough for two CPU cores, with the tokenizer of a data set made by bookcorpus.py:

python create_mini_model.py --model_id llama3_8b --output_id ./llama3_mini --dataset_path ./stdlib_1K \
    --hidden_size 256 --num_attention_heads 8 --num_key_value_heads 2
"""

from __future__ import annotations

from dataclasses import dataclass

from seqloom.entry import run


@dataclass(frozen=True)
class Arguments:
    """Make a small model of the same architecture: 4 layers, the same widths unless given. `--debug` shows tracebacks."""

    model_id: str
    """A local folder, a name in configs/models, or a hub id. Weights are used where they are on this machine, never fetched."""
    output_id: str
    """Folder of the mini model."""
    num_layers: int = 4
    """Decoder layers, the first ones of the original."""
    hidden_size: int | None = None
    """Width of the residual stream; the MLP's width follows in proportion."""
    intermediate_size: int | None = None
    """Width of the MLP."""
    num_attention_heads: int | None = None
    """Query heads; the size of a head follows, and so do the key/value heads."""
    num_key_value_heads: int | None = None
    """Key/value heads."""
    vocab_size: int | None = None
    """Size of the vocabulary."""
    max_position_embeddings: int | None = None
    """Longest sequence the config allows."""
    tokenizer: str | None = None
    """A tokenizer (hub id or folder) to save with the model; it sets the size of the vocabulary."""
    dataset_path: str | None = None
    """A data set made by bookcorpus.py, whose tokenizer is saved with the model."""
    seed: int = 0
    """Seed of the random initial values."""
    overwrite: bool = False
    """Replace a model that is there."""


def main() -> int:
    """Parse, make, print."""
    import tyro

    args = vars(tyro.cli(Arguments, description=Arguments.__doc__))
    import dataclasses

    from seqloom.capture.mini_model import Sizes, create_mini_model

    sizes = Sizes(**{field.name: args.pop(field.name) for field in dataclasses.fields(Sizes)})
    made = create_mini_model(sizes=sizes, **args)
    print(f"{args['output_id']}: {made.parameters:,} parameters; {made.origin}")
    return 0


if __name__ == "__main__":
    run(main)
