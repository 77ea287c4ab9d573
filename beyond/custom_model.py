"""Read a checkpoint file and check it. `train.py --init FILE` uses this."""

from pathlib import Path

import torch

from data import load_tokenizer
from lib.io import open_user_file
from model import GPT, GPTConfig


def read_checkpoint(path: Path) -> dict:
    """Read and check a checkpoint file, without executing code. Weights become float32.

    Raises BadInput if the file does not hold a complete model.
    """
    with open_user_file(path, "a checkpoint of this project"):
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("value", found)  # a stage's file has a model as its value
        weights = {name: weight.float() for name, weight in found["weights"].items()}
        config = found["config"]
        if config["n_layer"] > len(weights) or config["n_embd"] % config["n_head"]:
            raise ValueError("its config and weights do not match")
        with torch.device("meta"):  # checks names and shapes, and allocates nothing
            GPT(GPTConfig(**config)).load_state_dict(weights, assign=True)
        if load_tokenizer(found["tokens"]).n_vocab != config["vocab_size"]:
            raise ValueError("its tokenizer does not have the model's vocabulary size")
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("its weights are not finite")
        return {"config": config, "tokens": found["tokens"], "weights": weights}
