"""A look at what a model has learned: it continues a prompt.

In: a folder that transformers can load, such as `ckpt_merger.py --hf_output` writes, with its tokenizer. Out: text, piece by piece as it is
made. The work is transformers' `generate`; nothing here is needed to train.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seqloom.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: at `temperature` 0 the likeliest; else drawn with `seed`, of the `top_k` likeliest and of those that make up
    the probability `top_p`.
    """

    max_new_tokens: int
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if not self.temperature >= 0:
            raise UserError(f"--temperature is {self.temperature}: it cannot be negative; 0 takes the likeliest token")
        if self.top_k < 0:
            raise UserError(f"--top_k is {self.top_k}: it cannot be negative; 0 allows every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p is {self.top_p}: give a probability above 0, at most 1")


def run(folder: Path, prompt: str, sampling: Sampling, chat: bool = False) -> None:
    """Print the prompt and what the model writes after it, while it writes. With `chat` the prompt is a message for the chat template.

    Raises `UserError` for a folder that cannot be loaded.
    """
    from transformers import TextStreamer

    model, tokenizer = load(folder)
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"the tokenizer in {folder} has no chat template: leave --chat out")
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    generate(model, tokenizer, prompt, sampling, TextStreamer(tokenizer))


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, in the dtype of its weights, on a GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model for transformers: write one with `python ckpt_merger.py --hf_output {folder} ...`")
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"transformers cannot load {folder} ({reason}): merge the checkpoint again with --hf_output") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling, streamer: object | None = None
) -> str:
    """The prompt and its continuation as text, the same every time for the same sampling."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    if not inputs["input_ids"].numel():
        raise UserError("--prompt has no token: give some text to continue")
    torch.manual_seed(sampling.seed)
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    output = model.generate(
        **{name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")},
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=streamer,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )
    return tokenizer.decode(output[0])
