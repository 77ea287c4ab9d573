"""A model and its tokenizer as a file, and back; nothing in such a file is executed."""
import dataclasses
import io
from pathlib import Path

import torch

from kit.files import reading
from kit.tokens import tokenizer_of
from model import GPT, GPTConfig


def checkpoint(pi: GPT, tokens: list[bytes] | None, **more: object) -> dict:
    """A model with its tokenizer, to be saved; `tokens` is None for GPT-2's encoding."""
    return dict(config=dataclasses.asdict(pi.config), tokens=tokens, weights=pi.state_dict(), **more)


def read_checkpoint(path: Path) -> dict:
    """What `checkpoint` made. Nothing in the file is executed. Errors: BadInput for a file that does not hold a whole model."""
    with reading(path, "a checkpoint of this project"):
        content = path.read_bytes()
        if content[:2] != b"PK":
            raise ValueError("it is not a file of torch.save")
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        config, weights = GPTConfig(**found["config"]), found["weights"]
        if config.n_layer > len(weights) or sum(w.nbytes for w in weights.values()) > len(content):
            raise ValueError("its sizes are not those of its weights")
        if min(config.n_layer, config.n_head) < 1 or config.n_embd % config.n_head:
            raise ValueError("its n_layer or n_head cannot be")
        with torch.device("meta"):
            wanted = GPT(config).state_dict()
        if {name: (w.shape, w.dtype) for name, w in weights.items()} != {name: (w.shape, w.dtype) for name, w in wanted.items()}:
            raise ValueError("its weights are not those of its config")
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("its weights are not finite")
        if (tokens := found["tokens"]) is not None and (
                len(set(tokens)) < len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens)):
            raise ValueError("its tokenizer needs each of the 256 bytes, and no token twice")
        if tokenizer_of(tokens).n_vocab != config.vocab_size:
            raise ValueError("its tokenizer is of another size than the model")
        return found


def load(found: dict, device: torch.device) -> GPT:
    """The model of a checkpoint."""
    pi = GPT(GPTConfig(**found["config"])).to(device)
    pi.load_state_dict(found["weights"])
    pi.bf16 = bf16_pays(device)
    return pi


def bf16_pays(device: torch.device) -> bool:
    """Whether matrix products are much faster in bfloat16 here: on GPUs, and on CPUs with units for it."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
