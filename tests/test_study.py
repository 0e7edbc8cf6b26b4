"""notebooks/study.py: train.py would take the flags of every run, and a driver that was ended goes on without loss."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
import study
import why

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the corpora that the studies name."""
    folder = tmp_path_factory.mktemp("studies") / "data"
    for V in (512, 4096):
        prepare.prepare(vocab_size=V, out=folder / f"sotu-bpe{V}")
    prepare.prepare(tokenizer="char", out=folder / "sotu-char")
    why.write_source(folder / "source")
    return folder


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_run_of_every_study_is_one_that_train_py_would_begin(data, monkeypatch, name):
    monkeypatch.chdir(data.parent)
    commands = [study.command(name, run) for run in study.STUDIES[name]]
    assert len(set(map(tuple, commands))) == len(commands)
    for run in study.STUDIES[name]:
        config = study.plan(name, run)
        assert config["steps"] > 1 and config["parameters"] > 20_000 and config["flops"] < config["all_flops"]
        if name.startswith("gpu"):
            assert config["vocab_size"] == 4096 and config["compile"] and config["steps"] >= 256
    assert all(Path(command[1]).suffix == ".py" and (ROOT / command[1]).is_file() for command in commands)


def test_the_cost_is_the_sum_of_its_runs(data, monkeypatch, capsys):
    monkeypatch.chdir(data.parent)
    study.cost("gpu", 790)
    *rows, last = capsys.readouterr().out.splitlines()
    assert len(rows) == len(study.STUDIES["gpu"]) and last.startswith(f"{len(rows)} runs, ")
    plans = [study.plan("gpu", name) for name in study.STUDIES["gpu"]]
    assert f"{sum(plan['all_flops'] for plan in plans):.2e} FLOPs" in last
    assert max(plan["flops"] / plan["critical_flops"] for plan in plans if plan["unique_tokens"] > 2**20) > 30
    assert max(plan["epochs"] for plan in plans) <= 1000


def test_a_driver_that_was_ended_goes_on_without_loss(tmp_path):
    """`timeout` sends SIGTERM to the process group: the driver waits until its runs have saved, and begins no other."""
    text = " ".join(np.random.default_rng(0).choice(["free", "land", "law", "\n\n"], 20_000))
    (tmp_path / "text.txt").write_text(text)
    prepare.prepare(inputs=[tmp_path / "text.txt"], tokenizer="char", out=tmp_path / "data/text")
    for script in ("train.py", "model.py", "prepare.py"):
        shutil.copy(ROOT / script, tmp_path)
    flags = "--preset=laptop --device=cpu --data=data/text --unique_tokens=4096 --n_layer=1 --n_embd=32 --block_size=16"
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'notebooks')!r}); import study; from pathlib import Path\n"
            f"study.ROOT = Path({str(tmp_path)!r}); study.RESULTS = study.ROOT / 'results'\n"
            f"study.STUDIES['t'] = {{n: {flags!r} + f' --eval_blocks=16 --epochs=24 --objective={{n}}' "
            "for n in ('ar', 'diffusion')}; study.main()")
    driver, logs = [sys.executable, "-c", code, "t"], {}
    process = subprocess.Popen(driver, start_new_session=True, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "out/t-ar/log.jsonl"
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "t-ar: stopped\n"
    assert "saved; go on with" in (tmp_path / "out/t-ar.txt").read_text()
    assert not list((tmp_path / "results").iterdir()) and not (tmp_path / "out/t-diffusion").exists()
    assert subprocess.run([*driver, "--jobs=2"], capture_output=True, text=True, timeout=120).stdout.count("done") == 2
    whole = subprocess.run([sys.executable, "train.py", *shlex.split(flags), "--eval_blocks=16", "--epochs=24",
                            "--objective=ar", "--out=whole"], cwd=tmp_path, capture_output=True, timeout=120)
    assert whole.returncode == 0
    for path in (tmp_path / "results/t-ar.jsonl", tmp_path / "whole/log.jsonl"):
        logs[path] = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()][1:]
    parts, whole = logs.values()
    assert parts == whole and sorted(file.name for file in (tmp_path / "results").iterdir()) == [
        "t-ar.jsonl", "t-diffusion.jsonl"]
