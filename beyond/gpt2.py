"""Convert GPT-2 checkpoints between the published layout and this project's.

    python -m beyond.gpt2 gpt2 --out gpt2.pt        download (once), verify and convert
    python -m beyond.gpt2 FOLDER --out gpt2.pt      config.json and model.safetensors or
                                                    pytorch_model.bin -> checkpoint
    python -m beyond.gpt2 out/dpo-1.pt --out NEW    checkpoint -> folder, for transformers

Then: python train.py --init gpt2.pt. Published models: gpt2, gpt2-medium, gpt2-large and gpt2-xl.

The environment variable HF_ENDPOINT changes the address of the Hugging Face hub, which could not be
reached while this was developed: downloading was tested only against a local server with the same
layout, headers and failures.

Both layouts have the same weights, except that GPT-2 keeps the matrices of its blocks transposed.
What this file leaves out: tokenizers (a published model uses GPT-2's encoding), and weights that
are split over several files.
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from beyond.custom_model import read_checkpoint
from lib import cli
from lib.checkpoint import to_checkpoint
from lib.io import BadInput, atomic_write, cache_dir, file_lock, open_user_file
from model import GPT, GPTConfig

PUBLISHED = {
    "gpt2": GPTConfig(50257, 1024, 12, 12, 768),
    "gpt2-medium": GPTConfig(50257, 1024, 24, 16, 1024),
    "gpt2-large": GPTConfig(50257, 1024, 36, 20, 1280),
    "gpt2-xl": GPTConfig(50257, 1024, 48, 25, 1600),
}
SIZES = {  # our name: the name in config.json
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
FUNCTION = {  # settings of config.json under which GPT-2 computes what model.py computes
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers of old releases, and the output matrix, which is wte.weight.
IGNORED = re.compile(r".*\.attn\.(masked_)?bias|lm_head\.weight")


# ------------------------------------------------- download


class KeepHeaders(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the headers of the hub, which its CDN does not send."""

    def __init__(self):
        self.linked: dict[str, str] = {}

    def redirect_request(self, request, response, code, message, headers, url):
        self.keep(headers)
        return super().redirect_request(request, response, code, message, headers, url)

    def keep(self, headers):
        for name in ("X-Linked-Size", "X-Linked-ETag"):
            if headers[name]:
                self.linked.setdefault(name, headers[name])


def fetch(url: str, path: Path):
    """Download `url` to `path`, or the rest of it, and verify size and checksum. Raises BadInput.

    What has arrived is kept in PATH.part, so that the next call continues there.
    """
    part = path.with_name(f"{path.name}.part")
    have = max(0, part.stat().st_size - 1) if part.exists() else 0  # a range must not be empty
    headers = KeepHeaders()
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.build_opener(headers).open(request, timeout=60) as response:
            headers.keep(response.headers)
            if response.status != 206:  # the server sends everything
                have = 0
            size, checksum = promised(response.headers, headers.linked, have)
            write_part(response, part, have, size)
    except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: not a valid URL
        if getattr(e, "code", None) == 416:  # the part is longer than the file
            part.unlink()
        raise BadInput(f"{url}: download failed ({e}); repeat the command to continue") from e
    if part.stat().st_size < size:
        arrived = f"{part.stat().st_size:,} of {size:,} bytes arrived"
        raise BadInput(f"{url}: {arrived}; repeat the command to continue")
    if checksum_of(part, checksum) != checksum:
        part.unlink()
        raise BadInput(f"{url}: wrong checksum; the file was deleted: repeat the command")
    os.replace(part, path)


def promised(headers, linked: dict[str, str], have: int) -> tuple[int, str]:
    """The size and the checksum of a whole file, according to the hub's headers."""
    size = linked.get("X-Linked-Size") or have + int(headers["Content-Length"] or 0)
    tag = linked.get("X-Linked-ETag") or headers["ETag"] or ""
    found = re.fullmatch(r'(?:W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?', tag)
    if not found:
        raise OSError(f"the server's ETag {tag!r} is not a checksum")
    return int(size), found[1]


def write_part(response, part: Path, have: int, size: int):
    """Keep the first `have` bytes of the part, and append the response."""
    how = {"total": size, "initial": have, "unit": "B", "unit_scale": True}
    with open(part, "ab") as f, tqdm(desc=part.stem, **how) as bar:
        f.truncate(have)
        while block := response.read(1 << 20):
            f.write(block)
            bar.update(len(block))


def checksum_of(path: Path, like: str) -> str:
    """SHA-256, or Git's SHA-1 of a blob if `like` has 40 digits, as for small files."""
    with open(path, "rb") as f:
        if len(like) == 64:
            return hashlib.file_digest(f, "sha256").hexdigest()
        content = f.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def ensure_gpt2(name: str) -> Path:
    """The checkpoint of a published model, in the cache. It is downloaded once. Raises BadInput."""
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    checkpoint, folder = cache_dir() / f"{name}.pt", cache_dir() / name
    if checkpoint.exists():
        return checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder):
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).exists():
                fetch(f"{hub}/openai-community/{name}/resolve/main/{file}", folder / file)
        save(from_published(folder), checkpoint)
    shutil.rmtree(folder)
    return checkpoint


# ------------------------------------------------- published layout -> checkpoint


def from_published(folder: Path) -> dict:
    """The checkpoint of a folder in the published layout.

    Raises BadInput if it is not a complete GPT-2, or computes a different function from model.py's.
    """
    with open_user_file(folder / "config.json", "a config of GPT-2"):
        found = json.loads((folder / "config.json").read_bytes())
        check_function(found)
        config = {ours: found[theirs] for ours, theirs in SIZES.items()}
    with open_user_file(folder, "weights of GPT-2"):
        weights = {k.removeprefix("transformer."): w for k, w in read_weights(folder).items()}
        if not torch.equal(
            weights.get("lm_head.weight", weights["wte.weight"]), weights["wte.weight"]
        ):
            raise ValueError("its lm_head.weight differs from its wte.weight")
        weights = {name: w for name, w in weights.items() if not IGNORED.fullmatch(name)}
        check_sizes(config, weights)
        with torch.device("meta"):
            pi = GPT(GPTConfig(**config))
        pi.load_state_dict(transpose(weights), assign=True)
        if not all(w.isfinite().all() for w in pi.parameters()):
            raise ValueError("its weights are not finite")
    return to_checkpoint(pi, tokens=None)


def check_function(config: dict):
    """Raise ValueError if a config.json asks for something that model.py does not compute."""
    wanted = FUNCTION | {"vocab_size": PUBLISHED["gpt2"].vocab_size}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(f"its {name} is {config[name]!r}; only {value!r} is supported")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"its n_inner is {config['n_inner']}; only 4 n_embd is supported")
    if config["n_embd"] % config["n_head"]:
        raise ValueError("its n_embd is not a multiple of its n_head")


def check_sizes(config: dict, weights: dict[str, Tensor]):
    """Raise ValueError unless the weights have config.json's sizes, before these are used."""
    vocab_size, n_embd = weights["wte.weight"].shape
    n_layer = sum(name.endswith("ln_1.weight") for name in weights)
    context = len(weights["wpe.weight"])
    found = {"vocab_size": vocab_size, "n_embd": n_embd, "n_layer": n_layer, "context": context}
    for name, value in found.items():
        if config[name] != value:
            raise ValueError(f"{SIZES[name]} is {config[name]} in config.json, {value} in the file")


def transpose(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the matrices of the blocks from (in, out) to (out, in), or back. Float32."""
    return {
        name: (w.T if w.ndim == 2 and name.startswith("h.") else w).float().contiguous()
        for name, w in weights.items()
    }


def read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    if path.exists():
        return read_safetensors(path)
    path = folder / "pytorch_model.bin"
    if not path.exists():
        raise ValueError("there is neither model.safetensors nor pytorch_model.bin")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file of 8 bytes (n, little-endian), n bytes of JSON (name -> dtype, shape, offsets),
    and the numbers of all tensors."""
    content = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    weights = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        raw = torch.from_numpy(content[start + begin : start + end].copy())
        weights[name] = raw.view(DTYPES[about["dtype"]]).view(about["shape"])
    return weights


# ------------------------------------------------- checkpoint -> published layout


def to_published(checkpoint: dict, folder: Path):
    """Write config.json and model.safetensors, which transformers loads as GPT2LMHeadModel."""
    if checkpoint["config"].get("bias_scale"):
        raise BadInput("the model has a bias for each token's logit, which GPT-2's layout lacks")
    end = checkpoint["config"]["vocab_size"] - 1
    config = FUNCTION | {theirs: checkpoint["config"][ours] for ours, theirs in SIZES.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end, "eos_token_id": end}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(transpose(checkpoint["weights"]), folder / "model.safetensors")
    atomic_write(folder / "config.json", json.dumps(config, indent=1).encode())


def write_safetensors(weights: dict[str, Tensor], path: Path):
    """The inverse of `read_safetensors`, for float32."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, w in weights.items():
        offsets = [offset, offset + w.nbytes]
        header[name] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": offsets}
        offset += w.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = b"".join(w.numpy().tobytes() for w in weights.values())
    atomic_write(path, len(text).to_bytes(8, "little") + text + numbers)


def save(checkpoint: dict, path: Path):
    """Write a checkpoint completely or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        torch.save(checkpoint, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch raises RuntimeError when the disk is full
        raise BadInput(f"{path}: cannot be written ({e})") from e
    finally:
        part.unlink(missing_ok=True)


def load_model(source: str) -> dict:
    """The checkpoint in a file, or that of a published model, given by name or as a folder.

    Raises BadInput.
    """
    if Path(source).is_file():
        return read_checkpoint(Path(source))
    if source in PUBLISHED:
        return read_checkpoint(ensure_gpt2(source))
    if Path(source).is_dir():
        return from_published(Path(source))
    raise BadInput(f"{source}: is not a checkpoint, a folder, or one of {', '.join(PUBLISHED)}")


def resize_context(checkpoint: dict, context: int) -> dict:
    """Change the context. New positions start as zero vectors."""
    weight = checkpoint["weights"]["wpe.weight"]
    if context > len(weight):
        print(f"the model has {len(weight)} positions; the others, up to {context}, start as zeros")
    weight = F.pad(weight, (0, 0, 0, context - len(weight)))  # a negative pad cuts
    config = checkpoint["config"] | {"context": context}
    weights = checkpoint["weights"] | {"wpe.weight": weight}
    return checkpoint | {"config": config, "weights": weights}


# ------------------------------------------------- the command line


def convert(source: str, out: Path | None) -> str:
    """Convert in the direction that `source` asks for, and return what to do next."""
    if out is not None and out.exists():
        raise BadInput(f"{out}: already exists; choose another --out")
    if source in PUBLISHED:
        path = ensure_gpt2(source)
        if out is not None:
            shutil.copyfile(path, out)
        return f"next: python train.py --init {out or path}"
    if out is None:
        raise BadInput("--out is needed")
    if Path(source).is_file():
        to_published(read_checkpoint(Path(source)), out)
        return f"{out}: for GPT2LMHeadModel.from_pretrained; the tokenizer is not part of it"
    save(load_model(source), out)
    return f"next: python train.py --init {out}"


def main(argv: list[str]) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="beyond.gpt2", description=__doc__, formatter_class=style)
    parser.add_argument("source", help=f"{', '.join(PUBLISHED)}, a folder, or a checkpoint")
    parser.add_argument("--out", type=Path, help="what to write; it must not exist")
    args = parser.parse_args(argv)
    try:
        print(convert(args.source, args.out))
    except (BadInput, OSError) as e:
        print(f"beyond.gpt2: {' '.join(str(e).split())[:500]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
