"""derive.ipynb is true: it runs from top to bottom, prints what it was saved with, and its exercises know right from wrong."""
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from solutions import RIGHT, WRONG

ROOT = Path(__file__).resolve().parent.parent
SAVED = nbformat.read(ROOT / "derive.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(cell):
    """What a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def check_cell(exercise):
    source, = [cell.source for cell in code_cells(SAVED) if f"check({exercise}," in cell.source]
    return source


@pytest.fixture(scope="module")
def run():
    """A fresh run from top to bottom: its code cells, and a function that runs more source in the kernel it leaves behind."""
    fresh = nbformat.from_dict(SAVED)
    client = NotebookClient(fresh, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})

    def execute(source):
        fresh.cells.append(nbformat.v4.new_code_cell(source))
        return text(client.execute_cell(fresh.cells[-1], len(fresh.cells) - 1))

    with client.setup_kernel():
        for n, cell in enumerate(SAVED.cells):
            client.execute_cell(nbformat.from_dict(cell), n)        # raises where the cell does
        cells = code_cells(fresh)
        execute(f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import solutions")
        yield cells, execute


def test_a_fresh_run_prints_what_was_saved(run):
    """No cell fails => each prints the text, and draws as many pictures, as the file that readers see."""
    fresh, _ = run

    def shown(cell):
        return cell.source, text(cell), sum("image/png" in output.get("data", {}) for output in cell.outputs)

    assert [shown(cell) for cell in fresh] == [shown(cell) for cell in code_cells(SAVED)]


def test_every_section_asserts_what_it_claims():
    """A section with a formula on a line of its own has an assert after it."""
    sections = []
    for cell in SAVED.cells:
        if cell.cell_type == "markdown" and "$$" in cell.source:
            sections.append([cell.source.strip().splitlines()[0], 0])
        elif cell.cell_type == "code" and sections:
            sections[-1][1] += cell.source.count("assert ")
    assert sections and all(asserts for _, asserts in sections), sections


@pytest.mark.parametrize("exercise", RIGHT)
def test_an_exercise_waits_for_its_answer(run, exercise):
    assert run[1](f"{exercise} = None\n" + check_cell(exercise)) == "not yet\n"


@pytest.mark.parametrize("exercise", RIGHT)
def test_a_right_answer_is_right(run, exercise):
    assert run[1](f"{exercise} = solutions.RIGHT[{exercise!r}]\n" + check_cell(exercise)) == "right\n"


@pytest.mark.parametrize("exercise, mistake", [(exercise, mistake) for exercise in WRONG for mistake in WRONG[exercise]])
def test_a_wrong_answer_is_told_what_is_wrong(run, exercise, mistake):
    """Not *right*, not *not yet*, no exception: one line that says what does not hold."""
    said = run[1](f"{exercise} = solutions.WRONG[{exercise!r}][{mistake!r}]\n" + check_cell(exercise))
    assert re.fullmatch(r"(not so: |\w+Error: ).+\n", said), said


def test_the_table_of_contents_reaches_every_equation():
    """Equations 1 to 22 are listed, and each link has its anchor, spelled as the heading's own, just above the heading."""
    contents, *sections = [cell.source for cell in SAVED.cells if cell.cell_type == "markdown"]
    listed = set()
    for first, last in re.findall(r"\b(\d+)(?: to (\d+))?", " ".join(re.findall(r"^\| ([\d, to]+)", contents, re.M))):
        listed |= set(range(int(first), int(last or first) + 1))
    assert listed == set(range(1, 23))
    anchors = re.findall(r'<a id="(.+)"></a>\n#+ (.+)', "\n".join(sections))
    assert all(anchor == heading.lower().replace(" ", "-") for anchor, heading in anchors)
    assert re.findall(r"\(#(.+?)\)", contents) == [anchor for anchor, _ in anchors]
