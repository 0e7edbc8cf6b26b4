"""notebooks/watch.py: what a person sees on a terminal, and where there is none."""

import io
import json
import re
import sys
from dataclasses import asdict

import pytest

import prepare
import sample
import watch
from conftest import tiny
from model import save_checkpoint

TOKENIZER = prepare.Tokenizer({"kind": "char", "characters": "\n .abcw123"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of small random networks, as train.py leaves them."""
    folder = tmp_path_factory.mktemp("out")
    for name in ("ar", "diffusion"):
        model = tiny(name, TOKENIZER.vocab_size, 32).float()
        (folder / name).mkdir()
        save_checkpoint(folder / name / "best.pt", {
            "config": asdict(model.config) | {"dtype": "float32"}, "state": {"step": 7},
            "tokenizer": TOKENIZER.spec, "model": model.state_dict()})
    return folder


def text_of(capsys, run, *how):
    """What sample.py writes with the same flags."""
    assert sample.main([f"--run={run}", *how, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["samples"][0]


def plain(text):
    return re.sub(r"\s", "", text)


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screens(self):
        """What a person saw: the screen (without colours) whenever the cursor went up, and at the end."""
        lines, row, seen = [], 0, []
        for part in re.split(r"(\n|\033\[\d+A)", re.sub(r"\033\[[\d;]*m", "", self.getvalue())):
            if part == "\n":
                row += 1
            elif part.startswith("\033"):
                seen.append([*lines])
                row -= int(part[2:-1])
                assert row >= 0
            elif part:
                lines += [""] * (row + 1 - len(lines))
                lines[row] = part + lines[row][len(part):]
        return [*seen, lines]


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_on_a_terminal_the_text_develops(runs, capsys, monkeypatch, name):
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("COLUMNS", "30")
    how = ["--num_samples=1", "--length=50"]
    text, terminal = text_of(capsys, runs / name, *how), Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert watch.main([str(runs / name), *how]) == 0
    screens = terminal.screens()
    assert len(screens) == 52  # before the first forward pass, after each of 50, and at rest
    body = ["".join(screen[2:]) for screen in screens]  # after the two header lines
    assert plain(body[-1]) == plain(text) and "░" not in body[-1]
    left = [screen.count("░") for screen in body]
    if name == "diffusion":
        assert left[0] >= 50 and left == sorted(left, reverse=True) and left[-2] == 0
    else:
        assert not any(left) and not body[0].strip()
    assert terminal.getvalue().count("\033[7m") == len(text)  # every character was new once


def test_ctrl_c_ends_without_a_traceback(runs, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(watch.time, "sleep", interrupt)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert watch.main([str(runs / "ar"), "--length=9"]) == 130


def test_without_a_terminal_two_runs_stand_side_by_side_at_once(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "43")
    how = ["--num_samples=1", "--length=60", "--prompt=w1a"]
    texts = [text_of(capsys, runs / name, *how, *steps) for name, steps in (("ar", []), ("diffusion", ["--steps=3"]))]
    assert watch.main([str(runs / "ar"), str(runs / "diffusion"), *how, "--steps=3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "ar, step 7" in out[0] and "diffusion, step 7" in out[1] and "\033" not in "".join(out)
    columns = [[line.split(" │ ")[side] for line in out[3:]] for side in (0, 1)]
    assert {len(line) for column in columns for line in column} == {19}
    for column, text in zip(columns, texts, strict=True):
        assert plain("".join(column)) == plain(text)


@pytest.mark.parametrize("argv, named", [(["a", "b", "c"], "3 runs"), (["none"], "none/best.pt"),
                                         (["ar", "--steps=3"], "for diffusion"),
                                         (["ar", "diffusion", "--infill=a ____"], "for diffusion")])
def test_errors_name_what_is_wrong(runs, capsys, monkeypatch, argv, named):
    monkeypatch.chdir(runs)
    assert watch.main(argv) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
