"""derive.ipynb: a fresh run agrees with the stored outputs, and the exercises can be solved."""

import dis
import re
import subprocess
import sys
from collections import Counter

import nbformat
import pytest
from nbclient import NotebookClient

from solutions import RIGHT, WRONG
from tiny import ROOT

PATH = ROOT / "derive.ipynb"
STORED = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in STORED.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    streams = [o for o in cell.outputs if o.output_type == "stream"]
    return "".join(o.text for o in streams if o.name == "stdout")


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def statements(cell) -> list[str]:
    """The statements of the checks that a cell printed."""
    return re.findall(r"^(.+)\n    left ", printed(cell), re.M)


def same_text(text: str, stored: str) -> bool:
    """The same words, and nearly the same numbers. Rounding errors may differ."""
    rounding = r"(largest difference|smallest gap) +\S+"
    number = r"-?\b\d+\.?\d*(?:e[+-]\d+)?\b|\bnan\b"
    texts = [re.sub(rounding, r"\1", t) for t in (text, stored)]
    words, stored_words = (re.sub(number, "#", t).split() for t in texts)
    numbers, stored_numbers = ([*map(float, re.findall(number, t))] for t in texts)
    expected = pytest.approx(stored_numbers, rel=0.02, abs=0.01, nan_ok=True)
    return words == stored_words and numbers == expected


@pytest.fixture(scope="module")
def run():
    """A fresh run's code cells, and a function that runs more source in the same kernel."""
    fresh = nbformat.from_dict(STORED)
    where = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(fresh, timeout=300, kernel_name="python3", resources=where)

    def execute(source: str) -> str:
        fresh.cells.append(nbformat.v4.new_code_cell(source))
        return printed(client.execute_cell(fresh.cells[-1], len(fresh.cells) - 1))

    with client.setup_kernel():
        for n, cell in enumerate(fresh.cells):
            client.execute_cell(cell, n)  # raises where the cell does
        cells = [cell for cell in fresh.cells if cell.cell_type == "code"]
        execute(f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import solutions")
        yield cells, execute


def test_outputs_are_stored_from_one_run_in_order():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {output.output_type for cell in CODE for output in cell.outputs}
    assert kinds == {"stream", "display_data"}  # in particular no errors
    assert PATH.stat().st_size < 700_000


def test_a_fresh_run_agrees_with_the_stored_outputs(run):
    """If it does not: `jupyter execute --inplace derive.ipynb`.

    Cells tagged "trained" depend on float32 training: only their checks and the number of figures
    are compared. The cell tagged "experiment" depends on the committed results.
    """
    fresh, _ = run
    for cell, stored in zip(fresh, CODE, strict=True):
        tags = stored.metadata.get("tags", ())
        if "experiment" in tags:
            continue
        assert pictures(cell) == pictures(stored), stored.source
        if "trained" in tags:
            assert statements(cell) == statements(stored), stored.source
        else:
            assert same_text(printed(cell), printed(stored)), (printed(cell), printed(stored))


def test_the_last_figure_shows_the_committed_results_and_a_missing_one_is_skipped(run):
    """Each of the two datasets has two checks."""
    fresh, execute = run
    (cell,) = [c for c in fresh if "experiment" in c.metadata.get("tags", ())]
    assert len(statements(cell)) == 4 and pictures(cell) == 1
    out = execute("print(load_results('no-such-run'))")
    assert out == "results/no-such-run/results.json is missing: its figure is skipped\nNone\n"


def test_the_comparison_of_outputs_can_fail():
    assert same_text("a 1.001 largest difference 1e-16", "a 1.002 largest difference 0")
    assert not same_text("a 1.2 b", "a 1.1 b")
    assert not same_text("a 1.2 b", "a 1.2 c")
    assert not same_text("a 1.2", "a 1.2 1.2")


def test_every_section_with_an_equation_has_a_check():
    """A formula on a line of its own is followed by a check, before the next section."""
    checks = []
    for cell in STORED.cells:
        if cell.cell_type == "markdown" and "$$" in cell.source:
            checks.append(0)
        elif cell.cell_type == "code" and checks:
            checks[-1] += len(statements(cell))
    assert len(checks) > 20 and all(checks), checks


def test_a_check_prints_both_sides_and_fails_on_a_difference(run):
    _, execute = run
    out = execute("check('two', torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))")
    assert out == "two\n    left 1.0000 2.0000   right 1.0000 2.0000   largest difference 0.0e+00\n"
    calls = ("check('x', 1, 1.1)", "check('x', 1, math.nan)", "check_less('x', 1, 1)",
             "check_less('x', 1, math.nan)", "check_differs('x', 1, 1)")  # fmt: skip
    for call in calls:
        tried = f"try:\n    {call}\nexcept AssertionError as e:\n    print('failed', e)"
        assert execute(tried).endswith("failed x\n"), call


def test_a_name_keeps_one_meaning():
    """No name is assigned in two cells, except loop variables and the curves of a plot."""
    counts = Counter()
    for cell in CODE:
        instructions = dis.get_instructions(compile(cell.source, "cell", "exec"))
        counts.update({i.argval for i in instructions if i.opname == "STORE_NAME"})
    repeated = {name for name, n in counts.items() if n > 1}
    assert repeated <= {"_", "b", "k", "label", "name", "style", "lines"}


def test_the_first_cell_explains_a_missing_repository(tmp_path):
    command = [sys.executable, "-c", CODE[0].source]
    found = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "found dpo.py\n")
    lost = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert lost.returncode == 1
    assert re.fullmatch(r"dpo\.py was not found: .+ REPOSITORY .+\n", lost.stderr)


def test_the_first_cell_clones_the_repository(tmp_path):
    origin, elsewhere = tmp_path / "origin", tmp_path / "elsewhere"
    origin.mkdir()
    elsewhere.mkdir()
    for name in ("dpo.py", "model.py"):
        (origin / name).write_text("")
    who = "-c user.name=a -c user.email=a@b.c"
    for command in ("git init -q", "git add .", f"git {who} commit -qm files"):
        subprocess.run(command.split(), cwd=origin, check=True)
    source = CODE[0].source.replace('REPOSITORY = ""', f"REPOSITORY = {origin.as_uri()!r}")
    for _ in range(2):  # running the cell again is harmless
        done = subprocess.run([sys.executable, "-c", source], cwd=elsewhere, capture_output=True)
        assert done.stdout.decode().splitlines() == ["found dpo.py"]


def answered(execute, name: str, answer: str) -> str:
    """What the cell of an exercise prints for an answer."""
    (cell,) = [c.source for c in CODE if re.search(rf"exercise\(\s*{name},", c.source)]
    return execute(f"{name} = {answer}\n{cell}")


@pytest.mark.parametrize("name", RIGHT)
def test_an_exercise_waits_for_an_answer_and_accepts_the_solution(run, name):
    assert answered(run[1], name, "None") == "not answered yet\n"
    assert answered(run[1], name, f"solutions.RIGHT[{name!r}]") == "correct\n"


@pytest.mark.parametrize("name, mistake", [(n, mistake) for n in WRONG for mistake in WRONG[n]])
def test_a_wrong_answer_is_told_what_is_wrong(run, name, mistake):
    said = answered(run[1], name, f"solutions.WRONG[{name!r}][{mistake!r}]")
    assert re.fullmatch(r"wrong: .+\n", said), said


def test_the_table_of_contents_reaches_every_equation():
    """Equations 1 to 22 are listed, and each link has an anchor above a heading of that name."""
    contents, *sections = [c.source for c in STORED.cells if c.cell_type == "markdown"]
    column = " ".join(re.findall(r"^\| ([\d, to]+) \|", contents, re.M))
    ranges = re.findall(r"\b(\d+)(?: to (\d+))?", column)
    listed = {n for first, last in ranges for n in range(int(first), int(last or first) + 1)}
    assert listed == set(range(1, 23))
    anchors = re.findall(r'<a id="(.+)"></a>\n#+ (.+)', "\n".join(sections))
    assert all(anchor == heading.lower().replace(" ", "-") for anchor, heading in anchors)
    assert re.findall(r"\(#(.+?)\)", contents) == [anchor for anchor, _ in anchors]
    assert "(tests/solutions.py)" in contents
