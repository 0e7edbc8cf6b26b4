"""The house that README promises: four scripts that read downwards, in lines that fit, and imports that run one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"model": set(), "prepare": {"model"}, "sample": {"model", "prepare"},
           "train": {"model", "prepare", "sample"}}  # what each may import


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_fits_its_page_and_its_machinery_comes_last(name):
    text = (ROOT / f"{name}.py").read_text()
    assert max(map(len, text.splitlines())) <= 110
    teaches, machinery = re.split("^# ----- machinery", text, flags=re.M)  # one marked line
    assert len(teaches.splitlines()) < 430 and machinery
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.IfExp):  # no conditional within a conditional
            assert sum(isinstance(child, ast.IfExp) for child in ast.walk(node)) == 1, node.lineno
        if isinstance(node, ast.Subscript):
            assert not any(isinstance(child, ast.NamedExpr) for child in ast.walk(node.slice))


def test_what_teaches_is_short():
    texts = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    assert sum(len(text.split("\n# ----- machinery")[0].splitlines()) for text in texts) < 1300


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_run_one_way(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    ours = set(SCRIPTS) | {path.stem for path in (ROOT / "notebooks").glob("*.py")}
    assert imported & ours <= SCRIPTS[name]


def test_the_loop_fits_a_slide_and_defines_nothing():
    train = next(f for f in functions(ast.parse((ROOT / "train.py").read_text())) if f.name == "train")
    assert train.end_lineno - train.lineno < 48 and functions(train) == [train]
    assert not any(isinstance(node, ast.Lambda) for statement in train.body for node in ast.walk(statement))


def test_every_public_function_says_what_it_does():
    for name in SCRIPTS:
        for node in functions(ast.parse((ROOT / f"{name}.py").read_text())):
            plain = node.name in ("forward", "main") or node.name.startswith("__") or node.end_lineno - node.lineno < 3
            assert ast.get_docstring(node) or plain, node.name
