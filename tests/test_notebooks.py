"""The notebooks: what is stored in them is whole, and each runs from top to bottom in a copy of the project."""

import ast
import json
import math
import re
import resource
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted([*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks/solutions").glob("*.ipynb")])
SCRIPTS = ("model", "train", "sample", "prepare")
BUDGET = 300  # seconds for all notebooks together, of processor time, so that a busy machine fails nothing
spent = {}

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: f"{path.stem}-solutions" if path.parent.stem == "solutions" else path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def same(a, b):
    """Whether two printed texts agree: the words to the letter, the numbers to 1 % or 0.003."""
    number = r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?"
    if " ".join(re.sub(number, "#", a).split()) != " ".join(re.sub(number, "#", b).split()):
        return False
    values = [[float(x.replace(",", "")) for x in re.findall(number, text)] for text in (a, b)]
    return all(math.isclose(x, y, rel_tol=0.01, abs_tol=0.003) for x, y in zip(*values, strict=True))


def test_the_comparison_of_texts_sees_what_differs():
    assert same("AR = 3.149, epoch 16", "AR  = 3.150, epoch 16") and same("1,024 at 5e+12", "1,024 at 5.01e+12")
    assert not same("AR = 3.149", "AR = 3.249") and not same("a crosses", "b crosses") and not same("1 2", "1")


@each_notebook
def test_stored_state_is_that_of_one_run_without_errors(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    for cell in cells:  # what draws has its picture
        assert "plt.show()" not in cell.source or any("image/png" in output.get("data", {}) for output in cell.outputs)
    assert "python 3" in json.dumps(cells[0].outputs) and path.stat().st_size < 1_000_000
    text = "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert not re.search(r"Warning|Traceback|(?<![\w.])/(home|root|tmp|work|usr)/", text)
    assert not any(output.get("name") == "stderr" for output in outputs)


@each_notebook
def test_defines_nothing_that_the_scripts_have(path):
    def defined(source):
        source = re.sub(r"^%.*", "", source, flags=re.M)  # IPython's own commands
        return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}

    public = set().union(*(defined((ROOT / f"{name}.py").read_text()) for name in SCRIPTS)) - {"forward"}
    assert not public & set().union(*(defined(cell.source) for cell in code_cells(path)))


@each_notebook
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    folder = tmp_path / path.parent.relative_to(ROOT)
    if (ROOT / "data").exists():
        shutil.copytree(ROOT / "data", tmp_path / "data")  # else a notebook that trains prepares it
    monkeypatch.setenv("FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    stored, book = nbformat.read(path, 4), nbformat.read(path, 4)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    NotebookClient(book, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    fast = any("fast" in output.get("text", "") for output in book.cells[1].outputs)
    assert fast or not any("FAST" in cell.source for cell in stored.cells if cell.cell_type == "code")
    for old, new in list(zip(stored.cells, book.cells, strict=True))[2:]:  # the first prints the versions
        if "varies" not in old.metadata.get("tags", []):  # what trains or takes the time, or hangs on the last digits
            assert same(printed(old), printed(new)), f"stale: {old.source[:60]!r}\n{printed(old)}\n{printed(new)}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent[path] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert sum(spent.values()) < BUDGET, spent
