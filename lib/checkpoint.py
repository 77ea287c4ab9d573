"""A model and its tokenizer as a dictionary, which `torch.save` writes to a file."""

import dataclasses

from lib.optim import bf16_supported
from model import GPT, GPTConfig


def to_checkpoint(pi: GPT, tokens: list[bytes] | None) -> dict:
    """tokens: those of the tokenizer, as `data.load_tokenizer` takes them."""
    config = dataclasses.asdict(pi.config)
    return {"config": config, "tokens": tokens, "weights": pi.state_dict()}


def load_gpt(checkpoint: dict, device) -> GPT:
    """The model of a checkpoint. It computes in bfloat16 where that is faster."""
    pi = GPT(GPTConfig(**checkpoint["config"]))
    pi.load_state_dict(checkpoint["weights"])
    pi.bf16 = bf16_supported(device) and pi.config.n_embd >= 128  # slower for smaller models
    return pi.to(device)
