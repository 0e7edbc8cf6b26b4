"""The loop: the same batches for both objectives, exact resume, and the commands as a person runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare
import sample
import train
from conftest import change_one_id
from model import GPT, GPTConfig, UserError, evaluate, load_checkpoint, model_from_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8, "unique_tokens": 1024,
         "eval_blocks": 16, "optimizer": "adamw", "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text of simple sentences that a small model learns in seconds, prepared as characters."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    parts = ["the union", "a state", "our law", "one people"], ["has", "makes", "keeps"], ["peace", "war", "law"]
    sentences = [" ".join(rng.choice(part) for part in parts) + ".\n\n" for _ in range(2500)]
    (folder / "text.txt").write_text("".join(sentences))
    prepare.prepare(inputs=[folder / "text.txt"], tokenizer="char", out=folder / "data")
    return folder / "data"


def config(corpus, **given):
    return train.make_config("laptop", **(SMALL | {"data": str(corpus), "epochs": 3.0, "lr": 0.01} | given))


def command(*args, cwd, code=0):
    """Run one of our commands as a person would; return what it printed."""
    args = [sys.executable, ROOT / args[0], *map(str, args[1:])]
    done = subprocess.run(args, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


# ----- the order of the data


def test_every_epoch_meets_every_block_once_in_an_order_of_its_own():
    U, T = 1000, 16
    for epoch in range(3):
        starts = train.epoch_order(7, epoch, U, T)
        tokens = (starts[:, None] + np.arange(T)) % U
        assert len(starts) == U // T and len(np.unique(tokens)) == U // T * T
    first, second = train.epoch_order(7, 0, U, T), train.epoch_order(7, 1, U, T)
    assert not np.array_equal(first, second) and first.min() % T != second.min() % T  # another order, another offset
    train.epoch_order.cache_clear()
    assert np.array_equal(first, train.epoch_order(7, 0, U, T))  # of seed and epoch alone


def test_batches_walk_through_the_stream_of_epochs_without_a_gap():
    U, T, B = 1000, 16, 8  # 62 blocks an epoch: batches lie across the ends of epochs
    stream = np.concatenate([train.batch_starts(1, step, U, T, B) for step in range(31)])
    assert np.array_equal(stream, np.concatenate([train.epoch_order(1, epoch, U, T) for epoch in range(4)]))


def test_both_objectives_meet_the_same_weights_and_batches(corpus):
    tokens = torch.arange(1000) % 50
    for step in (0, 9):
        batch, weight = train.get_batch(config(corpus, objective="diffusion", mask_weight=0.0), tokens, step)
        x, mask, at = batch.values()
        plain, ones = train.get_batch(config(corpus, objective="ar"), tokens, step)
        assert [*plain] == ["x"] and torch.equal(x, plain["x"])
        assert torch.equal(weight, torch.ones(8)) and torch.equal(ones, weight)  # both descend what they report
        assert torch.equal(mask.flatten().nonzero().flatten(), at)
        assert len(at) == 8 * 17 // 2  # B (T+1) / 2, whatever the draw
        assert torch.equal(mask, train.get_batch(config(corpus), tokens, step)[0]["mask"])  # of the step alone
        assert not torch.equal(mask, train.get_batch(config(corpus), tokens, step + 1)[0]["mask"])


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_what_a_network_reads_is_replaced_in_the_share_asked_for(corpus, objective):
    tokens = torch.arange(1000) % 50
    c = config(corpus, replace=0.3, batch_size=32, objective=objective) | {"vocab_size": 50}
    changed = 0.0
    for step in range(40):
        given, clean = (train.get_batch(settings, tokens, step)[0] for settings in (c, c | {"replace": 0}))
        seen = given.pop("read")
        assert given.keys() == clean.keys() and all(torch.equal(given[name], clean[name]) for name in clean)
        changed += (seen != given["x"]).double().mean().item() / 40
    assert abs(changed - 0.3 * 49 / 50) < 0.015  # 5 standard errors


def test_the_parts_of_a_batch_are_the_batch(corpus, monkeypatch):
    masks = train.draw_mask
    monkeypatch.setattr(train, "draw_mask", lambda B, T, generator, clip: (masks(B, T, generator)[0], torch.arange(B)))
    tokens = torch.arange(1000) % 50
    for given in ({"objective": "diffusion", "replace": 0.5}, {"objective": "ar"}, {"objective": "ar", "replace": 0.5}):
        c = config(corpus, **given) | {"vocab_size": 50}
        whole, weight = train.get_batch(c, tokens, 3)
        parts, weights = zip(*(train.get_batch(c, tokens, 3, slice(i, i + 2)) for i in range(0, 8, 2)), strict=True)
        assert torch.equal(weight, torch.cat(weights)) and weight.dtype == torch.float32
        assert (weight.unique().numel() == 8) == (c["objective"] == "diffusion")
        for name in set(whole) - {"at"}:
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
        if "at" in whole:
            assert all(len(part["at"]) == 17 for part in parts)  # (T+1) tokens for each pair of rows


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    rates = [train.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 0.2 and max(rates) == rates[9] == 2.0
    assert rates[-1] == pytest.approx(0.2, rel=1e-3) and rates[10:] == sorted(rates[10:], reverse=True)


def test_evaluations_come_every_so_often_or_in_ever_larger_steps(corpus):
    base = config(corpus) | {"unique_tokens": 1280, "steps": 100, "epochs": 10.0}  # 10 steps an epoch
    assert sorted(train.evaluation_steps(base | {"eval_every": 2.5})) == [25, 50, 75, 100]
    assert sorted(train.evaluation_steps(base | {"eval_every": 0.0})) == [10, 12, 15, 18, 20, 25, 30, 35, 40, 50,
                                                                                60, 70, 80, 100]
    assert len(train.evaluation_steps(base | {"eval_every": 1e-300})) == 100  # more often than every step is every step


# ----- runs


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_training_learns_and_logs(corpus, tmp_path, objective):
    records = train.train(config(corpus, objective=objective, epochs=30.0, eval_every=10.0, out=str(tmp_path / "run")))
    first, rows = records[0]["config"], records[1:]
    assert [r["epoch"] for r in rows] == [10, 20, 30] and rows[-1]["step"] == first["steps"] == 240
    assert rows[-1]["final_loss"] < 0.92 * first["unigram_entropy"]  # it knows more than frequencies
    assert rows[-1]["flops"] == first["flops"] == 6 * first["parameters"] * 240 * 128
    assert (rows[-1]["val_stderr"] == 0) == (objective == "ar")
    bits = rows[-1]["val_loss"] / np.log(2) * first["eval_tokens"] / first["eval_bytes"]
    assert rows[-1]["val_bpb"] == pytest.approx(bits)
    on_disk = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert on_disk == json.loads(json.dumps(records))
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bits_per_byte_by_hand(tmp_path):
    """Every letter is two bytes, and an end of text none: the bits of all tokens over the bytes of the letters."""
    letters = np.random.default_rng(0).choice(list("äöüéñ\n"), 20000)
    (tmp_path / "text.txt").write_text("".join(letters))
    prepare.prepare(inputs=[tmp_path / "text.txt"], tokenizer="char", out=tmp_path / "data")
    records = train.train(config(tmp_path / "data", epochs=0.5, eval_blocks=0, out=str(tmp_path / "run")))
    ids = prepare.load(tmp_path / "data").splits["val"]
    scored = prepare.load(tmp_path / "data").tokenizer.decode(ids[:len(ids) // 16 * 16])
    breaks, ends = scored.count("\n"), scored.count("<|endoftext|>")
    nbytes = 2 * (len(ids) // 16 * 16 - breaks - ends) + breaks
    assert ends > 0 and records[0]["config"]["eval_bytes"] == nbytes
    bits = records[1]["val_loss"] * (len(ids) // 16 * 16) / np.log(2)
    assert records[1]["val_bpb"] == pytest.approx(bits / nbytes)


def test_best_and_final_are_scored_on_the_same_masks_in_the_end(corpus, tmp_path):
    records = train.train(config(corpus, eval_every=1.0, out=str(tmp_path / "run")))
    first, last = records[0]["config"], records[-1]
    blocks = prepare.open_data(first)[2]
    for name, checkpoint in (("final", "last.pt"), ("best", "best.pt")):
        model = model_from_checkpoint(load_checkpoint(tmp_path / "run" / checkpoint))
        assert (last[f"{name}_loss"], last[f"{name}_stderr"]) == evaluate(model, blocks, first["final_draws"])
    curve = [r["val_loss"] for r in records[1:]]
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["records"][-1]["val_loss"] == min(curve) == curve[best["state"]["step"] // 8 - 1]
    assert last["final_stderr"] < 0.5 * last["val_stderr"]  # 24 masks a block against 2


def test_evaluating_often_or_never_changes_no_weight(corpus, tmp_path):
    for name, every in (("often", 1 / 8), ("never", 1e9)):
        train.train(config(corpus, dropout=0.1, eval_every=every, out=str(tmp_path / name)))
    often, never = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("often", "never"))
    assert all(torch.equal(often[key], never[key]) for key in often)


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_run(corpus, tmp_path, objective, optimizer):
    settings = {"objective": objective, "optimizer": optimizer, "dropout": 0.1, "eval_every": 1.0}
    whole = train.train(config(corpus, out=str(tmp_path / "whole"), **settings))
    calls = iter(range(1000))
    begun = train.train(config(corpus, out=str(tmp_path / "parts"), **settings), stop=lambda: next(calls) == 11)
    assert "final_loss" not in begun[-1] and load_checkpoint(tmp_path / "parts" / "last.pt")["state"]["step"] == 12
    parts = train.train(*train.reopen(tmp_path / "parts", {}))
    plain = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records[1:]]  # noqa: E731
    assert plain(whole) == plain(parts)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert repr(a["optimizers"]) == repr(b["optimizers"])


def test_the_commands_from_text_to_samples(tmp_path):
    """prepare.py, train.py twice with one word changed, sample.py: each through its own process."""
    rng = np.random.default_rng(1)
    text = "".join(" ".join(rng.choice(["free", "labor", "and", "land"], 8)) + ".\n\n" for _ in range(900))
    (tmp_path / "my.txt").write_text(text)
    printed = command("prepare.py", "--input", "my.txt", "--tokenizer=bpe", "--vocab_size=300", "--out=d", cwd=tmp_path)
    assert "bytes per token" in printed
    settings = flags(SMALL | {"data": "d", "epochs": 4, "lr": 0.02, "n_embd": 64})
    for objective in ("diffusion", "ar"):
        printed = command("train.py", f"--objective={objective}", *settings, cwd=tmp_path)
        assert ("val <=" in printed) == (objective == "diffusion") and "unigram entropy" in printed
        rows = [json.loads(line) for line in (tmp_path / "out" / objective / "log.jsonl").read_text().splitlines()][1:]
        assert rows[-1]["val_loss"] < rows[0]["val_loss"]
        printed = command("sample.py", f"--run=out/{objective}", "--prompt=free land", "--length=24", cwd=tmp_path)
        assert len(re.findall(r"^----- \d\nfree land", printed, re.M)) == 3
        again = command("sample.py", "--prompt=free land", "--length=24", cwd=tmp_path)  # the newest run is the default
        assert again == printed
    again = command("train.py", "--resume=out/ar", cwd=tmp_path)  # it has ended: only told again
    assert "beside out/diffusion:\nAt equal compute diffusion " in again
    assert (tmp_path / "out/ar/crossing.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out/diffusion/crossing.png").exists()  # when it ended, no AR run stood beside it
    told = command("train.py", "--compare", "out/ar", "out/diffusion", cwd=tmp_path)
    assert told.startswith("At equal compute diffusion ") and "AR's best, " in told
    assert (tmp_path / "out/diffusion/crossing.png").exists()
    assert "both are ar" in command("train.py", "--compare", "out/ar", "out/ar", cwd=tmp_path, code=2)


def test_help_tells_every_flag_and_its_default():
    text = " ".join(subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True,
                                   check=True).stdout.split())
    for name, (_, laptop, gpu, _, _) in train.FLAGS.items():
        assert f"--{name}" in text and (f"[{laptop}]" if laptop == gpu else f"[laptop {laptop}, gpu {gpu}]") in text


# ----- compiled


def test_compiling_changes_results_by_rounding_only_and_falls_back_in_one_line(corpus, tmp_path, monkeypatch, capsys):
    plain = train.train(config(corpus, epochs=1.0, dropout=0.2, out=str(tmp_path / "plain")))
    fast = train.train(config(corpus, epochs=1.0, dropout=0.2, compile=True, out=str(tmp_path / "compiled")))
    told = capsys.readouterr().out
    assert "does not work here" not in told or " " in sys.prefix  # where PyTorch's compiler finds no headers
    for a, b in zip(plain[1:], fast[1:], strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-4 and abs(a["val_loss"] - b["val_loss"]) < 1e-4

    def broken(model, **options):
        def run(*args, **kwargs):
            raise RuntimeError("no compiler found\nand a long explanation\nof a page")
        return run

    monkeypatch.setattr(torch, "compile", broken)
    without = train.train(config(corpus, epochs=1.0, dropout=0.2, compile=True, out=str(tmp_path / "without")))
    lines = [line for line in capsys.readouterr().out.splitlines() if "--compile" in line]
    assert lines == ["--compile does not work here: RuntimeError: no compiler found and a long explanation"]
    assert [r["val_loss"] for r in without[1:]] == [r["val_loss"] for r in plain[1:]]


# ----- several processes


def torchrun(*args, cwd, after=None):
    """Two processes of train.py under torchrun; after(Popen) is called as soon as the log has three lines."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    process = subprocess.Popen([*command, *map(str, args)], cwd=cwd, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = cwd / "out" / "two" / "log.jsonl"
    while after and process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    if after:
        after(process)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def workers(process):
    """The process ids of the workers that a torchrun process has started, in the order of their ranks."""
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_two_processes_train_as_one_does_also_after_a_resume(corpus, tmp_path, objective):
    """Interrupted and resumed by two, then the same by one: the same losses to rounding; rank 0 alone writes."""
    given = {"objective": objective, "epochs": 4.0, "data": corpus, "lr": 0.01, "eval_every": 0.5}
    settings = flags(SMALL | given)
    code, _, error = torchrun(*settings, "--out=out/two", cwd=tmp_path, after=lambda p: os.kill(p.pid, signal.SIGTERM))
    assert code != 0
    saved = load_checkpoint(tmp_path / "out" / "two" / "last.pt")
    assert 0 < saved["state"]["step"] < saved["config"]["steps"], error
    code, out, error = torchrun("--resume=out/two", cwd=tmp_path)
    assert code == 0 and out.count("run directory") == 1 and out.count("final  epoch") == 1, error
    command("train.py", *settings, "--out=out/one", cwd=tmp_path)
    two, one = (sample.read_log(tmp_path / "out" / name) for name in ("two", "one"))
    assert two[0]["config"]["processes"] == 2 and len(one) == len(two) == 9
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a["step"] == b["step"] and abs(a["train_loss"] - b["train_loss"]) < 1e-4
        assert abs(a["val_loss"] - b["val_loss"]) < 1e-4


def test_when_one_process_dies_all_end_and_what_was_saved_goes_on(corpus, tmp_path):
    settings = flags(SMALL | {"objective": "diffusion", "epochs": 60.0, "data": corpus, "lr": 0.01, "eval_every": 0.5})
    code, _, error = torchrun(*settings, "--out=out/two", cwd=tmp_path,
                              after=lambda p: os.kill(workers(p)[1], signal.SIGKILL))
    assert code != 0, error  # what it says, if Gloo does not abort it first: the next test
    step = load_checkpoint(tmp_path / "out" / "two" / "last.pt")["state"]["step"]
    assert step > 0
    code, _, error = torchrun("--resume=out/two", cwd=tmp_path, after=lambda p: os.kill(p.pid, signal.SIGTERM))
    assert load_checkpoint(tmp_path / "out" / "two" / "last.pt")["state"]["step"] >= step


def test_the_reason_is_told_before_a_signal_can_end_the_process(monkeypatch, capsys):
    """torchrun notices within 0.1 s that another process died, and sends SIGTERM: here before the message."""
    def dying(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(train, "train", dying)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert train.main(["--preset=laptop"]) == 2
    error = capsys.readouterr().err
    assert "Connection closed by peer" in error and "--resume" in error
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_log_that_was_lost_is_written_again_and_an_empty_resume_is_refused(corpus, tmp_path):
    settings = flags(SMALL | {"data": corpus, "epochs": 1})
    command("train.py", *settings, "--out=out/run", cwd=tmp_path)
    log = tmp_path / "out" / "run" / "log.jsonl"
    before = log.read_bytes()
    log.unlink()
    command("train.py", "--resume=out/run/last.pt", cwd=tmp_path)
    assert log.read_bytes() == before
    (tmp_path / "out" / "run" / "best.pt").unlink()
    refused = command("train.py", "--resume=out/run", cwd=tmp_path, code=2)
    assert "has no best.pt, which is scored at its end" in refused and "--init=out/run/last.pt" in refused
    assert "--resume names no run" in command("train.py", *settings, "--resume=", cwd=tmp_path, code=2)


def test_several_processes_save_now_and_then_and_a_second_signal_does_not_end_them(monkeypatch):
    long_ago = {"world": 2, "saved_at": -1e9}  # torchrun passes on what the system has sent to all
    assert [train.Run.unsaved_for_long(SimpleNamespace(rank=rank, **long_ago)) for rank in (0, 1)] == [True, False]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with train.noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted == [signal.SIGTERM] * 2


def test_a_batch_that_can_not_be_shared_is_refused(corpus, tmp_path):
    code, _, error = torchrun(*flags(SMALL | {"batch_size": 6, "data": corpus}), cwd=tmp_path)
    assert code != 0 and "--batch_size=6" in error and "a multiple of 4 (processes: 2)" in error


# ----- what a person can get wrong


@pytest.mark.parametrize("given, named", [
    ({"unique_tokens": 10**9}, "unique_tokens=1000000000"), ({"batch_size": 1000}, "batch_size=1000"),
    ({"batch_size": 7}, "batch_size=7"), ({"block_size": 10**6}, "1000000"), ({"lr": -1.0}, "lr=-1"),
    ({"lr": float("nan")}, "lr=nan"), ({"epochs": 0.0}, "epochs=0"), ({"n_head": 3}, "n_head=3"),
    ({"objective": "bert"}, "objective=bert"), ({"optimizer": "sgd"}, "optimizer=sgd"), ({"dropout": 1.5}, "dropout"),
    ({"final_draws": 1}, "final_draws=1"), ({"device": "cuda:99"}, "cuda:99"), ({"device": "tpu!"}, "tpu!"),
    ({"device": "meta"}, "meta"),
    ({"unknown": 1}, "unknown"), ({"init": "nowhere"}, "nowhere"),
    ({"objective": "ar", "replace": 1.1}, "replace=1.1"), ({"ema": 0.999}, "ema=0.999"),
    ({"ema": 2.0}, "share of the steps"),
    ({"data": "nowhere"}, "nowhere"), ({"split": "test"}, "split=test")])
def test_wrong_settings_are_named(corpus, tmp_path, given, named):
    with pytest.raises((UserError, prepare.DataError), match=named):
        train.train(config(corpus, out=str(tmp_path / "run"), **given))
    assert not (tmp_path / "run").exists()


def test_a_preset_that_is_none_is_named():
    with pytest.raises(UserError, match="preset=labtop"):
        train.make_config("labtop")


def test_errors_reach_the_person_without_a_traceback(corpus, tmp_path):
    settings = flags(SMALL | {"data": corpus, "epochs": 1})
    for args, named in ((["--unique_tokens=99999999"], "99999999"), (["--resume=nowhere"], "nowhere"),
                        (["--compare", "nowhere", "there"], "leave out --")):
        error = command("train.py", *settings, *args, cwd=tmp_path, code=2)
        assert named in error and "Traceback" not in error and len(error.splitlines()) <= 2
    assert "nowhere" in command("train.py", "--compare", "nowhere", "there", cwd=tmp_path, code=2)
    assert not (tmp_path / "out").exists()
    assert "no run" in command("sample.py", cwd=tmp_path, code=2)


def test_a_run_directory_is_never_overwritten(corpus, tmp_path):
    train.train(config(corpus, epochs=0.5, out=str(tmp_path / "run")))
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds a run"):
        train.train(config(corpus, epochs=0.5, out=str(tmp_path / "run")))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_resume_refuses_other_flags_and_other_data(corpus, tmp_path):
    train.train(config(corpus, epochs=0.5, out=str(tmp_path / "run")))
    with pytest.raises(UserError, match=r"--lr=0.5 \(the run has 0.01\), --seed=3 \(the run has 1\).*--init="):
        train.reopen(tmp_path / "run", {"lr": 0.5, "seed": 3, "epochs": 0.5})
    with pytest.raises(UserError, match="--resume=FOLDER; from these weights: --init=.*best.pt"):
        train.reopen(tmp_path / "run" / "best.pt", {})
    with pytest.raises(UserError, match="--out=elsewhere"):
        train.reopen(tmp_path / "run", {"out": "elsewhere", "device": "cpu"})
    settings, saved = train.reopen(tmp_path / "run", {})
    with pytest.raises(prepare.DataError, match="not the data"):
        train.train(settings | {"data_sha256": "0" * 64}, saved)


def test_a_change_of_the_held_out_text_alone_is_noticed_too(corpus, tmp_path):
    """Anything in the folder that a number rests on: here one id of val, with its hash made to fit."""
    shutil.copytree(corpus, tmp_path / "data")
    train.train(config(tmp_path / "data", epochs=0.5, out=str(tmp_path / "run")))
    change_one_id(tmp_path / "data")
    with pytest.raises(prepare.DataError, match="not the data"):
        train.train(*train.reopen(tmp_path / "run", {}))


def test_a_run_that_our_own_muon_began_goes_on_alike(corpus, tmp_path):
    """It kept None where torch's keeps how large an update is, and None means another size to torch."""
    settings = {"optimizer": "muon", "epochs": 2.0}
    train.train(config(corpus, out=str(tmp_path / "whole"), **settings))
    stops = iter([False, True])
    train.train(config(corpus, out=str(tmp_path / "part"), **settings), stop=lambda: next(stops))
    path = tmp_path / "part" / "last.pt"
    saved = load_checkpoint(path)
    assert [group.get("adjust_lr_fn") for group in saved["optimizers"][1]["param_groups"]] == ["match_rms_adamw"]
    saved["optimizers"][1]["param_groups"][0]["adjust_lr_fn"] = None
    save_checkpoint(path, {key: value for key, value in saved.items() if key != "format"})
    train.train(*train.reopen(str(tmp_path / "part"), {}))
    part, whole = (load_checkpoint(tmp_path / name / "last.pt") for name in ("part", "whole"))
    assert all(torch.equal(part["model"][name], value) for name, value in whole["model"].items())


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": GPT(GPTConfig(n_layer=1, n_embd=32)).state_dict(), "state": {"step": 1}})
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for content in (bytes(flipped), good[:-100], b"", b"hello" * 99):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged or not a checkpoint"):
            load_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UserError, match="its format is None"):
        load_checkpoint(path)
    torch.save({"format": "ambigpt-checkpoint-0"}, path)
    with pytest.raises(UserError, match="checkpoint-0"):
        load_checkpoint(path)
    path.write_bytes(good)
    assert load_checkpoint(path)["state"] == {"step": 1}


def test_a_diverging_run_stops_and_keeps_its_last_good_state(corpus, tmp_path):
    with pytest.raises(UserError, match=r"at step \d+: begin anew with --lr"):
        train.train(config(corpus, lr=1e18, epochs=20.0, out=str(tmp_path / "run")))
    kept = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(p).all() for p in kept["model"].values())
