"""What people do to a program: bad input, interruptions, files that were tampered with. Each bad input is one clear line and
exit code 2, and no file is touched.

More of it, once rather than each time: `FUZZ=10000 KILLS=20 pytest tests/test_trust.py`.
"""
import ast
import gzip
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
import train
from kit import checkpoints, files, own, tokens

ROOT = Path(train.__file__).parent
TINY = "--reviews 300 --steps 8 --prompts 24 --held-out 4 --samples 64 --batch 8 --beta 0.5 2".split()
FUZZ, KILLS = int(os.environ.get("FUZZ", 150)), int(os.environ.get("KILLS", 3))


def pairs(n: int = 30) -> list[dict]:
    return [dict(prompt=f"the plot of film {i // 2} is", chosen=f" superb {i}.", rejected=f" dull {i}.") for i in range(n)]


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def members(extra: dict[str, bytes] = {}, kind: bytes = tarfile.REGTYPE) -> bytes:
    """An archive in IMDb's layout, of a few reviews, and one more member of some kind."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
        for i, text in enumerate(data.toy_reviews(40, 0)):
            info = tarfile.TarInfo(f"aclImdb/{('train', 'test')[i % 2]}/{('pos', 'neg')[i // 2 % 2]}/{i}_9.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
        for name, text in extra.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(text) * (kind == tarfile.REGTYPE), kind
            tar.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def saved(value: object) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


class Executed:
    """What a checkpoint of somebody ill-disposed would hold."""
    def __reduce__(self):
        return Path("executed").touch, ()


TOKENS = tokens.tokens_of(tokens.learn_tokenizer(["the plot is superb."], 270))
GOOD = checkpoints.checkpoint(train.GPT(train.GPTConfig(len(TOKENS) + 1, 32, 1, 2, 8)), TOKENS)


def with_config(**changes) -> bytes:
    return saved(GOOD | dict(config=GOOD["config"] | changes))


def with_weight(w: torch.Tensor) -> bytes:
    return saved(GOOD | dict(weights=GOOD["weights"] | {"ln_f.weight": w}))


def third(**changes) -> bytes:
    """Preferences whose third line is changed; a value of `...` takes the key away."""
    rows = pairs()
    rows[2] = {name: value for name, value in (rows[2] | changes).items() if value is not ...}
    return lines(rows)


OWN, IMDB, INIT = ["--data", "FILE"], ["--data", "imdb", "--imdb", "FILE"], ["--data", "GOOD", "--init", "FILE", "--context", "32"]
BAD_FILES = {   # what is wrong: flags, what FILE holds (None: there is no such file), what the line says besides its name
    "own, missing": (OWN, None, "No such file"),
    "own, a folder": (["--data", "."], None, "cannot be read as preferences"),
    "own, empty": (OWN, b"", "is empty"),
    "own, blank": (OWN, b"\n \n\n", "is empty"),
    "own, not JSON": (OWN, lines(pairs(2)) + b"{prompt: 1}\n", "line 3: not JSON"),
    "own, cut off": (OWN, lines(pairs(3))[:-20], "line 3: not JSON"),
    "own, not an object": (OWN, lines([*pairs(2), ["a", "b", "c"]]), "line 3: not a JSON object"),
    "own, no prompt": (OWN, third(prompt=...), "line 3: has no prompt"),
    "own, no chosen": (OWN, third(chosen=...), "line 3: has no chosen"),
    "own, no rejected": (OWN, third(rejected=...), "line 3: has no rejected"),
    "own, empty prompt": (OWN, third(prompt=""), "line 3: prompt is empty"),
    "own, empty prompt with ids": (OWN, third(prompt="", prompt_ids=[1]), "line 3: prompt is empty"),
    "own, empty response": (OWN, third(rejected=""), "line 3: rejected is empty"),
    "own, identical responses": (OWN, third(rejected=pairs()[2]["chosen"]), "line 3: chosen and rejected are identical"),
    "own, conversation": (OWN, third(chosen=[dict(role="user", content="hi")]), "line 3: chosen is not a string; python -m"),
    "own, null": (OWN, third(prompt=None), "line 3: prompt is not a string"),
    "own, NaN weight": (OWN, third(weight=float("nan")), "line 3: weight"),
    "own, negative weight": (OWN, third(weight=-1), "line 3: weight"),
    "own, no weight at all": (OWN, third(weight=0), "line 3: weight"),
    "own, weight in words": (OWN, third(weight="one"), "line 3: weight"),
    "own, not UTF-8": (OWN, lines(pairs(2)) + b'{"prompt": "\xff"}\n', "line 3: not JSON in UTF-8"),
    "own, half a character": (OWN, lines(pairs(2)) + b'{"prompt": "\\ud800"}\n', "line 3: not JSON in UTF-8"),
    "own, megabytes in a line": (OWN, third(prompt="a" * (5 << 20)), "line 3: longer than 4 MB"),
    "own, deep": (OWN, lines(pairs(2)) + b"[" * 200_000, "line 3: not JSON"),
    "own, one prompt only": (OWN, lines(pairs(2)), "0 pairs to train on"),
    "own, none fits": ([*OWN, "--context", "8"], lines([p | dict(prompt=p["prompt"] * 9) for p in pairs()]), "--context must be more"),
    "IMDb, missing": (IMDB, None, "No such file"),
    "IMDb, empty": (IMDB, b"", "cannot be read as the IMDb archive"),
    "IMDb, text": (IMDB, b"not an archive", "cannot be read as the IMDb archive"),
    "IMDb, truncated": (IMDB, members()[:700], "cannot be read as the IMDb archive"),
    "IMDb, another layout": (IMDB, gzip.compress(b""), "cannot be read as the IMDb archive"),
    "IMDb, wrong checksum inside": (IMDB, members()[:-8] + b"\0" * 8, "cannot be read as the IMDb archive"),
    "IMDb, a bomb": (IMDB, gzip.compress(bytes(1 << 20)) * 1100, "unpacks to far more"),
    "IMDb, absolute path": (IMDB, members({"/train/pos/1_9.txt": b""}), "leads out of its folder"),
    "IMDb, path upwards": (IMDB, members({"a/../../train/pos/1_9.txt": b""}), "leads out of its folder"),
    "IMDb, link": (IMDB, members({"train/pos/1_9.txt": b""}, tarfile.SYMTYPE), "is a link"),
    "IMDb, hard link": (IMDB, members({"train/pos/1_9.txt": b""}, tarfile.LNKTYPE), "is a link"),
    "IMDb, device": (IMDB, members({"train/pos/1_9.txt": b""}, tarfile.BLKTYPE), "is a link, a device"),
    "IMDb, too few reviews": (IMDB, members(), "too few reviews"),
    "checkpoint, missing": (INIT, None, "No such file"),
    "checkpoint, empty": (INIT, b"", "cannot be read as a checkpoint"),
    "checkpoint, text": (INIT, b"not a checkpoint", "cannot be read as a checkpoint"),
    "checkpoint, truncated": (INIT, saved(GOOD)[:-500], "cannot be read as a checkpoint"),
    "checkpoint, with code in it": (INIT, saved(Executed()), "cannot be read as a checkpoint"),
    "checkpoint, a pickle": (INIT, pickle.dumps(Executed()), "cannot be read as a checkpoint"),
    "checkpoint, of something else": (INIT, saved([1, 2, 3]), "cannot be read as a checkpoint"),
    "checkpoint, another width": (INIT, with_config(n_embd=16), "are not those of its config"),
    "checkpoint, another depth": (INIT, with_config(n_layer=2), "are not those of its config"),
    "checkpoint, absurd depth": (INIT, with_config(n_layer=10 ** 9), "are not those of its weights"),
    "checkpoint, absurd width": (INIT, with_config(n_embd=10 ** 15), "cannot be read as a checkpoint"),
    "checkpoint, heads that do not divide": (INIT, with_config(n_head=3), "n_head"),
    "checkpoint, another weight's shape": (INIT, with_weight(torch.ones(9)), "are not those of its config"),
    "checkpoint, huge by repetition": (INIT, with_weight(torch.ones(1).expand(10 ** 9)), "are not those of its weights"),
    "checkpoint, not finite": (INIT, with_weight(torch.full((8,), float("nan"))), "not finite"),
    "checkpoint, tokens missing": (INIT, saved(GOOD | dict(tokens=TOKENS[1:])), "256 bytes"),
    "checkpoint, another vocabulary": (INIT, saved(GOOD | dict(tokens=TOKENS[:-1])), "another size"),
    "checkpoint, sees too little": (INIT[:-1] + ["64"], saved(GOOD), "say --context 32"),
}
BAD_FLAGS = {
    "--data out/triplets.jsonl --out out": "--data out/triplets.jsonl lies in --out",
    "--init out/reference.pt --out out": "--init out/reference.pt lies in --out",
    "--tokenizer gpt2 --vocab-size 300": "--vocab-size has no meaning beside --tokenizer gpt2",   # flags: what the line says
    "--unknown 1": "--unknown", "--beta 0": "--beta", "--beta -1": "--beta", "--beta nan": "--beta", "--beta inf": "--beta",
    "--beta 1e99": "--beta", "--beta": "--beta", "--beta one": "--beta", "--rate 0": "--rate", "--rate nan": "--rate",
    "--rate -1": "--rate", "--rate 1e99": "--rate", "--prompts 0": "--prompts", "--prompts 1.5": "--prompts",
    "--prompts 999999999999": "--prompts", "--steps -1": "--steps", "--steps 0": "--init", "--batch 0": "--batch",
    "--held-out 1": "--held-out", "--samples 4": "--samples", "--samples 30": "--samples", "--seed -1": "--seed",
    "--seed x": "--seed", "--vocab-size 256": "--vocab-size", "--context 1": "--context", "--labels best": "--labels",
    "--loss ipo": "--loss", "--device abacus": "--device", "--device meta": "--device", "--bet 1": "--bet", "--init": "--init", "--imdb somewhere": "--data imdb", "--reviews 0": "--reviews",
    "--data x.jsonl --labels soft": "--labels", "--data x.jsonl --samples 64": "--samples",
    "--init x.pt --tokenizer gpt2": "--tokenizer", "--init nowhere.pt": "nowhere.pt", "--out FILE": "FILE",
    "--out FILE/below": "FILE",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(argv: list[str], folder: Path, capsys, monkeypatch) -> str:
    """The one line with which main refuses, having changed nothing in the folder."""
    monkeypatch.chdir(folder)
    before = contents(folder)
    try:
        code = train.main(argv)
    except SystemExit as e:         # argparse's way
        code = e.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and said.count("train.py: ") == 1 and len(last) < 600
    assert contents(folder) == before and not (folder / "executed").exists()
    return last


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_file_is_one_clear_line_that_names_it(what, tmp_path, capsys, monkeypatch):
    flags, content, says = BAD_FILES[what]
    (tmp_path / "good.jsonl").write_bytes(lines(pairs()))
    if content is not None:
        (tmp_path / "bad.file").write_bytes(content)
    argv = [{"FILE": "bad.file", "GOOD": "good.jsonl"}.get(flag, flag) for flag in flags]
    line = refused([*argv, "--out", "out"], tmp_path, capsys, monkeypatch)
    assert says in line and ("bad.file" in line or "bad.file" not in argv or says == "too few reviews")


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flag_is_one_clear_line_that_names_it(flags, tmp_path, capsys, monkeypatch):
    (tmp_path / "FILE").write_text("precious")
    out = [] if "--out" in flags else ["--out", "out"]
    assert BAD_FLAGS[flags] in refused([*flags.split(), *out], tmp_path, capsys, monkeypatch)


class Arriving(io.BytesIO):
    """What urlopen gives: bytes that are not the archive."""
    def geturl(self) -> str:
        return files.ARCHIVE


@pytest.mark.parametrize("arrived", [b"", b"cut off", bytes(1 << 20)])
def test_download_with_a_wrong_checksum_is_one_clear_line_and_leaves_nothing(arrived, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files.urllib.request, "urlopen", lambda url, timeout: Arriving(arrived))
    assert "size or md5 differs" in refused(["--data", "imdb", "--out", "out"], tmp_path, capsys, monkeypatch)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "cache" / "aclImdb_v1.tar.gz").write_bytes(arrived)
    assert "delete it" in refused(["--data", "imdb", "--out", "out"], tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), OSError(28, "No space left on device"),
                                   ConnectionResetError("cut off")])
def test_download_that_fails_is_one_clear_line_and_leaves_nothing(error, tmp_path, capsys, monkeypatch):
    def urlopen(url, timeout):
        raise error
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files.urllib.request, "urlopen", urlopen)
    assert "--imdb PATH" in refused(["--data", "imdb", "--out", "out"], tmp_path, capsys, monkeypatch)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_unless_asked_for(tmp_path, monkeypatch):
    def connect(*args):
        raise AssertionError("a connection")
    monkeypatch.setattr("socket.socket.connect", connect)
    assert train.main([*TINY, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("flags", ["--beta 0", "--data nowhere.jsonl", "--data imdb --imdb nowhere.tar.gz"])
def test_a_process_refuses_as_main_does(flags, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags.split(), "--out", tmp_path / "out"], capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ interruptions

def start(out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, *more, "--out", out], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text()) | {"seconds": None, "peak_memory_bytes": None}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, float]:
    out, began = tmp_path_factory.mktemp("whole") / "out", time.perf_counter()
    process = start(out)
    process.communicate()
    assert process.returncode == 0
    return out, time.perf_counter() - began


def test_a_stage_names_every_function_that_it_runs():
    """Each stage of train.py, its function, and the functions of train.py that this one calls, and so on  =>  all among its
    needs, and the file of each that is kit.batches' or kit.estimates', so that none can be edited and an old result be taken"""
    tree = ast.parse(Path(train.__file__).read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    kits = {alias.name: node.module.replace(".", "/") + ".py" for node in tree.body if isinstance(node, ast.ImportFrom)
             for alias in node.names if node.module in ("kit.batches", "kit.estimates")}
    inner = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def run_by(node: ast.AST, seen: set[str]) -> set[str]:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        seen = seen | {kits[name] for name in names & kits.keys()}
        for name in names & functions.keys() - seen:
            seen = run_by(functions[name], seen | {name})
        return seen
    stages = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and len(call.args) == 3
              and getattr(call.func, "id", getattr(call.func, "attr", "")) == "stage"]
    for call in stages:
        _, needs, make = call.args
        needs = eval(compile(ast.Expression(needs), "train.py", "eval"), vars(train) | dict(beta=1.0)).split()
        runs = run_by(inner[make.id] if isinstance(make, ast.Name) else make, set())
        assert runs <= set(needs), (needs, runs - set(needs))
    assert len(stages) == 7


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_any_moment_a_run_ends_with_the_results_of_an_undisturbed_one(kill, undisturbed, tmp_path):
    whole, seconds = undisturbed
    process = start(tmp_path / "out")
    time.sleep(random.Random(kill).uniform(0.1, 1.0) * seconds)
    process.send_signal((signal.SIGKILL, signal.SIGINT)[kill % 2] if os.name == "posix" else signal.SIGTERM)
    process.communicate()
    again = start(tmp_path / "out")
    said = again.communicate()[1]
    assert again.returncode == 0, said
    assert results(tmp_path / "out") == results(whole)
    for name in ("samples.txt", "triplets.jsonl", "reference.pt"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_second_run_in_a_folder_stops_and_a_killed_one_does_not_keep_it(tmp_path, capsys, monkeypatch):
    first = start(tmp_path / "out", "--steps", "100000")
    while not (tmp_path / "out" / "world.pt").exists():
        time.sleep(0.05)
    assert "another run is at work" in refused([*TINY, "--out", "out"], tmp_path, capsys, monkeypatch)
    first.kill()
    first.communicate()
    assert train.main([*TINY, "--out", str(tmp_path / "out")]) == 0


def test_other_preferences_in_the_same_folder_are_never_mixed_with_what_was_made_of_the_first(tmp_path):
    """A run whose file, checkpoint or seed changed gives what it gives in an empty folder, even where the reference is the same."""
    (tmp_path / "init.pt").write_bytes(saved(checkpoints.checkpoint(train.GPT(train.GPTConfig(len(TOKENS) + 1, 64, 1, 2, 8)), TOKENS)))
    flags = ["--init", str(tmp_path / "init.pt"), "--context", "64", "--beta", "1", "--batch", "4"]
    turned = [p | dict(chosen=p["rejected"], rejected=p["chosen"]) for p in pairs()]
    for rows, where in ((pairs(), "one"), (turned, "one"), (turned, "two")):
        (tmp_path / "pairs.jsonl").write_bytes(lines(rows))
        assert train.main(["--data", str(tmp_path / "pairs.jsonl"), *flags, "--out", str(tmp_path / where)]) == 0
    assert results(tmp_path / "one") == results(tmp_path / "two")
    toy = [*TINY, "--init", str(tmp_path / "init.pt"), "--context", "64", "--steps", "0"]
    for seed, where in (("0", "three"), ("1", "three"), ("1", "four")):
        assert train.main([*toy, "--seed", seed, "--out", str(tmp_path / where)]) == 0
    assert results(tmp_path / "three") == results(tmp_path / "four")


def test_few_prompts_of_ones_own_are_enough(tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(lines(pairs(4)))
    argv = ["--data", str(tmp_path / "pairs.jsonl"), "--context", "32", "--steps", "2", "--vocab-size", "270", "--out", str(tmp_path / "out")]
    assert train.main(argv) == 0 and results(tmp_path / "out")["points"][0]["kl_se"] is None


def test_file_that_was_replaced_or_damaged_is_refused_and_made_again_once_deleted(tmp_path, capsys, monkeypatch):
    assert train.main([*TINY, "--out", str(tmp_path / "out")]) == 0
    whole, reference = results(tmp_path / "out"), tmp_path / "out" / "reference.pt"
    capsys.readouterr()
    for damage in (lambda b: b[:-100], lambda b: b[:5000] + b"\0" + b[5001:], lambda b: saved(GOOD)):
        good = reference.read_bytes()
        reference.write_bytes(damage(good))
        assert "reference.pt: is not the file that was written here" in refused([*TINY, "--out", "out"], tmp_path, capsys, monkeypatch)
        reference.unlink()
        assert train.main([*TINY, "--out", str(tmp_path / "out")]) == 0
        assert results(tmp_path / "out") == whole and reference.read_bytes() == good
        capsys.readouterr()
    (tmp_path / "out" / "stages.json").write_text("{")
    assert "stages.json" in refused([*TINY, "--out", "out"], tmp_path, capsys, monkeypatch)


def test_full_disk_is_one_clear_line_and_what_was_there_stays(tmp_path):
    """No file may grow beyond 100 kB, which the world does not reach and the reference does."""
    resource = pytest.importorskip("resource")
    files.write(tmp_path / "results.json", b"precious")
    done = subprocess.run([sys.executable, ROOT / "train.py", *TINY, "--out", tmp_path], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("train.py: ")
    assert "reference.pt" in done.stderr and "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "results.json", "stages.json", "world.pt"}
    assert (tmp_path / "results.json").read_bytes() == b"precious"


@pytest.mark.parametrize("stage", ["fine_tune", "optimise"])
def test_loss_that_is_not_finite_stops_the_run_and_says_the_step(stage, tmp_path, capsys, monkeypatch):
    calls, nll, logps = [], train.token_nll, train.dpo.response_logps

    def poisoned(*args):
        calls.append(None)
        return (nll if stage == "fine_tune" else logps)(*args) * (float("nan") if len(calls) > 2 else 1.0)
    if stage == "fine_tune":
        monkeypatch.setattr(train, "token_nll", poisoned)
        says, kept = "fine-tuning diverged: not finite at step 2", {"world.pt"}
    else:
        monkeypatch.setattr(train, "score", lambda pi, ids, mask: torch.zeros(ids.shape))
        monkeypatch.setattr(train.dpo, "response_logps", poisoned)
        says, kept = "beta 0.5 diverged: not finite at step 2", {"world.pt", "reference.pt", "completions.pt", "scores.pt", "held_out.pt"}
    assert train.main([*TINY, "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err and {p.name for p in tmp_path.glob("*.pt")} == kept


# ------------------------------------------------------------------------------------------------ anything at all

def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    """The good file with some bytes changed, taken out, repeated, or cut off; or bytes that nobody wrote."""
    def mutate(kind: int, seed: int) -> bytes:
        rng, b = random.Random(seed), bytearray(good)
        for _ in range(rng.randint(1, 4)):
            i = rng.randrange(len(b) + 1)
            j = min(len(b), i + rng.randint(1, 40))
            if kind == 0 and b:
                b[i % len(b)] = rng.randrange(256)
            elif kind == 1:
                del b[i:j]
            elif kind == 2:
                b[i:i] = b[i:j]
            else:
                del b[i:]
        return bytes(b)
    return st.builds(mutate, st.integers(0, 3), st.integers(0, 2 ** 32)) | st.binary(max_size=300)


def use(found: dict):
    """A checkpoint's model predicts, and its tokenizer encodes any text: what was let in is sound."""
    pi = train.GPT(train.GPTConfig(**found["config"]))
    pi.load_state_dict(found["weights"])
    assert tokens.tokenizer_of(found["tokens"]).decode(tokens.tokenizer_of(found["tokens"]).encode_ordinary("é¥\0 a")) == "é¥\0 a"
    assert pi(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, pi.config.vocab_size)


READERS = {"JSON lines": (own.read_pairs, lines(pairs(6)), lambda found: None),
           "archive": (data.read_imdb, members(), lambda found: None),
           "unpacked archive": (data.read_imdb, gzip.decompress(members()), lambda found: None),
           "checkpoint and tokenizer": (checkpoints.read_checkpoint, saved(GOOD), use)}


@pytest.mark.parametrize("reader", READERS)
def test_reader_of_any_bytes_succeeds_or_says_one_clear_line(reader, tmp_path_factory):
    read, good, use = READERS[reader]
    path = tmp_path_factory.mktemp("fuzz") / "file"

    @settings(max_examples=FUZZ)
    @given(mutated(good))
    def fuzz(content):
        path.write_bytes(content)
        began = time.perf_counter()
        try:
            use(read(path))
        except files.BadInput as e:
            assert str(path) in str(e)
        assert time.perf_counter() - began < 5 and path.read_bytes() == content
    path.write_bytes(good)
    use(read(path))
    fuzz()


@pytest.mark.parametrize("change", [lambda t: t[:200], lambda t: t + [b"a"], lambda t: [*t[:-1], 5], lambda t: "abc", lambda t: {}])
def test_tokenizer_of_other_tokens_is_refused(change, tmp_path):
    (tmp_path / "c.pt").write_bytes(saved(GOOD | dict(tokens=change(TOKENS))))
    with pytest.raises(files.BadInput, match="c.pt"):
        checkpoints.read_checkpoint(tmp_path / "c.pt")
