"""beyond/gpt2.py: both layouts hold one function, and downloads are complete or refused.

The published side is made by hand: names and shapes as OpenAI released them, a forward pass in
plain tensor operations, and a local server with the hub's paths, headers and redirects.
"""

import hashlib
import json
import math
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import tiktoken
import tiny
import torch

import data
import train
from beyond import gpt2
from lib import cli
from lib.checkpoint import load_gpt, read_checkpoint
from model import GPT, GPTConfig

V = 50257
CONFIG = dict(model_type="gpt2", vocab_size=V, n_positions=40, n_layer=2, n_head=2, n_embd=8,
              activation_function="gelu_new", layer_norm_epsilon=1e-5)  # fmt: skip


def shapes(C: int) -> dict[str, tuple]:
    """The published weights of a block; a matrix is (in, out)."""
    matrices = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C),
                "mlp.c_proj": (4 * C, C)}  # fmt: skip
    found = {f"{name}.weight": shape for name, shape in matrices.items()}
    found |= {f"{name}.bias": shape[1:] for name, shape in matrices.items()}
    return found | {f"{ln}.{kind}": (C,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")}


def published_weights() -> dict[str, torch.Tensor]:
    C, n_layer = CONFIG["n_embd"], CONFIG["n_layer"]
    every = {"wte.weight": (V, C), "wpe.weight": (40, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    every |= {f"h.{i}.{name}": shape for i in range(n_layer) for name, shape in shapes(C).items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(s, generator=generator) for name, s in every.items()}


W = published_weights()
IDS = torch.randint(0, V, (12,), generator=torch.Generator().manual_seed(1))


def forward(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """GPT-2's logits (T, V), position by position and head by head."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

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


def as_state_dict(w: dict) -> dict:
    """As GPT2LMHeadModel.state_dict() has it: a prefix, the tied output matrix, and masks."""
    masks = {
        f"h.{i}.attn.{name}": torch.ones(1) for i in range(2) for name in ("bias", "masked_bias")
    }
    prefixed = {f"transformer.{name}": v for name, v in (w | masks).items()}
    return prefixed | {"lm_head.weight": w["wte.weight"]}


def publish(folder, weights=W, config=CONFIG, file="pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file == "model.safetensors":
        gpt2.write_safetensors(weights, folder / file)
    else:
        torch.save(weights, folder / file)
    return folder


def run(*argv) -> int:
    return gpt2.main([str(arg) for arg in argv])


def logits(path) -> torch.Tensor:
    found = torch.load(path, weights_only=True)
    pi = GPT(GPTConfig(**found["config"]))
    pi.load_state_dict(found["weights"])
    return pi(IDS[None])[0].detach()


@pytest.fixture(autouse=True)
def encoding(monkeypatch):
    """GPT-2's encoding without a download: its size, and its bytes."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"\xff\xff" + i.to_bytes(2, "big"): i for i in range(256, V - 1)}
    special = {"<|endoftext|>": V - 1}
    fake = tiktoken.Encoding(
        "gpt2", pat_str=data.PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)


# ------------------------------------------------- conversion


@pytest.mark.parametrize("layout", ["bin", "state_dict", "safetensors", "float16"])
def test_the_converted_model_computes_the_published_function(layout, tmp_path):
    """Weights in any published layout => the logits of GPT-2's forward pass, to 1e-4."""
    w = W if layout != "float16" else {name: v.half() for name, v in W.items()}
    saved = as_state_dict(w) if layout == "state_dict" else w
    file = "model.safetensors" if layout == "safetensors" else "pytorch_model.bin"
    assert run(publish(tmp_path / "in", saved, file=file), "--out", tmp_path / "gpt2.pt") == 0
    expected = forward({name: v.float() for name, v in w.items()}, IDS)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(tmp_path / "gpt2.pt"), expected, atol=1e-4, rtol=0)


def test_safetensors_of_16_and_32_bits_are_read(tmp_path):
    """A file made by hand: 8 bytes of length, JSON, numbers in the order of the offsets."""
    values = torch.tensor([[1.5, -2.0, 0.25]])
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, dtype in dtypes.items():
        raw = bytes(values.to(dtype).view(torch.uint8).flatten().tolist())
        offsets = [len(content), len(content) + len(raw)]
        header[name.lower()] = {"dtype": name, "shape": [1, 3], "data_offsets": offsets}
        content += raw
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + content)
    found = gpt2.read_safetensors(tmp_path / "file")
    assert found.keys() == {"bf16", "f16", "f32"}
    for name, dtype in dtypes.items():
        w = found[name.lower()]
        assert w.dtype == dtype and torch.equal(w.float(), values)


def test_a_checkpoint_survives_the_round_trip(tmp_path):
    """published -> ours -> published -> ours => the same bits, and the published config."""
    for source, out in (("in", "a.pt"), ("a.pt", "folder"), ("folder", "b.pt")):
        publish(tmp_path / "in")
        assert run(tmp_path / source, "--out", tmp_path / out) == 0
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "ab")
    assert first["config"] == second["config"] and first["tokens"] is second["tokens"] is None
    for name, w in first["weights"].items():
        assert torch.equal(w, second["weights"][name])
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert CONFIG.items() <= config.items() and config["eos_token_id"] == V - 1


@pytest.mark.parametrize("name, size", zip(gpt2.PUBLISHED, (124, 355, 774, 1558), strict=True))
def test_the_published_sizes_have_the_published_numbers_of_parameters(name, size):
    with torch.device("meta"):
        pi = GPT(gpt2.PUBLISHED[name])
    assert round(sum(p.numel() for p in pi.parameters()) / 1e6) == size


@pytest.mark.parametrize("init", ["gpt2.pt", "in"])
def test_a_run_starts_from_a_published_folder_or_the_converted_checkpoint(init, tmp_path):
    """train.py --init of it => the model that a run starts from computes the published function."""
    assert run(publish(tmp_path / "in"), "--out", tmp_path / "gpt2.pt") == 0
    flags = ["--init", str(tmp_path / init), "--context", "24"]
    _, cfg = cli.parse("train.py", "", train.Config, {}, flags)
    pi = load_gpt(train.initial_model(cfg), torch.device("cpu"))
    pi.bf16 = False
    assert pi.config.context == 24
    torch.testing.assert_close(pi(IDS[None])[0], forward(W, IDS), atol=1e-4, rtol=0)


def test_transformers_computes_the_same_logits(tmp_path):
    """GPT2LMHeadModel -> ours -> GPT2LMHeadModel => one function, to 1e-4."""
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
        torch.testing.assert_close(again(IDS[None]).logits[0], expected, atol=0, rtol=0)


# ------------------------------------------------- download


class Hub(BaseHTTPRequestHandler):
    """The hub's paths: a renamed repository, a CDN for weights, and ways to fail."""

    def do_GET(self):
        hub, file = self.server, self.path.rsplit("/", 1)[1]
        content = hub.files[file]
        hub.requests.append((self.path, self.headers["Range"]))
        if hub.failure == "404":
            self.send_error(404)
        elif "/gpt2/" in self.path:
            self.answer(307, b"", Location=self.path.replace("/gpt2/", "/renamed/"))
        elif file == "config.json":
            blob = b"blob %d\0" % len(content) + content
            self.answer(200, content, ETag=f'"{hashlib.sha1(blob).hexdigest()}"')
        elif self.path.startswith("/cdn/"):
            self.send_weights(content)
        else:
            size, tag = str(len(content)), f'"{hashlib.sha256(content).hexdigest()}"'
            linked = {"X-Linked-Size": size, "X-Linked-ETag": tag}
            linked = {} if hub.failure == "no checksum" else linked
            self.answer(302, b"", Location=f"/cdn/{file}", **linked)

    def send_weights(self, content: bytes):
        failure = self.server.failure
        if failure == "wrong bytes":
            content = b"wrong" + content[5:]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        if failure == "no ranges":
            start = 0
        elif start > len(content):
            self.send_error(416)
            return
        rest = content[start:]
        sent = rest[: len(rest) // 2] if failure == "dropped" else rest
        self.answer(206 if start else 200, sent, ETag='"of the CDN"', length=len(rest))

    def answer(self, code: int, body: bytes, length: int | None = None, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = publish(tmp_path / "published", file="model.safetensors")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.failure, server.requests = None, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_name_is_downloaded_once_and_converted(hub, tmp_path, capsys):
    """Renamed repository and CDN => the published function; the second call needs no hub."""
    assert run("gpt2", "--out", tmp_path / "a.pt") == 0
    assert f"next: python train.py --init {tmp_path / 'a.pt'}\n" == capsys.readouterr().out
    torch.testing.assert_close(logits(tmp_path / "a.pt"), forward(W, IDS), atol=1e-4, rtol=0)
    assert len(hub.requests) == 5
    hub.failure = "404"
    assert run("gpt2") == 0 and len(hub.requests) == 5
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["gpt2.pt"]


@pytest.mark.parametrize("second", [None, "no ranges"])
def test_an_interrupted_download_continues_where_it_stopped(second, hub, tmp_path, capsys):
    """A dropped connection => one line. Then the rest, or everything if there are no ranges."""
    size = len(hub.files["model.safetensors"])
    hub.failure = "dropped"
    assert run("gpt2", "--out", tmp_path / "a.pt") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{size // 2:,} of {size:,} bytes arrived; repeat the command to continue" in error
    hub.failure = second
    assert run("gpt2", "--out", tmp_path / "a.pt") == 0
    assert hub.requests[-1] == ("/cdn/model.safetensors", f"bytes={size // 2}-")
    torch.testing.assert_close(logits(tmp_path / "a.pt"), forward(W, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "failure, says",
    [("404", "HTTP Error 404"), ("wrong bytes", "wrong checksum"), ("no checksum", "no checksum")],
)
def test_a_failed_download_is_one_line_and_leaves_no_model(failure, says, hub, tmp_path, capsys):
    hub.failure = failure
    assert run("gpt2", "--out", tmp_path / "a.pt") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("beyond.gpt2: http://127.0.0.1") and says in error
    assert not list(tmp_path.glob("**/*.pt")) and not list(tmp_path.glob("**/*.safetensors.part"))
    hub.failure = None
    assert run("gpt2", "--out", tmp_path / "a.pt") == 0


# ------------------------------------------------- refusals


def without(name: str) -> dict:
    return {other: w for other, w in W.items() if other != name}


BAD = {  # what is wrong: changes of the config, the weights, what the line says
    "another architecture": ({"model_type": "llama"}, W, "its model_type is 'llama'"),
    "exact GELU": ({"activation_function": "gelu"}, W, "only 'gelu_new' is supported"),
    "MLP width": ({"n_inner": 16}, W, "its n_inner is 16"),
    "heads": ({"n_head": 3}, W, "not a multiple of its n_head"),
    "vocabulary": ({"vocab_size": 99}, W, "its vocab_size is 99"),
    "absurd layers": ({"n_layer": 10**12}, W, "n_layer is 1000000000000 in config.json, 2 in the"),
    "context": ({"n_positions": 16}, W, "n_positions is 16 in config.json, 40 in the file"),
    "no size": ({"n_head": None}, W, "cannot be read as a config of GPT-2"),
    "missing": ({}, without("ln_f.bias"), 'Missing key(s) in state_dict: "ln_f.bias"'),
    "no tokens": ({}, without("wte.weight"), "wte.weight"),
    "unexpected": ({}, W | {"score": torch.ones(2)}, 'Unexpected key(s) in state_dict: "score"'),
    "transposed": ({}, gpt2.transpose(W), "size mismatch for h.0.attn.c_attn.weight"),
    "untied": ({}, W | {"lm_head.weight": torch.ones(V, 8)}, "lm_head.weight differs"),
    "not finite": ({}, W | {"ln_f.bias": torch.full((8,), math.nan)}, "not finite"),
    "no weights": ({}, None, "there is no model.safetensors and no pytorch_model.bin"),
    "not tensors": ({}, [1, 2], "cannot be read as weights of GPT-2"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_folder_that_is_not_a_gpt2_is_one_line_and_nothing_is_written(what, tmp_path, capsys):
    changes, weights, says = BAD[what]
    folder = publish(tmp_path / "in", weights, CONFIG | changes)
    if weights is None:
        (folder / "pytorch_model.bin").unlink()
    assert run(folder, "--out", tmp_path / "out.pt") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"beyond.gpt2: {folder}") and error.count("\n") == 1 and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("damage", ["empty", "cut", "header"])
def test_damaged_safetensors_are_one_line(damage, tmp_path, capsys):
    path = publish(tmp_path / "in", file="model.safetensors") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": content[:-9], "header": b"\xff" * 8 + content[8:]}[damage]
    )
    assert run(tmp_path / "in", "--out", tmp_path / "out.pt") == 2
    assert "cannot be read as weights of GPT-2" in capsys.readouterr().err


def test_code_in_weights_is_not_executed(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    folder = publish(tmp_path / "in", W | {"ln_f.bias": Code()})
    assert run(folder, "--out", tmp_path / "out.pt") == 2
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nowhere", "--out", "new"], "nowhere: is not a checkpoint, a folder, or one of gpt2"),
        (["in"], "--out is needed"),
        (["in", "--out", "in"], "in: exists already"),
        (["in", "--out", "nowhere/new.pt"], "nowhere/new.pt: cannot be written"),
        (["in/config.json", "--out", "new"], "cannot be read as a checkpoint"),
    ],
)
def test_wrong_arguments_are_one_line(argv, says, tmp_path, monkeypatch, capsys):
    publish(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    assert gpt2.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_learned_tokenizer_is_not_exported(tmp_path, capsys):
    """A checkpoint of ours => a folder with its size and end token."""
    torch.save(tiny.checkpoint(), tmp_path / "ours.pt")
    assert run(tmp_path / "ours.pt", "--out", tmp_path / "folder") == 0
    assert "the tokenizer is not part of it" in capsys.readouterr().out
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    ours = read_checkpoint(tmp_path / "ours.pt")
    assert config["vocab_size"] == ours["config"]["vocab_size"] == config["eos_token_id"] + 1
    back = gpt2.transpose(gpt2.read_weights(tmp_path / "folder"))
    assert all(torch.equal(back[name], w) for name, w in ours["weights"].items())
