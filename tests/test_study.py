"""Studies: train.py would begin every run, each log is its command's, a driver that was ended goes on."""

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import prepare
import study
import train
import why
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.parent.name for path in study.RESULTS.glob("*/runs.txt"))
RENAMED = {"final_passes": "final_draws"}  # flags of older logs
DERIVED = ("vocab_size", "parameters", "steps", "flops", "eval_tokens", "eval_bytes", "unigram_entropy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the corpora that the studies name."""
    folder = tmp_path_factory.mktemp("studies")
    for V in (512, 4096):
        prepare.prepare(vocab_size=V, out=folder / f"data/sotu-bpe{V}")
    prepare.prepare(tokenizer="char", out=folder / "data/sotu-char")
    why.write_source(folder / "data/source")
    return folder


load = functools.cache(prepare.load)
network = functools.cache(lambda *shape: GPT(GPTConfig(*shape)))


@pytest.fixture
def data(folder, monkeypatch):
    """To be in that folder; a corpus is read once, and a network of a shape is made once."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(prepare, "load", load)
    monkeypatch.setattr(train, "make_model", lambda c: network(*[c[f.name] for f in fields(GPTConfig)]))


def test_a_study_is_runs_txt_and_the_logs_of_its_commands_and_nothing_else():
    outs = [words[-1] for name in STUDIES for words in study.commands(name)]
    assert len(outs) == len(set(outs)) and not list(study.RESULTS.glob("*.jsonl"))
    for name in STUDIES:
        logs = {path.name for path in (study.RESULTS / name).iterdir()} - {"runs.txt"}
        ended = [run for run in study.names(name) if f"{run}.jsonl" in logs]
        assert list(study.read(name)) == ended and len(ended) == len(logs)
        lines, commands = (study.RESULTS / name / "runs.txt").read_text().splitlines(), study.commands(name)
        assert lines == [shlex.join(words) for words in commands]  # none needs a quote
        assert {" ".join(words[:2]) for words in commands} <= {"python train.py", "python notebooks/why.py"}


@pytest.mark.parametrize("name", STUDIES)
def test_train_py_would_begin_every_run_and_its_log_has_the_same_flags(data, name):
    logs = study.read(name)
    for run, words in zip(study.names(name), study.commands(name), strict=True):
        config = study.plan(words)
        assert config["steps"] > 1 and config["parameters"] > 10_000 and config["flops"] < config["all_flops"]
        if name.startswith("gpu"):
            assert config["vocab_size"] == 4096 and config["compile"] and config["steps"] >= 256
        if run not in logs:
            continue
        old = {RENAMED.get(key, key): value for key, value in logs[run][0].items()}
        own = [word for word in words[2:] if not word.startswith("--")]  # why.py's words
        batch = f"{own[0]}({own[1]})" if own[1:] else own[0] if own else "get_batch"
        if old.get("hide"):  # a flag of train.py then, a batch of why.py now
            old["batch"] = f"hide({old['hide']})"
        assert batch == old.get("batch", "get_batch")
        old = train.as_of_now(old)
        assert f"--dtype={old['dtype']}" in words or "--dtype" not in " ".join(words)  # what auto was
        for key in (train.FLAGS.keys() & old.keys() - {"out", "dtype"}) | set(DERIVED):
            assert config[key] == pytest.approx(old[key]), (run, key)


def test_the_cost_is_the_sum_of_its_runs(data, capsys, monkeypatch):
    plans, plan = [], study.plan
    monkeypatch.setattr(study, "plan", lambda words: plans.append(plan(words)) or plans[-1])
    study.cost("gpu", 790)
    *rows, last = capsys.readouterr().out.splitlines()
    assert len(rows) == len(plans) == len(study.names("gpu")) and last.startswith(f"{len(rows)} runs, ")
    assert f"{sum(plan['all_flops'] for plan in plans):.2e} FLOPs" in last
    assert float(last.split()[-2]) == pytest.approx(sum(float(row.split()[-2]) for row in rows), abs=2)
    assert max(plan["flops"] / plan["critical_flops"] for plan in plans if plan["unique_tokens"] > 2**20) > 30
    assert max(plan["epochs"] for plan in plans) <= 1000


@pytest.mark.parametrize("cost", ["0", "-3", "nan", "inf"])
def test_a_cost_that_is_no_peak_runs_nothing(cost, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "preset", f"--cost={cost}"])
    monkeypatch.setattr(study, "drive", None)
    with pytest.raises(SystemExit, match=f"error: --cost={float(cost)}: it takes the card's peak"):
        study.main()
    assert not capsys.readouterr().out


def test_what_is_wrong_with_a_study_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no study 'labtop': choose one of .*, laptop, "):
        study.names("labtop")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    (tmp_path / "t").mkdir()
    run = "python train.py --out=out/t-a\n"
    for text, line in ((run + run, 1), (run + "\n", 2), (run + "#\n", 2), ("train.py --out=out/t\n", 1)):
        (tmp_path / "t/runs.txt").write_text(text)
        with pytest.raises(ValueError, match=f"t/runs.txt, line {line}: end it with a new --out=out/t-RUN"):
            study.commands("t")
    (tmp_path / "t/runs.txt").write_text(run)
    assert study.names("t") == ["a"] and study.read("t") == {}


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts with a small corpus and a study: a short run, and one that train.py refuses."""
    text = " ".join(np.random.default_rng(0).choice(["free", "land", "law", "\n\n"], 20_000))
    (tmp_path / "text.txt").write_text(text)
    prepare.prepare(inputs=[tmp_path / "text.txt"], tokenizer="char", out=tmp_path / "data/text")
    (tmp_path / "notebooks/results/t").mkdir(parents=True)
    for script in [*ROOT.glob("*.py"), *ROOT.glob("notebooks/*.py")]:
        shutil.copy(script, tmp_path / script.relative_to(ROOT))
    flags = ("--preset=laptop --device=cpu --data=data/text --unique_tokens=2048 --n_layer=1 --n_embd=32 "
             "--block_size=16 --eval_blocks=16 --optimizer=adamw")
    (tmp_path / "notebooks/results/t/runs.txt").write_text(
        f"python notebooks/why.py hide 0.15 {flags} --objective=ar --epochs=24 --out=out/t-ar\n"
        f"python train.py {flags} --batch_size=3 --out=out/t-odd\n")
    return tmp_path


def test_a_driver_that_was_ended_goes_on_without_loss(project, monkeypatch):
    """`timeout` sends SIGTERM to the group: the driver waits until its run has saved, and begins no other."""
    driver, results = [sys.executable, "notebooks/study.py", "t"], project / "notebooks/results/t"
    first, second = (results / "runs.txt").read_text().splitlines()
    process = subprocess.Popen(driver, cwd=project, start_new_session=True, stdout=subprocess.PIPE, text=True)
    log, deadline = project / "out/t-ar/log.jsonl", time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "t-ar: stopped; output in out/t-ar.txt\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume=out/t-ar" in (project / "out/t-ar.txt").read_text()  # saved, and how to go on
    assert list(results.iterdir()) == [results / "runs.txt"] and not (project / "out/t-odd.txt").exists()

    def call(*arguments):
        done = subprocess.run([*driver, *arguments], cwd=project, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout.splitlines()

    assert call("--print") == (0, ["python notebooks/why.py hide 0.15 --resume=out/t-ar", second])
    status, lines = call("--jobs=2")
    assert status == 1 and sorted(lines) == [
        "t-ar: done; output in out/t-ar.txt", "t-odd: failed; output in out/t-odd.txt"]
    assert "--batch_size=3" in (project / "out/t-odd.txt").read_text()
    assert sorted(path.name for path in results.iterdir()) == ["ar.jsonl", "runs.txt"]
    assert call("--print") == (0, [second])
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", [*first.split()[1:-1], "--out=whole"])
    assert why.main() == 0
    parts, whole = ([json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()][1:]
                    for path in (results / "ar.jsonl", project / "whole/log.jsonl"))
    assert parts == whole
