"""notebooks/probe.py: what it measures of a finished run, and that it measures the run it is asked for."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import probe
import sample
import sampling
import train
from conftest import change_one_id, tiny
from model import GPT, GPTConfig, UserError, evaluate, load_checkpoint, model_from_checkpoint, save_checkpoint
from probe import chain_rule_nll
from sample import unmask

T = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of documents, each of sentences with words of its own, and a short run of each objective."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    for i in range(120):
        words = [f"w{i}{c}" for c in "abcdef"]
        text = "".join(" ".join(rng.choice(words, 6)) + ". " for _ in range(40))
        (folder / f"{i}.txt").write_text(text)
    prepare.prepare(inputs=sorted(folder.glob("*.txt")), tokenizer="char", out=folder / "data")
    for objective in ("ar", "diffusion"):
        config = train.make_config(
            "laptop", objective=objective, data=str(folder / "data"), unique_tokens=1024, epochs=1, n_layer=1,
            n_head=1, n_embd=16, block_size=T, batch_size=8, dropout=0.5, eval_blocks=70, device="cpu",
            dtype="float32", out=str(folder / objective))
        train.train(config)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return prepare.load(folder / "data")


def copy(run, to, **changed):
    """A copy of a run whose config has other values in both checkpoints; None: not that key."""
    shutil.copytree(run, to)
    for path in (to / "best.pt", to / "last.pt"):
        saved = load_checkpoint(path)
        config = saved["config"] | changed
        saved["config"] = {name: value for name, value in config.items() if value is not None}
        save_checkpoint(path, saved)
    return to


def earlier_best(run):
    """Let the best network of a run be another one than the last, of its first step."""
    saved = load_checkpoint(run / "best.pt")
    saved["model"] = {name: 1.5 * value for name, value in saved["model"].items()}
    save_checkpoint(run / "best.pt", saved | {"state": saved["state"] | {"step": 1}})


def lines(capsys, *argv):
    """The JSON lines of a command that must succeed: nothing else is on its standard output."""
    capsys.readouterr()
    assert probe.main([str(a) for a in argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def held_out(data, split, N):
    """N blocks (N, T), spread evenly over a held-out split, as the evaluation takes them."""
    ids = torch.from_numpy(data.splits[split].astype(np.int64))
    blocks = ids[:len(ids) // T * T].view(-1, T)
    return blocks[np.linspace(0, len(blocks) - 1, min(N, len(blocks))).round().astype(int)]


# ----- the held-out loss


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_the_loss_is_that_of_the_log(folder, tmp_path, capsys, objective):
    run = tmp_path / objective
    shutil.copytree(folder / objective, run)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    line, = lines(capsys, run, "--only=loss")  # the last network is the best
    assert (line["run"], line["checkpoint"], line["split"]) == (str(run), "best", "val")
    assert line["step"] == last["step"]
    assert all(line[key] == last[f"best_{key}"] == last[f"final_{key}"] for key in ("loss", "stderr", "bpb"))
    assert line["command"] == f"python notebooks/probe.py {run} --only=loss"
    earlier_best(run)
    best, final = lines(capsys, run, "--only=loss")
    assert (best["checkpoint"], best["step"], final["checkpoint"]) == ("best", 1, "last")
    assert best["loss"] != final["loss"] and all(line[key] == final[key] for key in ("loss", "stderr", "bpb"))
    assert lines(capsys, run, "--only=loss", "--checkpoint=last") == [final | {
        "command": f"python notebooks/probe.py {run} --only=loss --checkpoint=last"}]


def test_another_split_is_scored_and_the_exact_loss_beside_the_bound(folder, data, capsys):
    ar, diffusion = lines(capsys, folder / "ar", folder / "diffusion", "--only=loss", "--split=tune")
    blocks = held_out(data, "tune", 70)
    model = model_from_checkpoint(load_checkpoint(folder / "diffusion" / "last.pt"))
    assert diffusion["split"] == "tune" and "left_to_right" not in ar and ar["stderr"] == 0
    assert (diffusion["loss"], diffusion["stderr"]) == evaluate(model, blocks, 24)
    assert diffusion["left_to_right"] == pytest.approx(chain_rule_nll(model, blocks).mean().item(), abs=1e-6)
    read = [data.tokenizer.pieces[i] for i in blocks.flatten().tolist() if i != data.tokenizer.eot]
    bits = diffusion["loss"] * blocks.numel() / len(b"".join(read)) / math.log(2)
    assert diffusion["bpb"] == pytest.approx(bits, abs=1e-9)


def test_a_run_of_an_older_version_is_measured_with_its_own_settings(folder, tmp_path, capsys):
    older = copy(folder / "diffusion", tmp_path / "older", final_draws=None, final_passes=6, init=None)
    model = model_from_checkpoint(load_checkpoint(older / "last.pt"))
    blocks = prepare.open_data(load_checkpoint(folder / "diffusion" / "last.pt")["config"])[2]
    line, = lines(capsys, older, "--only=loss")
    assert (line["loss"], line["stderr"]) == evaluate(model, blocks, 6)


def test_bits_per_byte_count_the_characters_that_were_left_out(folder, tmp_path, capsys):
    """As 8 bits for each of their bytes, in the log of the run and here: not as nothing."""
    rng = np.random.default_rng(0)
    texts = [path.read_text() + "§¶" * int(rng.integers(9)) for path in sorted(folder.glob("*.txt"))]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare.prepare(inputs=[tmp_path / "my.jsonl"], tokenizer=str(folder / "data"), out=tmp_path / "data")
    config = load_checkpoint(folder / "ar" / "best.pt")["config"]
    given = {name: config[name] for name in train.FLAGS} | {"data": str(tmp_path / "data"), "eval_blocks": 0}
    log = train.train(train.make_config("laptop", **given | {"out": str(tmp_path / "run")}))
    c, ids = log[0]["config"], prepare.load(tmp_path / "data")
    part, tokens = ids.meta["splits"]["val"], c["eval_tokens"]
    dropped = 2 * sum(part["dropped"].values()) * tokens / part["tokens"]  # two bytes each
    kept = part["bytes"] * tokens / part["tokens"]
    assert c["eval_dropped"] == round(dropped) > 20 and c["eval_bytes"] == pytest.approx(kept + dropped, rel=0.01)
    expected = (log[-1]["best_loss"] * tokens / math.log(2) + 8 * c["eval_dropped"]) / c["eval_bytes"]
    assert log[-1]["best_bpb"] == pytest.approx(expected, abs=1e-9)
    assert lines(capsys, tmp_path / "run", "--only=loss")[0]["bpb"] == log[-1]["best_bpb"]


# ----- multiple choice and memorised text


def test_questions_share_the_context_and_only_the_first_choice_goes_on(data):
    asked = probe.questions(data, "val", 64, count=50)
    assert asked.shape == (50, 4, 64) and np.array_equal(asked, probe.questions(data, "val", 64, count=50))
    text = data.splits["val"].astype(np.int64).tobytes()
    for question in asked:
        assert all(np.array_equal(choice[:48], question[0, :48]) for choice in question)
        assert question[0].tobytes() in text and not any(choice.tobytes() in text for choice in question[1:])
        texts = [data.tokenizer.decode(choice) for choice in question]
        owners = {text[49:].split()[1].rstrip(".")[:-1] for text in texts}
        assert len(owners) == 4 and all(text[47] == "." for text in texts)  # four documents, after a sentence


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_an_untrained_model_guesses(data, objective):
    torch.manual_seed(0)
    model = GPT(GPTConfig(objective, data.tokenizer.vocab_size, 32, 1, 1, 16)).eval()
    right, interval = probe.multiple_choice(model, probe.questions(data, "val", 32, count=400))
    assert abs(right - 0.25) < 1.5 * interval
    assert interval == pytest.approx(1.96 * math.sqrt(right * (1 - right) / 400))


def test_a_model_that_knows_the_text_is_always_right(data):
    asked, V = probe.questions(data, "val", 32, count=40), data.tokenizer.vocab_size
    known = {question[0, :24].tobytes(): torch.from_numpy(question[0]) for question in asked}

    def logits(past):  # (B, 32, V); the context without its start symbol tells which text it is
        return torch.stack([10.0 * F.one_hot(known[row[1:25].numpy().tobytes()], V) for row in past])

    model = SimpleNamespace(config=GPTConfig("ar", V, 32), embed=torch.nn.Embedding(1, 1), logits=logits)
    right, interval = probe.multiple_choice(model, asked)
    assert right == 1 and interval == pytest.approx(1.96 / 40)  # never 0: one more question may be missed


def test_questions_need_four_documents(data):
    with pytest.raises(UserError, match="too few documents .*--only=loss and"):
        probe.questions(data, "val", 100000)


def test_memorised_counts_verbatim_sequences():
    training = np.arange(100)
    same = np.arange(20, 40)[None]  # 13 sequences of 8, all there
    half = np.concatenate((np.arange(10, 20), np.arange(60, 70)))[None]  # 3 + 3 of 13
    assert probe.memorised(same, training) == 1
    assert probe.memorised(half, training) == 6 / 13
    assert probe.memorised(same[:, ::-1], training) == 0


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_a_line_tells_both_of_the_samples_that_sample_py_writes(folder, data, capsys, objective):
    run = folder / objective
    line, = lines(capsys, run, "--only=choice", "--only=memorised")
    assert not {"loss", "left_to_right", "left"} & set(line)
    model = model_from_checkpoint(load_checkpoint(run / "best.pt"))
    right, interval = probe.multiple_choice(model, probe.questions(data, "val", T))
    assert (line["multiple_choice"], line["multiple_choice_interval"]) == (right, interval)
    ids, training = probe.write(model), data.splits["train"][:1024]
    assert line["memorised"] == probe.memorised(ids, training)
    assert line["memorised_held_out"] == probe.memorised(data.splits["val"][None], training)
    assert sample.main([f"--run={run}", "--num_samples=64", "--seed=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == [data.tokenizer.decode(row) for row in ids]


# ----- the mixture over orders


def test_mixture_scores_a_network_in_random_orders_and_an_ar_network_in_its_own(folder, data):
    blocks, tune = held_out(data, "val", 40), held_out(data, "tune", 40)
    for objective, K in (("diffusion", 5), ("ar", 0)):
        found = probe.mixture(folder / objective, 5, N=40)
        other = probe.mixture(folder / objective, 0, "tune", N=40)  # other text than the run's own
        model = model_from_checkpoint(load_checkpoint(folder / objective / "best.pt"))
        assert found["left"] == pytest.approx((T * chain_rule_nll(model, blocks)).tolist(), abs=1e-3)
        assert other["left"] == pytest.approx((T * chain_rule_nll(model, tune)).tolist(), abs=1e-3)
        assert (found["split"], other["split"], found["block_size"]) == ("val", "tune", T)
        assert np.shape(found["orders"]) == ((5, 40) if K else (0,)) and other["orders"] == []
        assert len({tuple(nll) for nll in [found["left"], *found["orders"]]}) == K + 1
        if K:
            bound, error = evaluate(model, blocks, 100)
            assert abs(np.mean(found["orders"]) / T - bound) < 0.02 + 3 * error
            assert found["averaged"] == []
        else:  # the mean of what it predicts under five dropout masks: not that of their losses
            past = F.pad(blocks[:, :-1], (1, 0), value=model.config.vocab_size)
            model.train()
            torch.manual_seed(0)
            p = [sum(model.logits(part).softmax(-1) for _ in range(5)) / 5 for part in past.split(32)]
            p = torch.cat(p).gather(2, blocks[..., None]).squeeze(2)
            assert found["averaged"] == pytest.approx((-p.log().sum(1)).tolist(), abs=1e-2)
            assert found["averaged"] != pytest.approx(found["left"], abs=1e-2) and other["averaged"] == []


def test_orders_are_measured_where_they_are_asked_for(folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folder / "diffusion", run)
    earlier_best(run)
    best, last = lines(capsys, run, "--only=orders", "--orders=2", "--split=tune")
    for line, checkpoint in ((best, "best"), (last, "last")):
        assert line.items() >= probe.mixture(run, 2, "tune", checkpoint=checkpoint).items()
        assert np.shape(line["left"]) == (64,) and np.shape(line["orders"]) == (2, 64) and "loss" not in line
    assert best["left"] != last["left"]


# ----- what a person can get wrong


def fails(capsys, message, *argv):
    """A command that must end with 2, one line on standard error and none on standard output."""
    assert probe.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_a_run_that_is_not_there_or_damaged_is_told_in_one_line(folder, tmp_path, capsys):
    fails(capsys, "no such checkpoint", tmp_path / "none")
    run = tmp_path / "run"
    shutil.copytree(folder / "ar", run)
    with open(run / "best.pt", "r+b") as f:
        f.truncate(1000)
    fails(capsys, "best.pt", run)
    fails(capsys, "--device=nothing", folder / "ar", "--device=nothing")


def test_data_that_has_changed_is_told_in_one_line(folder, tmp_path, capsys):
    """Anything that a number rests on: another text, or one id of val with its hash made to fit."""
    run = copy(folder / "ar", tmp_path / "run", data=str(tmp_path / "data"))
    shutil.copytree(folder / "data", tmp_path / "data")
    assert lines(capsys, run, "--only=loss")
    change_one_id(tmp_path / "data")
    for flags in (["--only=loss"], ["--only=choice"], ["--only=orders", "--orders=1"]):
        fails(capsys, "is not the data", run, *flags)
    shutil.rmtree(tmp_path / "data")
    fails(capsys, str(tmp_path / "data"), run)


def test_the_data_may_lie_in_another_folder_now(folder, tmp_path, capsys):
    run, data = copy(folder / "ar", tmp_path / "run", data=str(tmp_path / "gone")), tmp_path / "moved"
    fails(capsys, "gone", run, "--orders=1")
    shutil.copytree(folder / "data", data)
    moved, = lines(capsys, run, "--orders=1", f"--data={data}")
    stayed, = lines(capsys, folder / "ar", "--orders=1")
    changed = {"run": str(run), "command": f"python notebooks/probe.py {run} --orders=1 --data={data}"}
    assert moved == stayed | changed and len(moved["left"]) == 64
    change_one_id(data)
    fails(capsys, "is not the data of this run: name its folder by --data", run, f"--data={data}")


def test_the_table_of_samples_takes_data_from_another_folder_too(folder, tmp_path, capsys):
    for name in ("ar", "diffusion"):
        copy(folder / name, tmp_path / name, data=str(tmp_path / "gone"))
    data, found = tmp_path / "moved", tmp_path / "new" / "found.json"
    shutil.copytree(folder / "data", data)
    argv = [f"--ar={tmp_path / 'ar'}", f"--diffusion={tmp_path / 'diffusion'}", "--count=2", "--seed=1"]
    assert sampling.main([*argv, f"--json={found}"]) == 2 and "gone" in capsys.readouterr().err
    for wrong, named in ((f"--json={tmp_path}", "no file can be written"), ("--count=0", "at least 1"),
                         (f"--json={data / 'meta.json' / 'x'}", "meta.json")):
        assert sampling.main([*argv, f"--data={data}", wrong]) == 2 and named in capsys.readouterr().err
    assert sampling.main([*argv, f"--json={found}", f"--data={data}"]) == 0
    assert json.loads(found.read_text())["command"].endswith(f"--seed=1 --data={data}")
    change_one_id(data)
    assert sampling.main([*argv, f"--json={found}", f"--data={data}"]) == 2
    assert "is not the data of this run" in capsys.readouterr().err


def test_the_sampler_that_masks_again_keeps_to_its_average_and_to_what_is_given():
    """Without masking again it is unmask, bit for bit; with it, it masks as many as it should and no given token."""
    model, V, T, generator = tiny("diffusion", V=3, T=40).float(), 3, 40, torch.Generator()
    x = torch.full((64, T), V)
    for steps in (1, 5, 16):
        written = sampling.remask(model, x, steps, 0, generator.manual_seed(1))
        assert written.equal(unmask(model, x, steps, generator=generator.manual_seed(1))[0])
    seen, hidden = [], model.hidden
    model.hidden = lambda x: seen.append((x == V).double().mean().item()) or hidden(x)
    written = sampling.remask(model, x, 20, 0.2, generator)
    assert len(seen) == 20 and not (written == V).any()
    assert np.abs(np.array(seen) - np.linspace(1, 0.05, 20)).max() < 0.05  # 2560 tokens: 0.01 is one deviation
    x[:, 10:] = torch.randint(V, (64, T - 10), generator=generator)
    texts = []
    model.hidden = lambda x: texts.append(x) or hidden(x)
    sampling.remask(model, x, 20, 0.2, generator)
    assert all(text[:, 10:].equal(x[:, 10:]) for text in texts)
    again = [(before != V) & (after == V) for before, after in zip(texts, texts[1:], strict=False)]
    assert sum(mask.sum() for mask in again) > 100  # that are masked again


def test_masking_again_is_measured_on_texts_and_in_gaps():
    """A gap of one token is filled by its one conditional, so a word is found as often as that says it is."""
    models = {name: tiny(name, V=4, T=16).float() for name in ("ar", "diffusion")}
    words = torch.randint(4, (500, 16), generator=torch.Generator().manual_seed(0))
    masked = words.clone()
    masked[:, 8] = 4
    with torch.no_grad():
        p = models["diffusion"].logits(masked)[:, 8].softmax(-1).gather(1, words[:, 8:9]).mean().item()
    rows = list(sampling.measure_remasking(models, np.arange(99) % 4, {1: words.numpy()}, count=2, seed=1))
    assert [row["what"] for row in rows] == ["texts"] * 12 + ["gaps"] * 8
    assert {row["sigma"] for row in rows} == {0, 0.01, 0.03, 0.1, 0.3}
    assert all(row["words"] == 500 and abs(row["found"] - p) < 2 * row["interval"] for row in rows[12:])


@pytest.mark.parametrize("flags", [
    [], ["--orders=-1"], ["--only=orders"], ["--only=loss", "--orders=2"], ["--only=all"], ["--split=train"]])
def test_flags_that_mean_nothing_are_refused(folder, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        probe.main([str(folder / "ar"), *flags] if flags else [])
    assert ended.value.code == 2 and capsys.readouterr().out == ""


# ----- several networks as one


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_an_ensemble_predicts_the_mean_of_the_probabilities(objective):
    def network(seed):
        torch.manual_seed(seed)
        net = GPT(GPTConfig(objective, vocab_size=7, block_size=8, n_layer=1, n_head=1, n_embd=8 * seed)).eval()
        for p in net.parameters():
            p.data *= 8  # so that the networks differ
        return net

    nets, x = [network(1), network(2)], torch.randint(7, (8, 8), generator=torch.Generator().manual_seed(0))
    one, both = probe.Ensemble(nets[:1]), probe.Ensemble(nets)
    assert math.isclose(evaluate(one, x)[0], evaluate(nets[0], x)[0], rel_tol=1e-6)
    mean = sum(net.logits(x).softmax(-1) for net in nets) / 2  # (8, 8, V)
    torch.testing.assert_close(both.logits(x).softmax(-1), mean)
    alone = [evaluate(net, x)[0] for net in nets]
    assert evaluate(both, x)[0] < sum(alone) / 2 - 0.01  # by Jensen, as they differ
    given = {} if objective == "ar" else {"mask": torch.arange(8).expand(8, 8) % 2 == 0}
    read = F.pad(x[:, :-1], (1, 0), value=7) if objective == "ar" else x.masked_fill(given["mask"], 7)
    p = (sum(net.logits(read).softmax(-1) for net in nets) / 2).gather(2, x[:, :, None])[:, :, 0]
    scored = given.get("mask", torch.ones_like(x, dtype=torch.bool))
    expected = -(p.log() * scored).sum(1) / scored.sum(1)
    torch.testing.assert_close(both(x, **given), expected)


def test_the_command_scores_an_ensemble(folder, data, capsys):
    probe.print_measures([str(folder / "ar"), str(folder / "ar"), "--ensemble"])
    row = json.loads(capsys.readouterr().out)
    alone = load_checkpoint(folder / "ar/best.pt")["records"][-1]
    assert row["run"] == [str(folder / "ar")] * 2 and math.isclose(row["loss"], alone["val_loss"], rel_tol=1e-5)
    with pytest.raises(UserError, match="differ in objective"):
        probe.print_measures([str(folder / "ar"), str(folder / "diffusion"), "--ensemble"])
    with pytest.raises(SystemExit):
        probe.print_measures([str(folder / "ar"), "--ensemble", "--only=choice"])
    assert "leave out --only" in capsys.readouterr().err
    probe.print_measures([str(folder / "ar"), "--ensemble", "--checkpoint=last"])
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "last"
