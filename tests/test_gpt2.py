"""beyond/gpt2.py: the published layout and ours hold one function, and what holds another is refused.

The published side is made by hand here: its names and shapes from OpenAI's release, its forward in plain tensor operations.
"""
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import train
from beyond import gpt2
from kit import checkpoints, files, tokens
from model import GPT, GPTConfig

ROOT = Path(train.__file__).parent
V, EPS = 50257, 1e-5
TINY = dict(model_type="gpt2", vocab_size=V, n_positions=16, n_layer=2, n_head=2, n_embd=8, activation_function="gelu_new",
            layer_norm_epsilon=EPS, architectures=["GPT2LMHeadModel"], n_ctx=16, resid_pdrop=0.1)
HAS_SAFETENSORS = importlib.util.find_spec("safetensors") is not None


def shapes(n_layer: int, C: int, context: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published weights; a Conv1D's weight is (in, out)."""
    block = {"ln_1.weight": (C,), "ln_1.bias": (C,), "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
             "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
             "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,), "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,)}
    return {"wte.weight": (V, C), "wpe.weight": (context, C), "ln_f.weight": (C,), "ln_f.bias": (C,)} | {
        f"h.{i}.{name}": shape for i in range(n_layer) for name, shape in block.items()}


def weights(n_layer: int = 2, C: int = 8, context: int = 16) -> dict[str, torch.Tensor]:
    """Random, and none where a zero or a one would hide it."""
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes(n_layer, C, context).items()}


def forward(w: dict[str, torch.Tensor], n_layer: int, n_head: int, ids: list[int]) -> torch.Tensor:
    """GPT-2's logits (T, V) for one text, position by position and head by head, on weights in Conv1D's layout."""
    def norm(x, name):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + EPS).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]
    x = torch.stack([w["wte.weight"][i] + w["wpe.weight"][t] for t, i in enumerate(ids)])               # (T, C)
    hs = x.size(1) // n_head
    for i in range(n_layer):
        q, k, v = conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)                 # (T, C) each
        heads = []
        for head in (slice(h * hs, (h + 1) * hs) for h in range(n_head)):
            rows = [torch.softmax(k[:t + 1, head] @ q[t, head] / math.sqrt(hs), 0) @ v[:t + 1, head] for t in range(len(ids))]
            heads.append(torch.stack(rows))
        x = x + conv1d(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        u = conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + conv1d(0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3))), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def publish(folder: Path, w: object, config: dict | None = None, name: str = "pytorch_model.bin", **how) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY if config is None else config))
    if name == "model.safetensors":
        pytest.importorskip("safetensors.torch").save_file(w, folder / name, metadata={"format": "pt"})
    else:
        torch.save(w, folder / name, **how)
    return folder


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """GPT-2's encoding is only asked for its size and its end token here."""
    monkeypatch.setattr(tokens, "gpt2_tokenizer", lambda: SimpleNamespace(n_vocab=V, eot_token=V - 1))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def published(folder: Path) -> dict[str, torch.Tensor]:
    return gpt2.read_weights(folder)[0]


# ------------------------------------------------------------------------------------------------ one function

def prefixed(w: dict) -> dict:
    """As GPT2LMHeadModel.state_dict() has it: prefix, tied head, masks."""
    mask = torch.ones(16, 16).tril().bool()[None, None]
    buffers = {f"h.{i}.attn.{name}": buffer for i in range(2) for name, buffer in
               {"bias": mask, "masked_bias": torch.tensor(-1e4)}.items()}
    return {f"transformer.{name}": v for name, v in (w | buffers).items()} | {"lm_head.weight": w["wte.weight"]}


LAYOUTS = {     # how it is published: what is saved, and how
    "as published": (lambda w: w, {}),
    "as a state_dict": (prefixed, {}),
    "masks of the first releases": (lambda w: w | {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}, {}),
    "parameters": (lambda w: {name: torch.nn.Parameter(v) for name, v in w.items()}, {}),
    "before zip files": (lambda w: w, dict(_use_new_zipfile_serialization=False)),
    "safetensors": (lambda w: w, dict(name="model.safetensors")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_converted_model_computes_the_published_function(layout, tmp_path):
    """Weights in any published layout  =>  logits of our GPT = those of GPT-2's forward on the original, to 1e-4"""
    w, (arrange, how) = weights(), LAYOUTS[layout]
    assert gpt2.main([str(publish(tmp_path / "in", arrange(w), **how)), str(tmp_path / "ours.pt")]) == 0
    pi = checkpoints.load(checkpoints.read_checkpoint(tmp_path / "ours.pt"), torch.device("cpu"))
    pi.bf16 = False
    ids = torch.randint(0, V, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = torch.stack([forward(w, 2, 2, row) for row in ids.tolist()])
        assert theirs.std() > 0.5
        torch.testing.assert_close(pi(ids), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_without_a_change_of_value(dtype, tmp_path):
    """Weights of 16 bits  =>  the same numbers in 32"""
    w = {name: v.to(dtype) for name, v in weights().items()}
    ours = gpt2.from_published(publish(tmp_path / "in", w))
    assert same(gpt2.transposed(ours["weights"]), {name: v.float() for name, v in w.items()})


@pytest.mark.parametrize("size", gpt2.PUBLISHED)
def test_each_published_size_has_our_names_and_shapes_with_the_blocks_matrices_transposed(size):
    """124M to 1558M  =>  the published names and shapes are those of our GPT, and their number the published one"""
    config = gpt2.PUBLISHED[size]
    with torch.device("meta"):
        ours = gpt2.transposed(GPT(config).state_dict())
    assert {name: tuple(v.shape) for name, v in ours.items()} == shapes(config.n_layer, config.n_embd, config.context)
    assert round(sum(v.numel() for v in ours.values()) / 1e6) == int(size[:-1])


# ------------------------------------------------------------------------------------------------ round trips

@pytest.mark.parametrize("library", [
    pytest.param(True, marks=pytest.mark.skipif(not HAS_SAFETENSORS, reason="wants safetensors")), False])
def test_round_trips_are_exact_with_the_library_safetensors_and_without(library, tmp_path, monkeypatch):
    """published -> ours -> published and ours -> published -> ours  =>  the same bits, and the same config"""
    if not library:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    w = weights()
    for source, out in (("in", "a.pt"), ("a.pt", "folder"), ("folder", "b.pt"), ("b.pt", "folder2")):
        publish(tmp_path / "in", w)
        assert gpt2.main([str(tmp_path / source), str(tmp_path / out)]) == 0
    a, b = (checkpoints.read_checkpoint(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert a["config"] == b["config"] and same(a["weights"], b["weights"]) and a["tokens"] is b["tokens"] is None
    file = "model.safetensors" if library else "pytorch_model.bin"
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"config.json", file}
    assert same(published(tmp_path / "folder"), w) and same(published(tmp_path / "folder2"), w)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == V - 1
    assert {name: config[name] for name in TINY if name not in ("n_ctx", "resid_pdrop")} == {
        name: value for name, value in TINY.items() if name not in ("n_ctx", "resid_pdrop")}


def test_a_learned_tokenizer_is_left_behind_and_that_is_said(tmp_path, capsys):
    """A checkpoint of ours with its own tokens  =>  a folder of its size with its end token, and no way back"""
    learned = tokens.tokens_of(tokens.learn_tokenizer(["the plot is superb."], 270))
    torch.manual_seed(0)
    made = checkpoints.checkpoint(GPT(GPTConfig(len(learned) + 1, 32, 1, 2, 8)), learned)
    torch.save(made, tmp_path / "ours.pt")
    assert gpt2.main([str(tmp_path / "ours.pt"), str(tmp_path / "folder")]) == 0
    assert "no tokenizer files are written: it is this project's" in capsys.readouterr().out
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["vocab_size"] == len(learned) + 1 and config["eos_token_id"] == len(learned)
    assert same(gpt2.transposed(published(tmp_path / "folder")), made["weights"])
    assert gpt2.main([str(tmp_path / "folder"), str(tmp_path / "again.pt")]) == 2


def test_shards_are_put_together(tmp_path):
    """Two files and their index  =>  one model"""
    w, names = weights(), sorted(weights())
    folder = publish(tmp_path / "in", {name: w[name] for name in names[:9]}, name="pytorch_model-00001-of-00002.bin")
    publish(folder, {name: w[name] for name in names[9:]}, name="pytorch_model-00002-of-00002.bin")
    index = {name: f"pytorch_model-0000{1 + (i >= 9)}-of-00002.bin" for i, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=index)))
    assert same(gpt2.transposed(gpt2.from_published(folder)["weights"]), w)


def test_a_run_starts_from_the_converted_checkpoint(tmp_path, monkeypatch):
    """train.py --init of it  =>  pi_ref is the published model, its positions cut to the context, and results.json says its sizes"""
    ranks = {bytes([b]): b for b in range(256)} | {b"\xff\xff" + i.to_bytes(2, "big"): i for i in range(256, V - 1)}
    encoding = tokens.tiktoken.Encoding("gpt2", pat_str=tokens.PATTERN, mergeable_ranks=ranks, special_tokens={tokens.END: V - 1})
    monkeypatch.setattr(tokens, "gpt2_tokenizer", lambda: encoding)
    publish(tmp_path / "in", w := weights(context=64), TINY | dict(n_positions=64))
    assert gpt2.main([str(tmp_path / "in"), str(tmp_path / "c.pt")]) == 0
    pairs = [dict(prompt=f"film {i} is", chosen=" superb", rejected=" dull") for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = ["--init", str(tmp_path / "c.pt"), "--context", "32", "--held-out", "2", "--out", str(tmp_path / "out")]
    assert train.main(["--data", str(tmp_path / "pairs.jsonl"), *flags]) == 0
    reference = checkpoints.read_checkpoint(tmp_path / "out" / "reference.pt")
    assert same(gpt2.transposed(reference["weights"]), w | {"wpe.weight": w["wpe.weight"][:32]})
    config = json.loads((tmp_path / "out" / "results.json").read_text())["config"]
    assert {name: config[name] for name in reference["config"]} == reference["config"] == dict(
        vocab_size=V, context=32, n_layer=2, n_head=2, n_embd=8)


# ------------------------------------------------------------------------------------------------ what people do to a program

def without(name: str) -> dict:
    return {other: v for other, v in weights().items() if other != name}


def saved(value: object) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


class Executed:
    """What a checkpoint of somebody ill-disposed would hold."""
    def __reduce__(self):
        return Path("executed").touch, ()


def compressed(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as f:
        for entry in old.infolist():
            f.writestr(entry.filename, old.read(entry) + bytes(100_000))
    return new.getvalue()


def config(**changes) -> bytes:
    """A config.json that is changed; a value of `...` takes the key away."""
    return json.dumps({name: value for name, value in (TINY | changes).items() if value is not ...}).encode()


BIN, GOOD = "pytorch_model.bin", saved(weights())
BAD = {     # what is wrong: files changed (None: taken away), what the line says
    "no config": ({"config.json": None}, "config.json: cannot be read as a config of GPT-2 ([Errno 2]"),
    "empty config": ({"config.json": b""}, "config.json"),
    "config cut off": ({"config.json": config()[:-9]}, "config.json"),
    "config, a list": ({"config.json": b"[]"}, "needs a model_type"),
    "config, deep": ({"config.json": b"[" * 200_000}, "config.json"),
    "another architecture": ({"config.json": config(model_type="llama")}, 'its model_type is "llama"'),
    "exact GELU": ({"config.json": config(activation_function="gelu")}, 'its activation_function is "gelu", and only "gelu_new"'),
    "another epsilon": ({"config.json": config(layer_norm_epsilon=1e-6)}, "its layer_norm_epsilon is 1e-06"),
    "scores divided by the layer": ({"config.json": config(scale_attn_by_inverse_layer_idx=True)}, "scale_attn_by_inverse_layer_idx"),
    "an MLP of another width": ({"config.json": config(n_inner=16)}, "its n_inner is 16"),
    "untied by config": ({"config.json": config(tie_word_embeddings=False)}, "tie_word_embeddings"),
    "no sizes": ({"config.json": config(n_layer=...)}, "whole numbers vocab_size, n_positions, n_layer"),
    "size, negative": ({"config.json": config(n_layer=-1)}, "above 0"),
    "size, true": ({"config.json": config(n_layer=True)}, "whole numbers"),
    "size, a fraction": ({"config.json": config(n_head=2.0)}, "whole numbers"),
    "heads that do not divide": ({"config.json": config(n_head=3)}, "multiple of its n_head"),
    "absurd layers": ({"config.json": config(n_layer=10 ** 12)}, "are not those of the weights"),
    "absurd width": ({"config.json": config(n_embd=10 ** 15)}, "cannot be read as weights of GPT-2"),
    "another vocabulary": ({"config.json": config(vocab_size=50258)}, "vocabulary of 50,258 is not GPT-2's 50,257"),
    "another context": ({"config.json": config(n_positions=32)}, "wpe.weight is missing, or not (32, 8)"),
    "fewer layers in config": ({"config.json": config(n_layer=1)}, "h.1.attn.c_attn.bias is no weight"),
    "no weights": ({BIN: None}, "neither pytorch_model.bin nor model.safetensors"),
    "empty weights": ({BIN: b""}, "cannot be read as weights of GPT-2"),
    "garbage": ({BIN: b"garbage" * 99}, "cannot be read as weights of GPT-2"),
    "weights cut off": ({BIN: GOOD[:-1000]}, "cannot be read as weights of GPT-2"),
    "compressed": ({BIN: compressed(GOOD)}, "is compressed"),
    "code": ({BIN: saved(Executed())}, "cannot be read as weights of GPT-2"),
    "code in a tensor's place": ({BIN: saved(weights() | {"ln_f.bias": Executed()})}, "cannot be read as weights of GPT-2"),
    "no dict": ({BIN: saved([1])}, "holds no tensors by name"),
    "no tensors": ({BIN: saved(dict(a=1))}, "holds no tensors by name"),
    "our checkpoint under that name": ({BIN: saved(dict(config={}, tokens=None, weights=weights()))}, "holds no tensors by name"),
    "a weight missing": ({BIN: saved(without("ln_f.weight"))}, "ln_f.weight is missing"),
    "no token vectors": ({BIN: saved(without("wte.weight") | {"lm_head.weight": torch.ones(V, 8)})}, "wte.weight"),
    "a weight too many": ({BIN: saved(weights() | {"score.weight": torch.ones(2, 8)})}, "score.weight is no weight"),
    "transposed already": ({BIN: saved({n: v.T if v.ndim == 2 and n[:2] == "h." else v for n, v in weights().items()})}, "c_attn.weight is"),
    "an untied head": ({BIN: saved(weights() | {"lm_head.weight": torch.ones(V, 8)})}, "lm_head.weight is not its wte.weight"),
    "whole numbers": ({BIN: saved(weights() | {"ln_f.bias": torch.ones(8, dtype=torch.int8)})}, "ln_f.bias (torch.int8)"),
    "64 bits": ({BIN: saved(weights() | {"ln_f.bias": torch.ones(8).double()})}, "ln_f.bias (torch.float64)"),
    "not finite": ({BIN: saved(weights() | {"ln_f.bias": torch.full((8,), float("nan"))})}, "ln_f.bias (torch.float32) is not of finite"),
    "huge by repetition": ({BIN: saved({n: torch.ones(1).expand(v.shape) for n, v in weights().items()})}, "not those of the weights"),
    "shards elsewhere": ({BIN: None, BIN + ".index.json": b'{"weight_map": {"a": "../in/pytorch_model.bin"}}'}, "outside the folder"),
    "shards missing": ({BIN: None, BIN + ".index.json": b'{"weight_map": {"a": "none.bin"}}'}, "none.bin"),
    "index without files": ({BIN: None, BIN + ".index.json": b'{}'}, "weight_map"),
    "safetensors, garbage": ({BIN: None, "model.safetensors": b"garbage" * 99}, "safetensors" if not HAS_SAFETENSORS else "weights of GPT-2"),
    "safetensors, empty": ({BIN: None, "model.safetensors": b""}, "safetensors" if not HAS_SAFETENSORS else "weights of GPT-2"),
}


def refused(argv: list[str], folder: Path, capsys, monkeypatch) -> str:
    """The one line with which main refuses, having changed nothing in the folder."""
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert gpt2.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpt2.py: ") and said.count("\n") == 1 and len(said) < 600
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (folder / "executed").exists() and not list(folder.glob("*.part"))
    return said


@pytest.mark.parametrize("what", BAD)
def test_bad_folder_is_one_clear_line_that_names_it_and_nothing_is_written(what, tmp_path, capsys, monkeypatch):
    changed, says = BAD[what]
    (tmp_path / "in").mkdir()
    for name, content in ({"config.json": config(), BIN: GOOD} | changed).items():
        if content is not None:
            (tmp_path / "in" / name).write_bytes(content)
    line = refused(["in", "out.pt"], tmp_path, capsys, monkeypatch)
    assert says in line and line.startswith("gpt2.py: in")


def test_missing_library_is_named(tmp_path, capsys, monkeypatch):
    publish(tmp_path / "in", weights())
    (tmp_path / "in" / BIN).rename(tmp_path / "in" / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refused(["in", "out.pt"], tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 99, saved(Executed()), saved(weights())])
def test_bad_checkpoint_is_one_clear_line_and_nothing_is_written(content, tmp_path, capsys, monkeypatch):
    if content is not None:
        (tmp_path / "bad.pt").write_bytes(content)
    assert "bad.pt: cannot be read as a checkpoint" in refused(["bad.pt", "folder"], tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("out", ["in", "in/config.json", "precious"])
def test_what_is_there_is_never_overwritten(out, tmp_path, capsys, monkeypatch):
    publish(tmp_path / "in", weights())
    (tmp_path / "precious").write_text("precious")
    assert "exists already" in refused(["in", out], tmp_path, capsys, monkeypatch)


@pytest.fixture
def both(tmp_path) -> Path:
    """A folder with a published model, and a checkpoint of ours."""
    publish(tmp_path / "in", weights())
    learned = tokens.tokens_of(tokens.learn_tokenizer(["the plot is superb."], 270))
    torch.save(checkpoints.checkpoint(GPT(GPTConfig(len(learned) + 1, 32, 1, 2, 128)), learned), tmp_path / "ours.pt")
    return tmp_path


@pytest.mark.parametrize("source", ["in", "ours.pt"])
def test_a_folder_that_is_not_there_is_one_clear_line(source, both, capsys, monkeypatch):
    assert "nowhere/out: cannot be written (" in refused([source, "nowhere/out"], both, capsys, monkeypatch)


@pytest.mark.parametrize("source", ["in", "ours.pt"])
def test_full_disk_is_one_clear_line_and_leaves_nothing(source, both):
    """No file may grow beyond 100 kB  =>  one line, and no part of OUT"""
    resource = pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-m", "beyond.gpt2", both / source, both / "out"], cwd=ROOT, capture_output=True,
                          text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpt2.py: ") and "out: cannot be written" in done.stderr
    assert {path.name for path in both.iterdir()} == {"in", "ours.pt"}


def test_any_bytes_are_a_sound_model_or_one_clear_line(tmp_path):
    """Bytes of config.json, or of the list of weights, changed  =>  BadInput that names the folder, or a model that predicts"""
    folder = publish(tmp_path / "in", weights())

    @settings(max_examples=int(os.environ.get("FUZZ", 150)) // 3)
    @given(st.sampled_from(("config.json", BIN)), st.integers(-9_000, 3_000), st.binary(min_size=1, max_size=8))
    def fuzz(name, place, new):
        good = (folder / name).read_bytes()
        place %= len(good)
        (folder / name).write_bytes(good[:place] + new + good[place + len(new):])
        try:
            ours = gpt2.from_published(folder)
            pi = GPT(GPTConfig(**ours["config"]))
            pi.load_state_dict(ours["weights"])
            assert pi(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, V)
        except files.BadInput as e:
            assert str(folder) in str(e)
        finally:
            (folder / name).write_bytes(good)
    fuzz()


# ------------------------------------------------------------------------------------------------ the original

@pytest.mark.parametrize("layout", ["safetensors", "state_dict"])
def test_transformers_computes_the_same_logits_from_what_either_wrote(layout, tmp_path):
    """GPT2LMHeadModel -> ours -> GPT2LMHeadModel  =>  three models, one function, to 1e-4"""
    transformers = pytest.importorskip("transformers", reason="wants transformers, which nothing else here needs")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, n_layer=3, n_head=4, n_embd=32)).eval()
    theirs.save_pretrained(tmp_path / "in")
    if layout == "state_dict":
        (tmp_path / "in" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "in" / BIN)
    assert gpt2.main([str(tmp_path / "in"), str(tmp_path / "ours.pt")]) == 0
    assert gpt2.main([str(tmp_path / "ours.pt"), str(tmp_path / "folder")]) == 0
    ours = checkpoints.load(checkpoints.read_checkpoint(tmp_path / "ours.pt"), torch.device("cpu"))
    ours.bf16 = False
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder").eval()
    assert again.generation_config.eos_token_id == V - 1
    ids = torch.randint(0, V, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=0, rtol=0)
