"""lib/stage.py: a result is reused exactly while nothing that can influence it changes."""

import ast
import dataclasses
import functools
import inspect
import linecache
import platform
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import data
import dpo
import train
from beyond import page
from lib import stage
from lib.stage import Stage, stage_key
import tiny
from tiny import CPU, ROOT, saved, target

LOSS = """import dpo

SCALE = 1.0

def scaled(losses):
    return losses * SCALE

def my_loss(logps, batch, beta, scale=1.0):
    losses, r_hat_w, r_hat_l = dpo.dpo(logps, batch, beta)
    return scale * scaled(losses), r_hat_w, r_hat_l
"""
FILES = [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")]
FILES += [ROOT / "beyond" / name for name in ("custom_data.py", "convert.py", "monitor.py")]
FILES = list(map(str, FILES))
SOURCES = {path: Path(path).read_text(encoding="utf-8").splitlines(True) for path in FILES}
TREES = {path: ast.parse("".join(lines)) for path, lines in SOURCES.items()}
DEFINITIONS = {
    (path, node.name): node
    for path, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}


@pytest.fixture
def edit(monkeypatch):
    """edit({(path, name): [(line, column, text), ...]}) inserts text into definitions.

    Python's `inspect` then sees the edited sources. The files stay as they are. Unedited
    definitions are parsed once.
    """
    parse = stage.code_of.__wrapped__
    trees, edited = {}, set()

    def code_of(definition):
        name = inspect.getsourcefile(definition), definition.__qualname__.split(".")[0]
        if name in edited:
            return parse(definition)
        if definition not in trees:
            trees[definition] = parse(definition)
        return trees[definition]

    def edit(inserts: dict):
        for path, _ in edited:
            linecache.cache.pop(path, None)
        edited.clear()
        edited.update(inserts)
        for path in {path for path, _ in inserts}:
            lines = [line.encode() for line in SOURCES[path]]
            places = [p for (file, _), found in inserts.items() if file == path for p in found]
            for line, column, text in sorted(places, reverse=True):
                before, after = lines[line - 1][:column], lines[line - 1][column:]
                lines[line - 1] = before + text.encode() + after
            lines = [line.decode() for line in lines]
            linecache.cache[path] = (0, None, lines, path)  # None: never read from disk again

    monkeypatch.setattr(stage, "code_of", code_of)
    yield edit
    edit({})


@pytest.fixture(params=["toy", "imdb", "own"])
def calls(request, toy):
    """A run, and its stages by name. Stages of the toy run, and of further betas, occur once."""
    run = request.getfixturevalue(request.param)
    found = {target(function): name for name, (function, _) in reversed(run.calls.items())}
    known = {target(function) for function, _ in toy.calls.values() if run is not toy}
    return run, {name: run.calls[name] for code, name in found.items() if code not in known}


def test_editing_any_definition_a_stage_executes_changes_its_key(calls, edit):
    """A profiler records the functions of the project that a run executes, stage by stage."""
    run, stages = calls
    missed, count = [], 0
    for name, (function, args) in stages.items():
        before = stage_key(function, args)
        executed = {(c.co_filename, c.co_qualname.split(".")[0]) for c in run.executed[name]}
        for definition in executed & DEFINITIONS.keys():
            node = DEFINITIONS[definition]
            edit({definition: [(node.end_lineno, node.end_col_offset, "; 0")]})
            count += 1
            if stage_key(function, args) == before:
                missed.append((name, definition[1]))
        edit({})
        assert stage_key(function, args) == before
    assert not missed and count > 5


def test_changing_any_constant_a_stage_reads_changes_its_key(calls, toy, edit, monkeypatch):
    run, stages = calls
    missed, seen = [], set()
    for name, (function, args) in stages.items():
        before = stage_key(function, args)
        for code, names in run.executed[name].items():
            for constant in set(code.co_names) & names.keys():
                value = names[constant]
                if callable(value) or isinstance(value, ModuleType) or constant.startswith("__"):
                    continue
                seen.add(constant)
                with monkeypatch.context() as patch:
                    patch.setitem(names, constant, ("changed", constant))
                    if stage_key(function, args) == before:
                        missed.append((name, constant))
    assert not missed
    if run is toy:
        assert seen >= {"BETAS", "GRAMMAR", "OPTIMIZERS", "PATTERN"}


def cosmetic(node: ast.AST) -> list[tuple[int, int, str]]:
    """Insertions that change no code: comments, and into docstrings."""
    places = [(node.end_lineno, node.end_col_offset, "  # edited")]
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            text = inner.body[0]
            places.append((text.end_lineno, text.end_col_offset - 3, " Edited. "))
    return places


def test_comments_and_docstrings_change_no_key(calls, edit):
    _, stages = calls
    before = {name: stage_key(*call) for name, call in stages.items()}
    edit({name: cosmetic(node) for name, node in DEFINITIONS.items()})
    assert {name: stage_key(*call) for name, call in stages.items()} == before


DPO, EVAL = ["dpo-0.5", "dpo-2"], ["eval-0.5", "eval-2"]
MODEL = ["reference", "completions", "eval_set", *DPO, *EVAL]
DEPENDENTS = {  # all stages of the toy run that depend on a definition
    "dpo_loss": DPO + EVAL,
    "frontier": EVAL,
    "bradley_terry": ["preferences", "eval_set"],
    "sample": ["completions", "eval_set", *DPO, *EVAL],
    "Attention": MODEL,
    "toy_reviews": ["dataset"],
    "read_imdb": [],
    "label_pairs": ["preferences", "eval_set"],
    "sft": ["reference"],
    "complete": ["completions"],
    "train_dpo": DPO,
    "Monitor": DPO,
    "fast_response_logps": MODEL,  # and completions, by way of `Inference`
    "fraction_of_optimal": EVAL,
    "load_pairs": [],
    "parse": [],
    "run": [],
    "main": [],
}


@pytest.mark.parametrize("name", DEPENDENTS)
def test_editing_a_definition_changes_the_keys_of_its_dependents_only(name, toy, edit):
    before = {stage: stage_key(*call) for stage, call in toy.calls.items()}
    definition = next(d for d in DEFINITIONS if d[1] == name)
    node = DEFINITIONS[definition]
    edit({definition: [(node.end_lineno, node.end_col_offset, "; 0")]})
    after = {stage: stage_key(*call) for stage, call in toy.calls.items()}
    assert [stage for stage in after if after[stage] != before[stage]] == [
        stage for stage in after if stage in DEPENDENTS[name]
    ]


# ------------------------------------------------- settings


def keys_with(run, **settings) -> dict[str, str]:
    """The keys of a run's stages with other settings, if all results stayed the same."""
    keys = {}

    def stage(name, function, *args):
        keys[name] = stage_key(function, args)
        if name in run.returned:
            return run.returned[name]
        kind, beta = "eval" if name.startswith("eval") else "dpo", name.split("-")[-1]
        return run.returned.get(f"{kind}-{beta}", run.returned[f"{kind}-0.5"])

    stage.seconds, stage.folder = {}, Path()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_results", "write_page"):
            patch.setattr(page, name, lambda *args: None)
        patch.setattr(train, "Stage", lambda folder: stage)  # of the IMDb reviews
        train.run(dataclasses.replace(run.cfg, **settings), stage, CPU)
    return keys


def different(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in after if after[name] != before.get(name)]


FIELDS = {field.name for field in dataclasses.fields(train.Config)}
PREFERENCES = ["preferences"]
SETTINGS = {  # another value of each setting, and the stages that use it
    "seed": (1, ["dataset", *MODEL, *PREFERENCES]),
    "labels": ("soft", ["eval_set", *PREFERENCES, *EVAL]),
    "pairs": ("best-worst", ["eval_set", *PREFERENCES, *EVAL]),
    "beta": ((0.25, 2.0), ["dpo-0.25", "eval-0.25"]),
    "loss": ("users.py:my_loss", ["my_loss-0.5", "my_loss-2"]),
    "loss_args": (("scale=2",), ["my_loss-0.5", "my_loss-2"]),
    "init": ("init.pt", ["reference"]),
    "from_scratch": (True, ["reference"]),
    "context": (20, ["dataset", "reference"]),
    "shape": ((2, 2, 16), ["reference"]),
    "reviews": (140, ["dataset"]),
    "sft_steps": (5, ["reference"]),
    "sft_batch_size": (9, ["reference"]),
    "prompts": (15, ["dataset"]),
    "completions": (4, ["completions", "eval_set", *EVAL]),
    "frozen": (1, DPO),
    "optimizer": ("adamw", DPO),
    "lr": (0.02, DPO),
    "epochs": (2, DPO),
    "batch_size": (4, DPO),
    "eval_prompts": (3, ["dataset"]),
    "ref_samples": (48, ["eval_set", *EVAL]),
    "eval_samples": (24, ["eval_set", *EVAL]),
}


@pytest.mark.parametrize("name", sorted(FIELDS - {"data", "imdb"}))  # these have the next test
def test_every_setting_changes_the_keys_of_the_stages_that_use_it(name, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("users.py").write_text(LOSS)
    Path("init.pt").write_bytes(saved(tiny.checkpoint()))
    value, expected = SETTINGS[name]
    base = {"loss_args": {"loss": "users.py:my_loss"}, "from_scratch": {"init": "init.pt"}}
    base = base.get(name, {})
    before, after = keys_with(toy, **base), keys_with(toy, **base, **{name: value})
    assert sorted(different(before, after)) == sorted(expected)


def test_files_are_keyed_by_content(imdb, own, tmp_path):
    """A path that a setting names may change, but not the file's content."""
    for run, name, content in (
        (imdb, "imdb", tiny.archive(n=230)),
        (own, "data", tiny.lines(tiny.pairs(40))),
        (own, "init", saved(tiny.checkpoint() | {"extra": 1})),
    ):
        old = Path(getattr(run.cfg, name))
        path = tmp_path / f"{name}{''.join(old.suffixes)}"
        value = path if name == "imdb" else str(path)
        path.write_bytes(old.read_bytes())
        before = keys_with(run)
        assert keys_with(run, **{name: value}) == before
        path.write_bytes(content)
        first = {"imdb": "reviews", "data": "dataset", "init": None}[name]
        assert different(before, keys_with(run, **{name: value})) == [first] * (first is not None)


# ------------------------------------------------- captured values


def closure(beta):
    return lambda logps, batch: dpo.dpo(logps, batch, beta)


def default(beta):
    def loss(logps, batch, beta=beta):
        return dpo.dpo(logps, batch, beta)

    return loss


class Method:
    def __init__(self, beta):
        self.beta = beta

    def loss(self, logps, batch):
        return dpo.dpo(logps, batch, self.beta)


@pytest.mark.parametrize("make", [closure, default, lambda beta: Method(beta).loss])
def test_values_captured_by_a_function_are_in_the_key_or_refused(make):
    try:
        keys = [stage_key(make(beta), ()) for beta in (0.1, 0.2, 0.1)]
    except TypeError:
        return
    assert keys[0] == keys[2] != keys[1]


# ------------------------------------------------- values and versions

ONE = torch.ones(1)
DIFFERENT = [
    None, False, True, 0, 1, 1.0, -0.0, 0.0, 1 << 70, float("nan"), float("inf"), "1", b"1", "",
    [], (), {}, [1], (1,), [[1], 2], [[1, 2]], {1}, {1, 2}, {"a": 1}, {"a": 2}, {"b": 1}, {1: "a"},
    ONE, ONE.double(), ONE.int(), ONE[None], ONE[:0], ONE.expand(2), 2 * ONE, [ONE], {"a": ONE},
    [ONE, ONE], np.ones(1), np.zeros(1), CPU, torch.device("meta"), dpo.dpo, dpo.dpo_loss,
    functools.partial(dpo.dpo, beta=1), functools.partial(dpo.dpo, beta=2), dpo.Preferences,
    data.WordReward({"a": 1}), data.WordReward({"a": 2}), torch.optim.SGD, torch.optim.AdamW,
]  # fmt: skip


def test_different_values_have_different_keys_and_equal_ones_the_same():
    def key(value):
        try:
            return stage_key(dpo.dpo, (value,))
        except TypeError:
            return id(value)  # refused

    keys = [key(value) for value in DIFFERENT]
    assert len(set(keys)) == len(keys)
    assert keys == [key(value) for value in DIFFERENT]


@pytest.mark.parametrize("make", [lambda: (i for i in ()), lambda: open(__file__)])
def test_a_value_without_a_content_is_refused(make):
    with pytest.raises(TypeError, match="cannot pickle"):
        stage_key(dpo.dpo, (make(),))


@pytest.mark.parametrize(
    "module, name, value",
    [
        (torch, "__version__", "1.0"),
        (platform, "python_version", lambda: "3.0"),
        (stage, "bf16_supported", lambda device: "other"),
    ],
)
def test_another_version_or_processor_is_another_key(module, name, value, toy, monkeypatch):
    function, args = toy.calls["reference"]
    before = stage_key(function, args)
    monkeypatch.setattr(module, name, value)
    assert stage_key(function, args) != before


# ------------------------------------------------- files


def double(x):
    double.calls += 1
    return {"twice": 2 * x}


@pytest.fixture
def run(tmp_path):
    """run() is the result of a cached stage; run.calls counts executions."""
    double.calls = 0
    return lambda x=3: Stage(tmp_path)("double", double, x)["twice"]


def test_a_result_is_computed_once_and_again_for_other_arguments(run):
    assert [run(), run(), run(4), run(4), run()] == [6, 6, 8, 8, 6]
    assert double.calls == 3


class Executed:
    def __reduce__(self):
        return Path("executed").touch, ()


DAMAGE = {
    "truncated": lambda good: good[:-20],
    "empty": lambda good: b"",
    "text": lambda good: b"text",
    "code": lambda good: saved(Executed()),
    "code in a stage": lambda good: saved({"key": "", "seconds": 1.0, "value": Executed()}),
    "a path": lambda good: saved([Path("x")]),
    "a number": lambda good: saved(7),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_computed_again(damage, run, tmp_path, monkeypatch, capsys):
    """It executes nothing, and one line names it."""
    monkeypatch.chdir(tmp_path)
    run()
    path = tmp_path / "double.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert run() == 6 and double.calls == 2
    assert "double.pt: is damaged, and is computed again" in capsys.readouterr().out
    assert run() == 6 and double.calls == 2 and "damaged" not in capsys.readouterr().out
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [{"twice": 7}, [1], {"key": "another", "value": {"twice": 7}}])
def test_a_file_of_something_else_is_computed_again(content, run, tmp_path):
    (tmp_path / "double.pt").write_bytes(saved(content))
    assert run() == 6 and double.calls == 1


def test_a_flipped_bit_never_gives_a_wrong_result(run, tmp_path):
    assert run() == 6
    path = tmp_path / "double.pt"
    good = path.read_bytes()
    for i in range(0, len(good), 7):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
        assert run() == 6
    assert double.calls > 10


def test_a_write_interrupted_leaves_the_old_result(run, tmp_path, monkeypatch):
    """Key and value are in one file, which is written completely or not at all."""
    assert run(3) == 6

    def interrupted(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "atomic_write", interrupted)
        run(10)
    assert [run(3), run(10), run(3)] == [6, 20, 6] and double.calls == 4


def test_each_stage_says_whether_it_is_cached(run, capsys):
    run()
    run()
    assert capsys.readouterr().out.splitlines() == ["[double]", "[double] cached"]
