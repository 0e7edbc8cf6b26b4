"""Runs beside one another: --init, the comparison of two runs, and runs wherever people start them."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import sample
import train
from model import UserError, load_checkpoint

ROOT = Path(__file__).parent.parent
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8, "unique_tokens": 1024,
         "eval_blocks": 16, "epochs": 3.0, "lr": 0.01, "dtype": "float32", "device": "cpu"}


def write(path, *words):
    """A text of these words, each as often and in any order."""
    path.write_text("".join(np.random.default_rng(0).choice(words, 4000)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write(folder / "text.txt", "the union ", "has peace ", "keeps law.\n\n")
    prepare.prepare(inputs=[folder / "text.txt"], tokenizer="char", out=folder / "data")
    return folder / "data"


def run(corpus, out, **given):
    return train.train(train.make_config("laptop", **(SMALL | {"data": str(corpus), "out": str(out)} | given)))


def flags(corpus, **given):
    return [f"--{name}={value}" for name, value in ({"preset": "laptop"} | SMALL | {"data": corpus} | given).items()]


def command(*args, cwd, **how):
    return subprocess.run([sys.executable, ROOT / "train.py", *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=120, **how)


# ----- --init


def test_init_begins_with_the_best_weights_of_another_run_also_of_the_other_objective(corpus, tmp_path):
    run(corpus, tmp_path / "ar", objective="ar", epochs=10.0)
    best = load_checkpoint(tmp_path / "ar" / "best.pt")["model"]
    for objective in ("ar", "diffusion"):
        settings = {"objective": objective, "init": str(tmp_path / "ar"), "lr": 1e-9, "weight_decay": 0.0}
        log = run(corpus, tmp_path / f"on-{objective}", epochs=0.1, **settings)
        begun = load_checkpoint(tmp_path / f"on-{objective}" / "last.pt")["model"]
        assert all(torch.allclose(begun[name], best[name], atol=1e-7) for name in best)  # but for a tiny step
        assert log[0]["config"]["init"] == str(tmp_path / "ar")
    longer = run(corpus, tmp_path / "longer", objective="ar", init=str(tmp_path / "ar"), epochs=1.0)
    assert longer[1]["train_loss"] < run(corpus, tmp_path / "new", objective="ar", epochs=1.0)[1]["train_loss"] - 0.5


def test_a_run_with_init_that_was_interrupted_goes_on_from_where_it_was(corpus, tmp_path):
    run(corpus, tmp_path / "first")
    config = train.make_config("laptop", **(SMALL | {"data": str(corpus), "init": str(tmp_path / "first")}))
    whole = train.train(config | {"out": str(tmp_path / "whole")})
    calls = iter(range(1000))
    train.train(config | {"out": str(tmp_path / "parts")}, stop=lambda: next(calls) == 7)
    shutil.rmtree(tmp_path / "first")  # it is needed to begin only
    parts = train.train(*train.reopen(tmp_path / "parts", {}))
    assert [r["val_loss"] for r in whole[1:]] == [r["val_loss"] for r in parts[1:]]


def test_init_refuses_another_shape_another_tokenizer_and_what_is_no_run(corpus, tmp_path):
    run(corpus, tmp_path / "run")
    with pytest.raises(UserError, match="another shape, --n_layer=1 --n_head=2 --n_embd=32"):
        run(corpus, tmp_path / "new", init=str(tmp_path / "run"), n_embd=64)
    for other in ({"n_head": 1}, {"rope_base": 1e4}):  # these have no weights
        with pytest.raises(UserError, match="another shape, .* --rope_base=20.0"):
            run(corpus, tmp_path / "new", init=str(tmp_path / "run"), **other)
    write(tmp_path / "other.txt", "another ", "alphabet ", "xyz!\n\n")
    prepare.prepare(inputs=[tmp_path / "other.txt"], tokenizer="char", out=tmp_path / "other")
    with pytest.raises(UserError, match=f"python prepare.py --tokenizer={corpus} --input FILE"):
        run(tmp_path / "other", tmp_path / "new", init=str(tmp_path / "run"))
    with pytest.raises(UserError, match="nowhere"):
        run(corpus, tmp_path / "new", init=str(tmp_path / "nowhere"))
    assert not (tmp_path / "new").exists()


def test_a_text_of_ones_own_takes_the_tokenizer_of_a_run_and_goes_on_from_it(corpus, tmp_path):
    run(corpus, tmp_path / "run")
    write(tmp_path / "my.txt", "peace ", "has the union.\n\n", "law keeps ")
    prepare.prepare(inputs=[tmp_path / "my.txt"], tokenizer=str(corpus), out=tmp_path / "my")
    log = run(tmp_path / "my", tmp_path / "new", init=str(tmp_path / "run"), epochs=1.0)
    assert log[0]["config"]["data_sha256"] != load_checkpoint(tmp_path / "run" / "best.pt")["config"]["data_sha256"]


# ----- two runs compared


def log_of(objective, losses, /, rate=10.0, **config):
    """A log whose n-th evaluation is after n epochs of `rate` FLOPs."""
    rows = [{"epoch": n, "flops": rate * n, "val_loss": loss, "train_loss": loss, "val_stderr": 0.001}
            for n, loss in enumerate(losses, 1)]
    best = {"best_loss": min(losses), "best_stderr": 0.001, "final_loss": losses[-1], "best_bpb": 1.0, "final_bpb": 1.0,
            "final_stderr": 0.0}
    settings = {"objective": objective, "data_sha256": "x", "unique_tokens": 8, "block_size": 4, "split": "val",
                "eval_tokens": 64, "dropout": 0.0, "replace": 0.0, "weight_decay": 0.1, "parameters": 9}
    return [{"config": settings | config}, *rows[:-1], rows[-1] | best]


def test_both_crossings_are_found_told_and_drawn(tmp_path):
    from matplotlib.figure import Figure
    ar, diffusion = log_of("ar", [4, 3, 5, 7]), log_of("diffusion", [6, 5, 4, 3.5, 2.5, 2])
    equal, of_best = sample.crossings(ar, diffusion)
    assert 20 < equal < 30 and 40 < of_best < 50
    told = sample.verdict(ar, diffusion).splitlines()
    assert told[0] == f"At equal compute diffusion overtakes AR at {equal:.2g} FLOPs, epoch {equal / 10:.3g}"
    assert told[1] == (f"AR's best, 3.000, is overtaken at {of_best:.2g} FLOPs, epoch {of_best / 10:.3g}: "
                       "diffusion's best, <= 2.000 ± 0.001, is 1.000 under it")
    ax = Figure().subplots()
    sample.draw_losses(ax, ar, diffusion)
    assert len([line for line in ax.lines if line.get_marker() in "oD"]) == 2
    assert ax.get_title(loc="left").split() == sample.verdict(ar, diffusion).split()
    assert max(map(len, ax.get_title(loc="left").split("\n"))) <= 90  # it fits the figure
    drawn = {line.get_color() for line in ax.lines} - {"black"}
    assert drawn == set(sample.COLOURS.values())


def test_the_crossing_of_ars_best_is_where_more_mask_draws_see_it():
    ar, diffusion = log_of("ar", [4, 3, 5, 7]), log_of("diffusion", [6, 5, 4, 3.5, 2.5, 2])
    exact = sample.crossings(ar, diffusion)[1]
    for off in (-0.1, 0.1):  # few draws, alike in all evaluations, flatter or harm them all
        flattered = [diffusion[0], *[record | {"val_loss": record["val_loss"] + off} for record in diffusion[1:]]]
        assert sample.crossings(ar, flattered)[1] == pytest.approx(exact)


def test_what_did_not_happen_is_said_with_the_sign_of_the_bound():
    ar, diffusion = log_of("ar", [4, 3, 3]), log_of("diffusion", [6, 5, 4])
    assert sample.crossings(ar, diffusion) == (None, None)
    assert sample.verdict(ar, diffusion).splitlines() == [
        "At equal compute diffusion does not overtake AR (up to 30 FLOPs)",
        "AR's best, 3.000, is not overtaken: diffusion's best, <= 4.000 ± 0.001, is 1.000 above it (a bound, so open)"]
    for losses in ([2.0, 1.5], [2.0, 5.0]):  # it may fall behind
        begins = sample.verdict(ar, log_of("diffusion", losses))
        assert begins.startswith("At equal compute diffusion begins ahead of AR, so it does not overtake it\n")
    level = sample.verdict(ar, log_of("diffusion", [6, 5, 2.999])).splitlines()[1]
    assert level == ("AR's best, 3.000, is reached, not overtaken: "
                     "diffusion's best, <= 2.999 ± 0.001, is within its error")
    assert sample.crossings(ar, log_of("diffusion", [6, 5, 2.999]))[1] is None
    record = {"val_loss": 2.0, "val_bpb": 1.0, "val_stderr": 0.1}
    assert sample.show(record, {"objective": "ar", "split": "tune"}) == "tune = 2.000 nats/token, = 1.000 bits/byte"
    assert sample.show(record, {"objective": "diffusion", "split": "tune"}).startswith("tune <= 2.000 ± 0.100")
    later = sample.verdict(log_of("ar", [4, 3], rate=1.0), log_of("diffusion", [6, 5]))
    assert later.startswith("Diffusion and AR have no compute in common")
    for losses, end in (([6, 2, 4], ", but at 30 FLOPs AR is ahead again"), ([6, 2, 2.9], "")):
        told = sample.verdict(log_of("ar", [4, 3, 3]), log_of("diffusion", losses)).splitlines()[0]
        assert told == f"At equal compute diffusion overtakes AR at 16 FLOPs, epoch 1.59{end}"
    larger = sample.verdict(ar, log_of("diffusion", [6, 5, 4], parameters=1000)).splitlines()
    assert larger[2:] == ["Their networks differ: 9 and 1,000 parameters"]


def test_seeds_share_a_label_and_regularised_runs_are_dashed():
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    sample.draw_losses(ax, log_of("ar", [4, 3, 5]), log_of("ar", [4, 3.1, 5]), log_of("ar", [4, 3, 3], dropout=0.2),
                       log_of("diffusion", [6, 5, 4]))
    labels = sorted(text.get_text() for text in ax.texts)
    assert labels == ["AR (exact)", "AR, regularised (exact)", "diffusion (bound)"]
    assert len([line for line in ax.lines if line.get_linestyle() == "--"]) == 1
    ax = Figure().subplots()
    sample.draw_losses(ax, log_of("ar", [4, 3, 5]), log_of("ar", [4, 2.5, 5]))
    assert ax.get_title(loc="left") == "Lowest validation loss 2.500, epoch 2"
    for losses, mark in (([4], "."), ([4, 3], "None")):  # a line of one point would not be seen
        ax = Figure().subplots()
        sample.draw_losses(ax, log_of("ar", losses))
        assert ax.lines[1].get_marker() == mark


@pytest.mark.parametrize("change, named", [
    ({"objective": "ar"}, "both are ar runs"), ({"data_sha256": "y"}, "data_sha256 is x for one and y"),
    ({"init": "out/x"}, "weights of another run"),
    ({"unique_tokens": 9}, "unique_tokens is 8 for one and 9"), ({"split": "tune"}, "split is val for one and tune")])
def test_runs_that_had_another_task_are_not_compared(tmp_path, change, named):
    for name, log in (("a", log_of("ar", [2, 1])), ("b", log_of("diffusion", [2, 1], **change))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    with pytest.raises(UserError, match=named):
        sample.compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="holds no run that has ended"):
        sample.compare(tmp_path / "a", tmp_path / "nowhere")


def test_a_run_that_ends_is_compared_with_the_newest_that_it_can_be_compared_with(tmp_path):
    logs = {"old": log_of("ar", [2, 1]), "newer": log_of("ar", [2, 1.5]), "other": log_of("ar", [2, 1], split="tune"),
            "mine": log_of("diffusion", [2, 1.2], out=str(tmp_path / "mine"))}
    for i, (name, log) in enumerate(logs.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        os.utime(tmp_path / name / "log.jsonl", (i, i))
    told = sample.conclude(logs["mine"])
    assert f"beside {tmp_path / 'newer'}:" in told and "AR's best, 1.500, is overtaken" in told
    assert (tmp_path / "mine" / "crossing.png").exists() and (tmp_path / "mine" / "loss.png").exists()


# ----- wherever people run it


def test_every_evaluation_can_be_read_at_once_where_the_output_is_a_file(corpus, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as file:
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags(corpus, epochs=3000.0, eval_every=2.0)],
                                   cwd=tmp_path, env=env, stdout=file, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while (tmp_path / "log").read_text().count("\nepoch ") < 2:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    for text in (error, (tmp_path / "log").read_text()):  # the command that resumes is also where a person sees it
        assert "python train.py --resume=out/diffusion" in text


def test_a_stdout_without_plus_minus_or_closed_ends_no_run(corpus, tmp_path):
    done = command(*flags(corpus), cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "? 0.0" in done.stdout, done.stderr
    line = shlex.join([sys.executable, str(ROOT / "train.py"), *flags(corpus, epochs=30.0)])
    for name, shell in (("head", f"{line} --out=out/head | head -1"), ("closed", f"{line} --out=out/closed >&-")):
        done = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr and "error" not in done.stderr, done.stderr
        assert "final_loss" in sample.read_log(tmp_path / "out" / name)[-1]


def test_data_is_what_its_fingerprint_says_wherever_it_lies(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "here" / "data")
    calls = iter(range(1000))
    folders = {"data": str(tmp_path / "here/data"), "out": str(tmp_path / "run")}
    config = train.make_config("laptop", **(SMALL | folders))
    train.train(config, stop=lambda: next(calls) == 5)
    shutil.move(tmp_path / "here", tmp_path / "there")
    with pytest.raises(prepare.DataError, match="here/data"):
        train.train(*train.reopen(tmp_path / "run", {}))
    with pytest.raises(prepare.DataError, match="not the data"):
        write(tmp_path / "other.txt", "something ", "else.\n\n")
        prepare.prepare(inputs=[tmp_path / "other.txt"], tokenizer="char", out=tmp_path / "other")
        train.train(*train.reopen(tmp_path / "run", {"data": str(tmp_path / "other")}))
    log = train.train(*train.reopen(tmp_path / "run", {"data": str(tmp_path / "there/data")}))
    assert "final_loss" in log[-1]


def test_two_runs_that_start_at_once_take_two_directories(corpus, tmp_path):
    both = [subprocess.Popen([sys.executable, ROOT / "train.py", *flags(corpus, objective="ar")], cwd=tmp_path,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error
    for name in ("ar", "ar-2"):
        assert "final_loss" in sample.read_log(tmp_path / "out" / name)[-1]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_is_told_and_no_more(corpus, tmp_path, monkeypatch, capsys, number):
    import fcntl

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "final_loss" in run(corpus, tmp_path / "run")[-1]
    assert number == errno.ENOSYS or "start no second run there" in capsys.readouterr().out


def test_no_script_needs_a_posix_system_to_start():
    for path in [*ROOT.glob("*.py"), *(ROOT / "notebooks").glob("*.py")]:
        assert not re.search(r"^(?:import|from) (?:fcntl|resource|pwd|grp|termios|tty|pty)\b", path.read_text(), re.M)


def test_a_device_that_is_none_of_ours_is_refused_in_a_line(corpus, tmp_path):
    for name in ("meta", "xla", "tpu!"):
        done = command(*flags(corpus, device=name), cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"--device={name}" in done.stderr


def test_signals_are_given_back_and_a_thread_does_without(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert train.main(flags(corpus, out="one")) == 0
    assert [signal.getsignal(number) for number in numbers] == before
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train.main(flags(corpus, out="two"))))
    thread.start()
    thread.join()
    assert codes == [0] and "final_loss" in sample.read_log("two")[-1]


def test_a_dropped_connection_saves_like_ctrl_c_and_nohup_goes_on(corpus, tmp_path):
    for prefix, code in (([], -signal.SIGHUP), (["nohup"], None)):
        out = tmp_path / "out" / ("nohup" if prefix else "plain")
        process = subprocess.Popen([*prefix, sys.executable, str(ROOT / "train.py"),
                                    *flags(corpus, epochs=300.0, out=out)],
                                   cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not (out / "last.pt").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        if prefix:
            time.sleep(0.5)
            assert process.poll() is None
            process.kill()
        process.wait(60)
        if code:
            assert process.returncode == 128 + signal.SIGHUP
            assert 0 < load_checkpoint(out / "last.pt")["state"]["step"] < 2400


