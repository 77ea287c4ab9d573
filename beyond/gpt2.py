"""GPT-2's published checkpoints made ours, and ours made folders that transformers loads as GPT2LMHeadModel.

    python -m beyond.gpt2 IN OUT

    IN                                                          OUT
    a folder: config.json, and the weights in pytorch_model.bin,
    model.safetensors, or the shards that either's index lists  a checkpoint, for `python train.py --init OUT`
    a checkpoint: reference.pt or dpo-BETA.pt of a run          a folder: config.json, and model.safetensors where the
                                                                library safetensors is installed, else pytorch_model.bin

The weights have one name in both, and one difference: GPT-2's Conv1D keeps a block's matrices as (in, out), nn.Linear as
(out, in). Published names may begin with `transformer.`; `lm_head.weight` may be there if it is `wte.weight`; causal masks
(`attn.bias`, `attn.masked_bias`) are left out. float16 and bfloat16 become float32. All four sizes do, and fine-tuned models
whose config.json asks for the same function; what asks for another is refused.

What this file does not do: convert tokenizers. A published model is taken to use GPT-2's encoding; a checkpoint with a learned
one becomes a folder of weights alone, which reads this project's ids. And nothing from IN is ever executed.
"""
import argparse
import json
import os
import secrets
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from kit import checkpoints, terminal, tokens
from kit.files import BadInput, reading
from model import GPT, GPTConfig

PUBLISHED = {size: GPTConfig(50257, 1024, n_layer, n_head, n_embd) for size, n_layer, n_head, n_embd in (
    ("124M", 12, 12, 768), ("355M", 24, 16, 1024), ("774M", 36, 20, 1280), ("1558M", 48, 25, 1600))}
SIZES = dict(vocab_size="vocab_size", context="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
FUNCTION = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None, scale_attn_weights=True,
                scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True)     # model.py's


def transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """From (in, out) to (out, in) or back, in float32. It empties its argument, so that only one weight is held twice."""
    return {name: (w.T if w.ndim == 2 and name.startswith("h.") else w).float().contiguous()
            for name in list(weights) for w in [weights.pop(name)]}


# ----------------------------------------------------------------------------- published -> ours

def from_published(folder: Path) -> dict:
    """The folder's model, as `checkpoints.checkpoint` makes it. Errors: BadInput for what is not wholly a GPT-2."""
    with reading(path := folder / "config.json", "a config of GPT-2"):
        config = config_of(json.loads(path.read_bytes()))
    with reading(folder, "weights of GPT-2"):
        found, size = read_weights(folder)
        found = {name.removeprefix("transformer."): w for name, w in found.items()
                 if not name.endswith((".attn.bias", ".attn.masked_bias"))}
        if "lm_head.weight" in found and not torch.equal(found.pop("lm_head.weight"), found["wte.weight"]):
            raise ValueError("its lm_head.weight is not its wte.weight, as it is in model.py")
        if config.n_layer > len(found) or sum(w.nbytes for w in found.values()) > size:
            raise ValueError("the sizes in config.json are not those of the weights")
        with torch.device("meta"):
            pi = GPT(config)
        wanted = transposed(pi.state_dict())                    # on the meta device: shapes alone
        if wrong := [name for name in wanted if name not in found or found[name].shape != wanted[name].shape]:
            raise ValueError(f"{wrong[0]} is missing, or not {tuple(wanted[wrong[0]].shape)} as config.json has it")
        if wrong := sorted(found.keys() - wanted.keys()):
            raise ValueError(f"{wrong[0]} is no weight of a GPT-2 with the sizes in config.json")
        for name, w in found.items():
            if w.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not w.isfinite().all():
                raise ValueError(f"{name} ({w.dtype}) is not of finite numbers of 16 or 32 bits")
        pi.load_state_dict(transposed(found), assign=True)
    return checkpoints.checkpoint(pi, None)


def config_of(found: dict) -> GPTConfig:
    """Sizes from a config.json. Errors: ValueError if it asks for another function than model.py's, or another vocabulary."""
    if "model_type" not in found or [name for name in SIZES.values() if type(found.get(name)) is not int or found[name] < 1]:
        raise ValueError(f"it needs a model_type, and whole numbers {', '.join(SIZES.values())} above 0")
    config = GPTConfig(**{ours: found[name] for ours, name in SIZES.items()})
    for name, value in FUNCTION.items():
        if (has := found.get(name, value)) != value and (name, has) != ("n_inner", 4 * config.n_embd):
            raise ValueError(f"its {name} is {json.dumps(has):.40}, and only {json.dumps(value)} is known here")
    if config.n_embd % config.n_head:
        raise ValueError("its n_embd is no multiple of its n_head")
    if config.vocab_size != 50257:
        raise ValueError(f"its vocabulary of {config.vocab_size:,} is not GPT-2's 50,257")
    return config


def read_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors by name, and the bytes of the files that hold them. Errors: BadInput, ValueError, what a parser raises."""
    for name, load in (("pytorch_model.bin", load_pickled), ("model.safetensors", load_safetensors)):
        files = [name] if (folder / name).exists() else []
        if (index := folder / f"{name}.index.json").exists() and not files:
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if any(Path(file).name != file for file in files):
                raise ValueError(f"{index.name} names a file outside the folder")
        if files:
            found = {name: w for file in files for name, w in load(folder / file).items()}
            return found, sum((folder / file).stat().st_size for file in files)
    raise ValueError("there is neither pytorch_model.bin nor model.safetensors, nor an index of their shards")


def load_pickled(path: Path) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):                                # it is not in files of torch before 1.6
        with zipfile.ZipFile(path) as f:
            if sum(entry.file_size for entry in f.infolist()) > path.stat().st_size:
                raise ValueError(f"{path.name} is compressed, and torch.save does not compress")
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(w, Tensor) for w in found.values()):
        raise ValueError(f"{path.name} holds no tensors by name")
    return found


def load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise BadInput(f"{path}: needs the library safetensors (pip install safetensors), or a pytorch_model.bin instead") from None
    return load_file(path)


# ----------------------------------------------------------------------------- ours -> published

def write_published(found: dict, folder: Path):
    """A checkpoint as config.json and weights, in a new folder; it empties found["weights"]."""
    end = tokens.tokenizer_of(found["tokens"]).eot_token
    config = FUNCTION | {name: found["config"][ours] for ours, name in SIZES.items()} | dict(
        architectures=["GPT2LMHeadModel"], bos_token_id=end, eos_token_id=end, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    weights = transposed(found["weights"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    try:
        from safetensors.torch import save_file
    except ImportError:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")       # the library's files are their owner's alone


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A name for a file or folder that is `out` once it is written, and gone if it cannot be. Errors: BadInput."""
    part = out.with_name(f"{out.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        for path in part.iterdir() if part.is_dir() else [part]:
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        os.rename(part, out)
    except Exception as e:          # torch's and safetensors' writers have errors of their own for a full disk
        raise BadInput(f"{out}: cannot be written ({getattr(e, 'strerror', None) or e}); "
                       "name one in a folder that has room") from None
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def convert(source: Path, out: Path) -> str:
    """Either direction; what was done, in a line or two. Errors: BadInput, and then there is no `out`."""
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists already; name another, or remove it")
    published = source.is_dir()
    found = from_published(source) if published else checkpoints.read_checkpoint(source)
    said = "{n_layer} layers, {n_head} heads, width {n_embd}, context {context}, {vocab_size:,} tokens".format(**found["config"])
    number = sum(w.numel() for w in found["weights"].values())
    with appearing(out) as part:
        if published:
            torch.save(found, part)
        else:
            write_published(found, part)
    tokenizer = "it is GPT-2's own" if found["tokens"] is None else "it is this project's, learned from texts"
    then = f"python train.py --init {out}" if published else f"no tokenizer files are written: {tokenizer}"
    return f"{out}: {number:,} parameters ({said})\n{then}"


def main(argv: list[str]) -> int:
    parser = terminal.Parser(prog="gpt2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="a published folder, or a checkpoint of this project")
    parser.add_argument("out", metavar="OUT", type=Path, help="the checkpoint or folder to write; it must not exist")
    args = parser.parse_args(argv)
    try:
        print(convert(args.source, args.out))
    except (BadInput, MemoryError) as e:
        print("gpt2.py:", " ".join(str(e).split())[:500] or "out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpt2.py: interrupted; {args.out} was not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
