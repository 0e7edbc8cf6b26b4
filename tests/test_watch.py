"""notebooks/watch.py: what a person sees on a terminal, and where there is none."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageSequence
from wcwidth import wcswidth, wcwidth

import prepare
import sample
import watch
from conftest import tiny
from model import load_checkpoint, model_from_checkpoint, save_checkpoint

TOKENIZER = prepare.Tokenizer({"kind": "char", "characters": "\n .abcw123"})
# Tabs, CRLF, wide, combining and joining characters, half flags, odd spaces, and what steers a terminal.
STRANGE = prepare.Tokenizer({"kind": "char", "characters": (
    "\n\r\t ab\u6f22\U0001f469\U0001f3fd\u200d\u0301\ufe0f\u2764\U0001f1e9\U0001f1ea\u3000\xa0"
    "\x1b\x07\x9b\0\u202e\u1161\xad\ue000")})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of small random networks, as train.py leaves them."""
    folder = tmp_path_factory.mktemp("out")
    for name in ("ar", "diffusion", "strange-ar", "strange-diffusion"):
        tokenizer = STRANGE if "strange" in name else TOKENIZER
        model = tiny(name.split("-")[-1], tokenizer.vocab_size, 32).float()
        (folder / name).mkdir()
        save_checkpoint(folder / name / "best.pt", {
            "config": asdict(model.config) | {"dtype": "float32"}, "state": {"step": 7},
            "tokenizer": tokenizer.spec, "model": model.state_dict()})
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
                                         (["ar", "diffusion", "--infill=a ____"], "for diffusion"),
                                         (["ar", "diffusion", "--half=x.pt"], "takes one run"),
                                         (["ar", "--gif=none/x.gif", "--length=3"], "none/")])
def test_errors_name_what_is_wrong(runs, capsys, monkeypatch, argv, named):
    monkeypatch.chdir(runs)
    assert watch.main(argv) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_a_gif_shows_every_forward_pass_of_both(runs, capsys, tmp_path):
    both, how = [str(runs / "ar"), str(runs / "diffusion")], ["--num_samples=1", "--length=9", "--prompt=w1a"]
    for name in ("a.gif", "b.gif"):
        assert watch.main([*both, *how, f"--gif={tmp_path / name}"]) == 0
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    assert "a.gif: 8 frames" in capsys.readouterr().out
    with Image.open(tmp_path / "a.gif") as film:
        frames = [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(film)]
    assert len(frames) == 8 and frames[-1][1] >= 2000  # before the first, after each of 6, and at rest
    pale = [count(frame, watch.TO_COME["diffusion"]) for frame, _ in frames]
    assert pale == sorted(pale, reverse=True) and pale[-1] < pale[0] / 20  # edges of letters have its colour, too
    for colour in sample.COLOURS.values():  # the caption, and in between the token that is new
        assert count(frames[3][0], colour) > count(frames[-1][0], colour) > 10_000


def count(image, colour):
    """How many pixels have a colour, give or take what the palette rounds."""
    red, green, blue = ImageColor.getrgb(colour)
    near = [abs(np.asarray(image)[..., i].astype(int) - c) <= 2 for i, c in enumerate((red, green, blue))]
    return int((near[0] & near[1] & near[2]).sum())


def test_the_slider_has_every_token_and_its_forward_pass():
    ids = STRANGE.encode("a\u6f22b")
    texts = {"ar": (ids, np.array([0, 1, 2])), "diffusion": (ids, np.array([0, 3, 1]))}
    page = watch.stepper("here", STRANGE, texts, start=1)
    spans = re.findall(r'<span data-when="(\d)">(.)</span>', page)
    assert spans == [("0", "a"), ("1", "\u6f22"), ("2", "b"), ("0", "a"), ("3", "\u6f22"), ("1", "b")]
    bytewise = prepare.Tokenizer({"kind": "bpe", "pattern": ".", "tokens": [chr(i) for i in range(256)]})
    page = watch.stepper("x", bytewise, {"ar": (np.array([*"a£b".encode()]), np.array([0, 1, 5, 2]))})
    assert re.findall(r'<span data-when="(.)">(.)</span>', page) == [("0", "a"), ("5", "£"), ("2", "b")]
    page = watch.stepper("here", STRANGE, texts, start=1)
    assert 'max="3" value="1"' in page and 'id="here"' in page and 'getElementById("here")' in page
    assert all(colour in page for colour in sample.COLOURS.values()) and "http" not in page
    markup = prepare.Tokenizer({"kind": "char", "characters": "<b>&"})
    page = watch.stepper("x", markup, {"ar": (markup.encode("<b>&"), np.arange(4))})
    assert "&lt;" in page and "&gt;" in page and "&amp;" in page


def test_half_keeps_the_network_and_leaves_the_rest(runs, capsys, tmp_path, monkeypatch):
    full = load_checkpoint(runs / "ar" / "best.pt")
    save_checkpoint(tmp_path / "best.pt", full | {
        "average": {name: w + 1 for name, w in full["model"].items()}, "records": [{"epoch": 1}], "optimizers": []})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert watch.main([str(tmp_path), f"--half={tmp_path / 'best.pt'}"]) == 2
    assert "in the folder of the run itself" in capsys.readouterr().err
    assert watch.main([str(tmp_path), "--half=~/new/half.pt"]) == 0
    half = load_checkpoint(tmp_path / "new" / "half.pt")
    assert set(half) == {"format", "config", "tokenizer", "state", "model"} and half["state"] == {"step": 7}
    assert {w.dtype for w in half["model"].values()} == {torch.float16}
    for name, w in model_from_checkpoint(half).state_dict().items():  # of the averaged weights
        assert w.dtype == torch.float32 and torch.equal(w, (full["model"][name] + 1).half().float())


def test_the_gif_of_the_readme_is_one():
    with Image.open(watch.__file__.replace("watch.py", "results/writing.gif")) as film:
        assert film.n_frames > 100 and film.size[0] == watch.PAGE
    assert Path(film.filename).stat().st_size < 1_000_000


def framed(text, width=12, tokenizer=STRANGE, now=99, when=None):
    """The lines of a text in so many cells, without the spaces that fill them."""
    ids = [i for c in text for i in ([tokenizer.ids[c]] if tokenizer.kind == "char" else tokenizer.encode(c))]
    when = when or [1] * len(ids)
    lines = watch.frame(*watch.layout(tokenizer, ids, when), "\u2591", width, now)
    bare = [re.sub(r"\033\[\d*m", "", line) for line in lines]
    assert {cells(line) for line in bare} <= {width}
    return [line.rstrip(" ") for line in bare]


def cells(line):
    """The cells of a line: as many for a terminal that joins characters as for one that does not."""
    assert all(c.isprintable() for c in line), ascii(line)
    assert wcswidth(line) == sum(map(wcwidth, line)), ascii(line)
    return wcswidth(line)


@pytest.mark.parametrize("text, lines", [
    ("a\tb", ["a       b"]), ("\ta", ["        a"]), ("ab\n\tb\n", ["ab", "        b"]),
    ("a\r\nb", ["a", "b"]), ("a\rb", ["a", "b"]), ("a\r\n\r\nb\r", ["a", "", "b"]),
    ("\u6f22" * 7, ["\u6f22" * 6, "\u6f22"]), ("a" + "\u6f22" * 6, ["a" + "\u6f22" * 5, "\u6f22"]),
    ("b\u0301a\u0301", ["b\u0301a\u0301"]), ("\u0301a", ["\ufffda"]), ("a\n\u0301", ["a", "\ufffd"]),
    ("\u6f22\u0301" * 7, ["\u6f22\u0301" * 6, "\u6f22\u0301"]), ("\u2764\ufe0fa", ["\u2764a"]),
    ("\U0001f469\u200d\U0001f469", ["\U0001f469" * 2]), ("\U0001f469\U0001f3fda", ["\U0001f469a"]),
    ("a\u3000\xa0b", ["a   b"]), ("\x1b\x07\x9b\0\ue000", ["\ufffd" * 5]), ("a\u202eb\xad", ["ab"]),
    ("ab \u6f22\u6f22 \u6f22\u6f22\u6f22", ["ab \u6f22\u6f22", "\u6f22\u6f22\u6f22"])])
def test_every_character_has_its_cells(text, lines):
    assert framed(text) == lines


@pytest.mark.parametrize("text", [
    "\u0915\u094d\u0937\u0924\u094d\u0930\u093f\u092f \u0935\u093f\u0926\u094d\u092f\u093e",
    "\u0e19\u0e49\u0e33", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bae\u0bca\u0bb4\u0bbf",
    "\u1780\u1798\u17d2\u1796\u17bb\u1787\u17b6", "\ud55c\uad6d"])
def test_scripts_whose_letters_join_keep_their_columns(text):
    tokenizer = prepare.Tokenizer.train("bpe", ["abc"], 257)
    for width in (9, 40):
        ids = tokenizer.encode(text).tolist()
        lines = watch.frame(*watch.layout(tokenizer, ids, [0] * len(ids)), " ", width, 5)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "") and {*map(wcswidth, lines)} == {width}


def test_what_two_terminals_would_not_draw_alike_is_replaced():
    assert framed("\U0001f1e9\U0001f1ea a") == ["\ufffd\ufffd a"]


def test_masks_have_the_cells_of_what_they_stand_for():
    assert framed("a\u6f22\tb\n\u6f22", now=0) == ["\u2591" * 10, "\u2591\u2591"]
    assert framed("a\u0301b", now=1, when=[1, 2, 1]) == ["\u2591b"]  # there when all of it is there
    assert framed("a\u0301b", now=2, when=[1, 2, 1]) == ["a\u0301b"]


def test_a_character_of_several_tokens_is_there_when_all_of_them_are():
    tokenizer = prepare.Tokenizer.train("bpe", ["abc"], 257)  # the bytes
    assert framed("a\u6f22b", now=1, tokenizer=tokenizer, when=[1, 2, 1, 1, 1]) == ["a\u2591\u2591b"]
    assert framed("a\u6f22b", now=2, tokenizer=tokenizer, when=[1, 2, 1, 1, 1]) == ["a\u6f22b"]
    line, = watch.frame(*watch.layout(tokenizer, tokenizer.encode("a\u6f22")[:-1].tolist(), [1, 1, 1]), " ", 12, 5)
    assert line.split() == ["a\ufffd"]  # as sample.py prints it


@pytest.mark.parametrize("columns", ["8", "21", "30", "80"])
def test_two_runs_stand_in_columns_whatever_they_write(runs, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    width = max(2, (int(columns) + 2) // 2 - 3)
    how = ["--num_samples=2", "--length=90", "--temperature=5"]
    assert watch.main([str(runs / "strange-ar"), str(runs / "strange-diffusion"), *how]) == 0
    out = capsys.readouterr().out
    for line in out.split("\n")[2:-1]:
        if not line.startswith("-----"):
            assert [cells(part) for part in line.split(" \u2502 ")] == [width, width]


def test_the_redraw_counts_lines_whatever_is_written(runs, capsys, monkeypatch):
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("COLUMNS", "30")
    how, terminal = ["--num_samples=1", "--length=50", "--temperature=5"], Terminal()
    text = text_of(capsys, runs / "strange-diffusion", *how)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert watch.main([str(runs / "strange-diffusion"), *how]) == 0
    for before, after in itertools.pairwise(screen[2:] for screen in terminal.screens()):
        assert len(before) == len(after) > 2
    shown = "".join(terminal.screens()[-1][2:])
    for c in "ab\u6f22\U0001f469\u2764":
        assert shown.replace("<|endoftext|>", "").count(c) == text.replace("<|endoftext|>", "").count(c)
    assert re.fullmatch(r"[^\0-\x1f\x7f-\x9f]*", re.sub(r"\033\[(\d+A|\d*m)|\n", "", terminal.getvalue()))


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_stop_at_eot_and_the_flags_of_sample_hold_here(runs, capsys, monkeypatch, name):
    monkeypatch.chdir(runs)
    how = ["--num_samples=3", "--length=90", "--temperature=5", "--stop_at_eot"]
    assert sample.main([f"--run={name}", *how, "--json"]) == 0
    texts = json.loads(capsys.readouterr().out)["samples"]
    assert any(text.endswith(prepare.EOT) for text in texts)
    monkeypatch.setenv("HOME", str(runs))
    for run in (name, f"{name}/best.pt", f"~/{name}"):
        assert watch.main([run, *how]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[0].endswith(f"{name}/best.pt: {name}, step 7")
        assert [plain(part) for part in re.split("-----.*", out)[1:]] == [plain(text) for text in texts]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_stdout_can_not_encode_keeps_its_columns(runs, encoding):
    command = [sys.executable, watch.__file__, runs / "strange-ar", runs / "strange-diffusion", "--num_samples=1",
               "--temperature=5", "--length=60"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "41"},
                          capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode(encoding).split("\n")[3:-1]
    assert {cells(line) for line in lines} == {39} and len(lines) > 2


def test_wcwidth_is_all_that_it_needs_besides():
    source = Path(watch.__file__).read_text()
    assert re.findall("^(?:import|from) (wcwidth)", source, re.M) == ["wcwidth"]


def test_help_has_its_own_flags_and_those_of_sample(capsys):
    with pytest.raises(SystemExit) as ended:
        watch.main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and all(flag in told for flag in ("--gif FILE", "--half FILE", "--temperature"))
