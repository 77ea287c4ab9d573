"""beyond/gpt2.py: both layouts hold the same function, and downloads are complete or refused.

The published side is made by hand: a forward pass that names and multiplies the weights as OpenAI
released them, and a local server with the hub's paths, headers and redirects.
"""

import hashlib
import json
import math
import re
import struct
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiktoken
import tiny
import torch
import torch.nn.functional as F

import data
import train
from beyond import gpt2
from lib.checkpoint import load_gpt
from lib.io import BadInput
from model import GPT, GPTConfig

V = 50257
CONFIG = dict(model_type="gpt2", vocab_size=V, n_positions=40, n_layer=2, n_head=2, n_embd=8,
              activation_function="gelu_new", layer_norm_epsilon=1e-5)  # fmt: skip


torch.manual_seed(0)
W = gpt2.transpose(GPT(GPTConfig(V, context=40, n_layer=2, n_head=2, n_embd=8)).state_dict())
W = {name: 0.4 * torch.randn(w.shape) for name, w in W.items()}
IDS = torch.randint(0, V, (12,), generator=torch.Generator().manual_seed(1))


def forward(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """GPT-2's logits (T, V), position by position and head by head."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x, hs = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)], 4
    for i in range(2):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        heads = []
        for head in (slice(0, hs), slice(hs, 2 * hs)):
            scores = [k[: t + 1, head] @ q[t, head] / math.sqrt(hs) for t in range(len(ids))]
            heads.append(torch.stack([s.softmax(0) @ v[: len(s), head] for s in scores]))
        x = x + linear(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


# As GPT2LMHeadModel.state_dict() has it: a prefix, the tied output matrix, and masks.
STATE_DICT = {f"transformer.{name}": w for name, w in W.items()}
STATE_DICT |= {f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
STATE_DICT["lm_head.weight"] = W["wte.weight"]


def publish(folder, weights=W, config=CONFIG, file="pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write = gpt2.write_safetensors if file == "model.safetensors" else torch.save
    write(weights, folder / file)
    return folder


def run(*argv) -> int:
    return gpt2.main([str(arg) for arg in argv])


@torch.no_grad()
def logits(init: Path | str) -> torch.Tensor:
    """Of the model that train.py --init starts from."""
    found = train.initial_model(train.Config(init=str(init), context=24))
    return load_gpt(found, tiny.CPU)(IDS[None])[0]


def assert_published(init: Path | str, w: dict[str, torch.Tensor] = W):
    torch.testing.assert_close(logits(init), forward(w, IDS), atol=1e-4, rtol=0)


assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
BYTES = [bytes([b]) for b in range(256)]
ENCODING = data.load_tokenizer([*BYTES, *(b"\xff\xff%d" % i for i in range(256, V - 1))])


@pytest.fixture(autouse=True)
def encoding(monkeypatch):
    """GPT-2's encoding without a download: its size, and its bytes."""
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: ENCODING)


# ------------------------------------------------- conversion


@pytest.mark.parametrize(
    "weights, file",
    [
        (STATE_DICT, "pytorch_model.bin"),
        (W, "model.safetensors"),
        ({name: w.half() for name, w in W.items()}, "pytorch_model.bin"),
    ],
    ids=["state_dict", "safetensors", "float16"],
)
def test_the_converted_model_computes_the_published_function(weights, file, tmp_path):
    """A folder in any published layout, and its checkpoint => GPT-2's logits, to 1e-4."""
    assert run(publish(tmp_path / "in", weights, file=file), "--out", tmp_path / "gpt2.pt") == 0
    assert forward(W, IDS).std() > 0.5
    for init in ("in", "gpt2.pt"):
        plain = {name.removeprefix("transformer."): w.float() for name, w in weights.items()}
        assert_published(tmp_path / init, plain)


def test_safetensors_of_16_and_32_bits_are_read(tmp_path):
    """A file made by hand: 8 bytes of length, JSON, numbers in the order of the offsets."""
    values = torch.tensor([[1.5, -2.0, 0.25]])
    weights = {"BF16": values.bfloat16(), "F16": values.half(), "F32": values}
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, w in weights.items():
        offsets = [len(content), len(content) + w.nbytes]
        header[name] = {"dtype": name, "shape": [1, 3], "data_offsets": offsets}
        content += bytes(w.view(torch.uint8).flatten().tolist())
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + content)
    assert_equal(gpt2.read_safetensors(tmp_path / "file"), weights)


def test_a_checkpoint_survives_the_round_trip(tmp_path, capsys):
    """published -> ours -> published -> ours => the same bits, and the published config."""
    publish(tmp_path / "in")
    for source, out in (("in", "a.pt"), ("a.pt", "folder"), ("folder", "b.pt")):
        assert run(tmp_path / source, "--out", tmp_path / out) == 0
    assert "the tokenizer is not part of it" in capsys.readouterr().out
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "ab")
    assert first["config"] == second["config"] and first["tokens"] is second["tokens"] is None
    assert_equal(first["weights"], second["weights"])
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert CONFIG.items() <= config.items() and config["eos_token_id"] == V - 1


def test_transformers_computes_the_same_logits(tmp_path):
    """GPT2LMHeadModel -> ours -> GPT2LMHeadModel => the same function, to within 1e-4."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=40, n_layer=3, n_head=4, n_embd=32)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "in")
    for source, out in (("in", "ours.pt"), ("ours.pt", "again")):
        assert run(tmp_path / source, "--out", tmp_path / out) == 0
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
        torch.testing.assert_close(logits(tmp_path / "ours.pt"), expected, atol=1e-4, rtol=0)
        assert_equal(again(IDS[None]).logits[0], expected)


# ------------------------------------------------- download


class Hub(BaseHTTPRequestHandler):
    """The hub's paths: a CDN for weights, and ways to fail."""

    def do_GET(self):
        hub, file = self.server, self.path.rsplit("/", 1)[1]
        content, range_ = hub.files[file], self.headers["Range"]
        hub.requests.append((self.path, range_))
        code, body, headers = 200, content, {}
        if hub.failure == "404":
            code, body = 404, b""
        elif file == "config.json":
            headers["ETag"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        elif self.path.startswith("/cdn/"):
            headers["ETag"] = "of the CDN"
            if hub.failure == "wrong bytes":
                body = b"wrong" + body[5:]
            if range_ and hub.failure != "no ranges":
                code, body = 206, body[int(re.search(r"\d+", range_)[0]) :]
        else:
            code, body, headers["Location"] = 302, b"", f"/cdn/{file}"
            if hub.failure != "no checksum":
                headers["X-Linked-Size"] = len(content)
                headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send_response(code)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        dropped = hub.failure == "dropped" and file != "config.json"
        self.wfile.write(body[: len(body) // 2] if dropped else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = publish(tmp_path / "published", file="model.safetensors")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        server.failure, server.requests = None, []
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield server
        server.shutdown()


def test_a_name_is_downloaded_once_and_converted(hub, tmp_path, capsys):
    """Hub and CDN => the published function; later calls need no hub."""
    assert run("gpt2", "--out", tmp_path / "a.pt") == 0
    assert f"next: python train.py --init {tmp_path / 'a.pt'}\n" == capsys.readouterr().out
    assert len(hub.requests) == 3
    hub.failure = "404"
    assert run("gpt2") == 0
    for init in (tmp_path / "a.pt", "gpt2"):
        assert_published(init)
    assert len(hub.requests) == 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["gpt2.pt"]


@pytest.mark.parametrize(
    "failure, then, says",
    [
        ("dropped", None, "bytes arrived; repeat the command to continue"),
        ("dropped", "no ranges", "bytes arrived; repeat the command to continue"),
        ("404", None, "HTTP Error 404"),
        ("wrong bytes", None, "wrong checksum"),
        ("no checksum", None, "is not a checksum"),
    ],
)
def test_a_failed_download_gives_one_line_and_can_be_repeated(
    failure, then, says, hub, tmp_path, capsys
):
    """A failure => no model. After a dropped connection, the second call asks for the last byte
    that arrived and the rest, and reads everything if the server cannot send ranges."""
    hub.failure = failure
    assert run("gpt2", "--out", tmp_path / "a.pt") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("beyond.gpt2: http://127.0.0.1") and says in error
    assert not list(tmp_path.glob("**/*.pt"))
    parts = [path.stat().st_size for path in tmp_path.glob("**/*.safetensors.part")]
    half = len(hub.files["model.safetensors"]) // 2
    assert parts == ([half] if failure == "dropped" else [])
    hub.failure = then
    assert run("gpt2", "--out", tmp_path / "a.pt") == 0
    assert hub.requests[-1] == ("/cdn/model.safetensors", f"bytes={half - 1}-" if parts else None)
    assert_published(tmp_path / "a.pt")


def test_a_part_that_has_all_bytes_is_kept(hub, tmp_path):
    """A process that stopped before it renamed the part => one byte is read again."""
    content = hub.files["model.safetensors"]
    part = tmp_path / "cache" / "gpt2" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    assert run("gpt2") == 0
    assert hub.requests[-1] == ("/cdn/model.safetensors", f"bytes={len(content) - 1}-")
    assert_published("gpt2")


# ------------------------------------------------- refusals


BAD = {  # what is wrong: changes to the config, the weights, what the line says
    "another architecture": ({"model_type": "llama"}, W, "its model_type is 'llama'"),
    "exact GELU": ({"activation_function": "gelu"}, W, "only 'gelu_new' is supported"),
    "MLP width": ({"n_inner": 16}, W, "its n_inner is 16"),
    "heads": ({"n_head": 3}, W, "not a multiple of its n_head"),
    "absurd layers": ({"n_layer": 10**12}, W, "n_layer is 1000000000000 in config.json, 2 in the"),
    "no size": ({"n_head": None}, W, "cannot be read as a config of GPT-2"),
    "missing": ({}, dict(list(W.items())[:-1]), 'Missing key(s) in state_dict: "ln_f.bias"'),
    "transposed": ({}, gpt2.transpose(W), "size mismatch for h.0.attn.c_attn.weight"),
    "untied": ({}, W | {"lm_head.weight": torch.ones(V, 8)}, "lm_head.weight differs"),
    "not finite": ({}, W | {"ln_f.bias": torch.full((8,), math.nan)}, "not finite"),
    "no weights": ({}, None, "there is neither model.safetensors nor pytorch_model.bin"),
    "code": ({}, W | {"ln_f.bias": tiny.Executed()}, "cannot be read as weights of GPT-2"),
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(*argv): the one line with which the command refuses. It writes nothing."""
    publish(tmp_path / "in")
    monkeypatch.chdir(tmp_path)

    def refused(*argv) -> str:
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("beyond.gpt2: ") and error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
        return error

    return refused


@pytest.mark.parametrize("what", BAD)
def test_a_folder_that_is_not_a_gpt2_gives_one_line_and_nothing_is_written(what, refused):
    changes, weights, says = BAD[what]
    publish(Path("in"), weights, CONFIG | changes)
    if weights is None:
        Path("in/pytorch_model.bin").unlink()
    error = refused("in", "--out", "out.pt")
    assert "beyond.gpt2: in" in error and says in error


def test_damaged_safetensors_give_one_line(refused):
    path = publish(Path("in"), file="model.safetensors") / "model.safetensors"
    content = path.read_bytes()
    for damaged in (b"", content[:-9], b"\xff" * 8 + content[8:]):
        path.write_bytes(damaged)
        assert "cannot be read as weights of GPT-2" in refused("in", "--out", "out.pt")


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nowhere", "--out", "new"], "nowhere: is not a checkpoint, a folder, or one of gpt2"),
        (["in"], "--out is needed"),
        (["in", "--out", "in"], "in: already exists"),
        (["in", "--out", "nowhere/new.pt"], "nowhere/new.pt: cannot be written"),
        (["in/config.json", "--out", "new"], "cannot be read as a checkpoint"),
    ],
)
def test_wrong_arguments_give_one_line(argv, says, refused):
    assert says in refused(*argv)


def test_a_wrong_address_of_the_hub_gives_one_line(tmp_path, monkeypatch, capsys):
    """No scheme => one line. Empty => the default address."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert run("gpt2") == 2
    error = capsys.readouterr().err
    assert error.startswith("beyond.gpt2: hub.example/openai") and error.count("\n") == 1
    monkeypatch.setenv("HF_ENDPOINT", "")

    def fetch(url, path):
        raise BadInput(url)

    monkeypatch.setattr(gpt2, "fetch", fetch)
    assert run("gpt2") == 2
    assert capsys.readouterr().err.startswith("beyond.gpt2: https://huggingface.co/openai")
