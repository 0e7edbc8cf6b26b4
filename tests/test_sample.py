"""The samplers draw from the distribution they claim, and the command line and the probes do what they say."""

import io
import itertools
import json
import math
import re
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import sample
from conftest import any_order_losses, tiny
from model import GPT, GPTConfig, UserError, load_checkpoint, save_checkpoint
from sample import encode_gaps, main, memorised, multiple_choice, pick, questions
from sample import sample_ar, sample_diffusion, unmask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blank(B, T, V):
    return torch.full((B, T), V)


def nothing(B):
    return torch.empty(B, 0, dtype=torch.long)


class Table:
    """A known joint distribution p (V, V, ..., V) over texts of T tokens, which answers as a perfect GPT would."""

    def __init__(self, objective, p):
        V, T = p.shape[0], p.dim()
        self.config, self.blocks, self.seen = GPTConfig(objective, V, T, 1, 1, 2), [None], []
        self.texts = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (N, T)
        self.weight = p.flatten()[:, None, None] * F.one_hot(self.texts, V)  # (N, T, V)

    def hidden(self, idx, cache=None):
        """log p (B, T, V) of the token at each place given all others, or, for AR, of the token after each place."""
        self.seen.append(idx)
        if self.config.objective == "diffusion":
            fits = (idx[:, None] == self.config.vocab_size) | (idx[:, None] == self.texts)  # (B, N, T)
            joint = torch.einsum("bn,ntv->btv", fits.all(2).double(), self.weight)
        else:
            if cache is not None:
                cache[0][:] = [torch.cat((*cache[0], idx), dim=1)]
                idx = cache[0][0]
            P = idx.shape[1] - 1  # tokens so far, after the start symbol
            fits = (idx[:, None, 1:] == self.texts[:, :P]).all(2).double()
            joint = torch.einsum("bn,nv->bv", fits, self.weight[:, P])[:, None]
        return (joint / joint.sum(2, keepdim=True)).log()

    def head(self, h):
        return h


ORDERS = ("random", "confidence", "left")
SAMPLERS = ("ar", "uncached", *ORDERS)


def objective(sampler):
    return "diffusion" if sampler in ORDERS else "ar"


def write(sampler, model, B, **how):
    """B texts (B, T) of the model's whole block."""
    if sampler in ORDERS:
        return sample_diffusion(model, nothing(B), model.config.block_size, order=sampler, **how)[0]
    return sample_ar(model, nothing(B), model.config.block_size, use_cache=sampler == "ar", **how)[0]


def uneven(seed=0):
    """A joint distribution of three letters in three places in which every place depends on the others."""
    p = (1.2 * torch.randn(3, 3, 3, generator=generator(seed), dtype=torch.float64)).exp()
    return p / p.sum()


def alternating(T):
    """Two texts, as likely: ABAB... and BABA..."""
    p = torch.zeros([2] * T, dtype=torch.float64)
    for start in (0, 1):
        p[tuple((start + i) % 2 for i in range(T))] = 0.5
    return p


def chi_square(samples, probabilities):
    """Pearson's statistic of samples (n, T) in 0..2 against the probabilities of all 3^T texts, and its 0.1 % bound."""
    T = samples.shape[1]
    index = (samples * 3 ** torch.arange(T - 1, -1, -1)).sum(1)
    return pearson(torch.bincount(index, minlength=3**T), len(samples) * probabilities)


def pearson(counts, expected):
    assert expected.min() > 5  # so that the statistic has its textbook distribution
    free = len(expected) - 1
    bound = free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3  # Wilson-Hilferty
    return ((counts - expected) ** 2 / expected).sum().item(), bound


def soft(objective):
    """A network over 3 letters and 3 places whose distribution has no improbable corner."""
    model = tiny(objective, V=3, T=3)
    model.embed.weight.data *= 0.4
    return model


EVERY_TEXT = torch.tensor(list(itertools.product(range(3), repeat=3)))


# ----- the distribution


def test_one_by_one_in_random_order_samples_the_mixture_over_orders():
    model = soft("diffusion")
    exact = torch.stack([torch.exp(-3 * any_order_losses(model, x)).mean() for x in EVERY_TEXT])
    samples, _ = unmask(model, blank(20000, 3, 3), generator=generator())
    statistic, bound = chi_square(samples, exact)
    assert statistic < bound
    independent, _ = unmask(model, blank(20000, 3, 3), steps=1, generator=generator())
    assert chi_square(independent, exact)[0] > bound  # and the test is sharp enough to see that one step is not exact


def test_ar_samples_its_own_joint_distribution():
    model = soft("ar")
    exact = torch.exp(-3 * model(EVERY_TEXT).double())
    statistic, bound = chi_square(write("ar", model, 20000, generator=generator()), exact)
    assert statistic < bound


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_model_samples_the_known_joint_distribution(sampler):
    samples = write(sampler, Table(objective(sampler), uneven()), 20000, generator=generator())
    statistic, bound = chi_square(samples, uneven().flatten())
    assert (statistic < bound) == (sampler != "confidence")  # the surest of what was drawn are not a fair sample


def test_fewer_steps_than_tokens_are_not_exact():
    for steps in (1, 2):
        samples, _ = unmask(Table("diffusion", uneven()), blank(20000, 3, 3), steps, generator=generator())
        statistic, bound = chi_square(samples, uneven().flatten())
        assert statistic > bound


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_of_one_step_do_not_know_of_each_other(order):
    model, pair = Table("diffusion", alternating(6)), Table("diffusion", alternating(2))
    for B, steps, table, right in ((4000, 0, model, 1.0), (4000, 1, pair, 0.5), (4000, 1, model, 2 / 64)):
        T = table.config.block_size
        samples, _ = unmask(table, blank(B, T, 2), steps, order, generator=generator())
        share = (samples[:, 1:] != samples[:, :-1]).all(1).double().mean().item()
        assert abs(share - right) <= 4 * math.sqrt(right * (1 - right) / B)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_the_masks_left_after_each_step_are_binomial(steps):
    B, T = 20000, 8
    _, when = unmask(tiny("diffusion", V=3, T=T, n_layer=1), blank(B, T, 3), steps, generator=generator())
    assert when.max() == steps  # with so many rows no step is empty
    for step in range(1, steps):
        left, t = (when > step).sum(1), 1 - step / steps  # the reverse process masks each token with probability t
        expected = B * torch.tensor([math.comb(T, k) * t**k * (1 - t) ** (T - k) for k in range(T + 1)])
        common = expected > 5
        statistic, bound = pearson(torch.bincount(left, minlength=T + 1)[common], expected[common])
        assert statistic < bound


# ----- what is promised for any input


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [1, 2, 5, 8, 13, 20])
@pytest.mark.parametrize("steps", [0, 1, 3, 7, 8, 50])
def test_no_mask_is_left_and_the_prompt_is_kept(length, steps, order):
    model, prompt = tiny("diffusion", V=5, T=8), torch.tensor([[4, 0, 2]])[:, :length - 1].repeat(2, 1)
    ids, when = sample_diffusion(model, prompt, length, steps, order, generator=generator())
    assert ids.shape == when.shape == (2, length) and ids.min() >= 0 and ids.max() < 5
    P = prompt.shape[1]
    assert torch.equal(ids[:, :P], prompt) and (when[:, :P] == 0).all() and (when[:, P:] > 0).all()
    assert torch.equal(ids, sample_diffusion(model, prompt, length, steps, order, generator=generator())[0])


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_not_masked_is_kept_wherever_it_stands(order):
    model = tiny("diffusion", V=5, T=8)
    x = torch.tensor([[5, 1, 5, 5, 2, 5, 5, 3], [0, 5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 0, 1, 2, 3]])
    long = torch.cat((x, x.flip(1), x.flip(0)), dim=1)  # (3, 24): three blocks with gaps everywhere
    for given, steps in itertools.product((x, x[:, :6], long), (0, 1, 2, 5)):
        before = given.clone()
        filled, when = sample_diffusion(model, given, 0, steps, order, generator=generator(steps))
        assert (filled < 5).all() and torch.equal(filled[given < 5], given[given < 5])
        assert torch.equal(when > 0, given == 5) and torch.equal(given, before)


def test_behind_a_text_shorter_than_the_block_the_network_reads_masks(monkeypatch):
    model, read = tiny("diffusion", V=5, T=8), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx: read.append(idx) or hidden(idx))
    sample_diffusion(model, torch.tensor([[4, 0, 2]]), 6, generator=generator())
    assert len(read) == 3 and all(idx.shape == (1, 8) and (idx[:, 6:] == 5).all() for idx in read)


def test_the_orders_are_what_they_are_called():
    model, x = tiny("diffusion", V=5, T=8), torch.tensor([[5, 1, 5, 5, 5, 5, 5, 5]])
    assert unmask(model, x, 0, "left", generator=generator())[1].tolist() == [[1, 0, 2, 3, 4, 5, 6, 7]]
    assert unmask(model, x, 3, "left", generator=generator())[1].tolist() == [[1, 0, 1, 1, 2, 2, 3, 3]]
    seen = {tuple(unmask(model, x, 0, "random", generator=generator(i))[1][0].tolist()) for i in range(20)}
    assert len(seen) > 15

    class Certain:  # gives token 0 at place i a logit of i, so that the last places are the surest
        config = model.config

        def hidden(self, idx):
            return torch.arange(8.0)[:, None].expand(len(idx), 8, 1) * torch.tensor([1.0, 0, 0, 0, 0])

        def head(self, h):
            return h

    ids, when = unmask(Certain(), x, 0, "confidence", temperature=0)
    assert when.tolist() == [[7, 0, 6, 5, 4, 3, 2, 1]] and ids.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]


def test_no_pass_is_made_that_writes_nothing():
    for order, steps in itertools.product(ORDERS, (0, 3, 6, 7)):
        fewer = 0
        for seed in range(10):
            model = Table("diffusion", torch.ones([2] * 8).double() / 2**8)
            _, when = unmask(model, blank(1, 8, 2), steps, order, generator=generator(seed))
            assert len(model.seen) == when.max() and when.unique().tolist() == list(range(1, int(when.max()) + 1))
            fewer += len(model.seen) < (steps or 8)
        assert (fewer > 0) == (order == "random" and steps > 0)  # the reverse process leaves some steps empty
    model = Table("diffusion", uneven())
    assert torch.equal(unmask(model, EVERY_TEXT)[0], EVERY_TEXT) and not model.seen


@pytest.mark.parametrize("P", [0, 1, 3, 7, 8, 9, 30])
def test_ar_writes_the_same_with_and_without_cache(P):
    model = tiny("ar", V=11, T=8).float()  # in float32, as the command line does
    prompt = torch.randint(11, (4, P), generator=generator(5))
    for how in ({}, {"temperature": 0}, {"top_k": 4, "temperature": 1.5}, {"top_p": 0.8}):
        ids, when = sample_ar(model, prompt, 42, generator=generator(), **how)
        assert torch.equal(ids, sample_ar(model, prompt, 42, generator=generator(), use_cache=False, **how)[0])
        assert ids.shape == (4, 42) and torch.equal(ids[:, :P], prompt) and ids.max() < 11
        assert torch.equal(when, (torch.arange(1, 43) - P).clamp(min=0).expand(4, 42))


def test_cached_hidden_states_are_those_of_the_whole_text():
    model, x = tiny("ar", V=11, T=8), torch.randint(11, (3, 8), generator=generator())
    cache = [[] for _ in model.blocks]
    parts = [model.hidden(x[:, :3], cache=cache), *(model.hidden(x[:, i:i + 1], cache=cache) for i in range(3, 8))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(x), rtol=1e-9, atol=1e-9)


def test_what_the_ar_network_reads(monkeypatch):
    model, read = tiny("ar", V=11, T=8), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache: read.append(idx[0].tolist()) or hidden(idx, cache=cache))
    ids = sample_ar(model, torch.tensor([[1, 2]]), 14, generator=generator())[0][0].tolist()
    spans = [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (4, 8), (8, 9), (9, 10), (10, 11), (8, 12), (12, 13)]
    assert len(read) == len(spans)
    for i, (start, end) in enumerate(spans):
        first = [11] if i in (0, 6, 10) else []  # a start symbol, then all that is kept; after that only what is new
        assert read[i] == first + ids[start:end]
    read.clear()
    sample_ar(model, torch.tensor([[1, 2]]), 14, generator=generator(), use_cache=False)
    assert read[5] == [11, *ids[:7]] and read[6] == [11, *ids[4:8]] and read[7] == [11, *ids[4:9]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_temperature_orders_the_entropy_of_the_text(sampler):
    model, entropies = Table(objective(sampler), uneven(3)), []
    for temperature in (0, 0.2, 0.5, 1, 2, 5):
        samples = write(sampler, model, 4000, temperature=temperature, generator=generator())
        p = torch.unique(samples, dim=0, return_counts=True)[1] / 4000
        entropies.append(-(p * p.log()).sum().item())
    assert all(cooler < warmer - 0.02 for cooler, warmer in itertools.pairwise(entropies))
    if sampler != "confidence":  # which, however hot, still takes the likelier of what was drawn first
        assert entropies[-1] == pytest.approx(3 * math.log(3), abs=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_temperature_0_does_not_depend_on_the_seed(sampler):
    model = Table(objective(sampler), uneven())
    cold = [write(sampler, model, 50, temperature=0, generator=generator(seed)) for seed in (1, 2)]
    warm = [write(sampler, model, 50, generator=generator(seed)) for seed in (1, 2, 1)]
    assert torch.equal(*cold) and torch.equal(warm[0], warm[2]) and not torch.equal(warm[0], warm[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_extreme_logits_and_temperatures_break_nothing(sampler):
    model = tiny(objective(sampler), V=5, T=8).float()
    model.head = lambda h: 3e38 * torch.sign(h[..., :5])
    for temperature in (0, 1e-300, 1e-3, 1, 1e9):
        ids = write(sampler, model, 20, temperature=temperature, top_p=0.9, top_k=3, generator=generator())
        assert ids.min() >= 0 and ids.max() < 5


def test_pick_orders_the_entropy_and_nothing_overflows():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    entropies = []
    for temperature in (0, 1e-30, 0.5, 1, 2, 1e30):
        p = torch.bincount(pick(logits, temperature, generator=generator()), minlength=4) / 20000
        entropies.append(-(p[p > 0] * p[p > 0].log()).sum().item())
    assert entropies[0] == entropies[1] == 0 and entropies == sorted(entropies)
    assert entropies[-1] == pytest.approx(math.log(4), abs=1e-3)
    assert pick(torch.tensor([[-1e38, 1e38, 0.0]]), 1e-3, 2, generator=generator()).tolist() == [1]
    assert set(pick(logits, 5.0, 2, generator=generator()).tolist()) == {0, 1}


@pytest.mark.parametrize("top_p, kept", [(1e-9, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    p = torch.tensor([0.15, 0.5, 0.05, 0.3]).double()
    order = torch.tensor([1, 3, 0, 2])
    drawn = pick(p.log().expand(20000, 4), top_p=top_p, generator=generator())
    share = torch.bincount(drawn, minlength=4)[order] / 20000
    expected = torch.where(torch.arange(4) < kept, p[order], 0)
    torch.testing.assert_close(share, (expected / expected.sum()).float(), atol=0.015, rtol=0)
    assert (share > 0).sum() == kept


def test_top_p_counts_after_the_temperature():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(999, 3)  # at temperature 0.25 the first has 0.87 of it all
    assert set(pick(logits, 1.0, top_p=0.85, generator=generator()).tolist()) == {0, 1, 2}
    assert set(pick(logits, 0.25, top_p=0.85, generator=generator()).tolist()) == {0}


# ----- the command line


@pytest.fixture(scope="module")
def runs(documents, tmp_path_factory):
    """Two runs of small random networks, as train.py leaves them."""
    folder = tmp_path_factory.mktemp("out")
    for name in ("ar", "diffusion"):
        model = tiny(name, documents.tokenizer.vocab_size, 32).float()
        (folder / name).mkdir()
        save_checkpoint(folder / name / "best.pt", {
            "config": asdict(model.config) | {"dtype": "float32"}, "state": {"step": 7},
            "tokenizer": documents.tokenizer.spec, "model": model.state_dict()})
    return folder


def say(capsys, *argv):
    """Standard output of a command that must succeed."""
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def test_gaps_become_masks_and_all_else_is_kept(documents):
    tokenizer, V = documents.tokenizer, documents.tokenizer.vocab_size
    for text, parts in (("w1a ____ w2b", ["w1a", 8, " w2b"]), ("__3__w1a__", [3, "w1a", 8]), ("__12__ __", [12, 8]),
                        ("w1a  __ w2b____2____.", ["w1a ", 8, " w2b", 2, "."])):
        expected = [[V] * part if isinstance(part, int) else tokenizer.encode(part).tolist() for part in parts]
        assert encode_gaps(tokenizer, text, 8).tolist() == sum(expected, [])
    for text in ("w1a", "w1a __0__", "__99999999__"):
        with pytest.raises(UserError, match="--infill needs gaps"):
            encode_gaps(tokenizer, text, 8)


def test_infill_keeps_the_text_around_the_gaps(runs, capsys, tmp_path):
    long = "w1a w2b " * 20  # more than a block
    (tmp_path / "text.txt").write_text(f"{long}____ w3c")
    for text, pattern in (("w1a ____ w2b", r"w1a.{6} w2b"), (f"@{tmp_path / 'text.txt'}", f"{long[:-1]}.{{6}} w3c")):
        for extra in (["--steps=2"], ["--order=confidence"], ["--temperature=0"]):
            out = say(capsys, "--run", runs / "diffusion", "--infill", text, "--gap=6", "--json", *extra)
            for written in json.loads(out)["samples"]:
                assert re.fullmatch(pattern, written.replace("<|endoftext|>", "."), re.DOTALL)


def test_json_has_all_that_made_the_samples(runs, capsys):
    how = ["--num_samples=2", "--length=40", "--steps=4", "--top_p=0.9", "--seed=5", "--json", "--prompt=w1a"]
    first, again = (json.loads(say(capsys, "--run", runs / "diffusion", *how)) for _ in range(2))
    assert first["samples"] == again["samples"] and len(first["samples"]) == 2
    assert all(text.startswith("w1a") for text in first["samples"])
    for name, value in {"objective": "diffusion", "order": "random", "seed": 5, "steps": 4, "top_p": 0.9, "length": 40,
                        "num_samples": 2, "prompt": "w1a", "temperature": 1.0, "checkpoint": "best", "step": 7}.items():
        assert first[name] == value
    assert 2 <= first["network_evaluations"] <= 8 and first["seconds"] > 0  # two windows of at most four passes
    assert first["tokens_per_second"] == pytest.approx(2 * 37 / first["seconds"])
    both = say(capsys, "--compare", runs / "ar", runs / "diffusion", *how).splitlines()
    assert [(r["objective"], r["order"]) for r in map(json.loads, both)] == [("ar", "left"), ("diffusion", "random")]
    assert json.loads(both[0])["network_evaluations"] == 37 and json.loads(both[1])["samples"] == first["samples"]


def test_without_a_terminal_there_are_only_plain_lines(runs, capsys):
    for name in ("ar", "diffusion"):
        plain, shown = (say(capsys, "--run", runs / name, "--num_samples=2", "--length=40", *extra).splitlines()[1:]
                        for extra in ([], ["--show"]))
        assert plain == shown and not any("\033" in line or "░" in line for line in shown)


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
    monkeypatch.setattr(sample.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("COLUMNS", "30")
    text = json.loads(say(capsys, "--run", runs / name, "--num_samples=1", "--length=50", "--json"))["samples"][0]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["--run", str(runs / name), "--num_samples=1", "--length=50", "--show"]) == 0
    screens = terminal.screens()
    assert len(screens) == 52  # before the first pass, after each of 50, and at rest
    body = ["".join(screen[2:]) for screen in screens]  # after the two header lines
    assert body[-1].replace(" ", "") == re.sub(r"\s", "", text) and "░" not in body[-1]
    left = [screen.count("░") for screen in body]
    if name == "diffusion":
        assert left[0] >= 50 and left == sorted(left, reverse=True) and left[-2] == 0
    else:
        assert not any(left) and [len(screen.strip()) for screen in body][:1] == [0]
    assert terminal.getvalue().count("\033[7m") == len(text)  # every character was new once


def test_compare_stands_side_by_side(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "43")
    how = ["--compare", runs / "ar", runs / "diffusion", "--num_samples=1", "--length=60", "--prompt=w1a", "--steps=3"]
    out = say(capsys, *how).splitlines()
    texts = [json.loads(line)["samples"][0] for line in say(capsys, *how, "--json").splitlines()]
    assert "ar" in out[0] and "diffusion" in out[1]
    columns = [[line.split(" │ ")[side] for line in out[3:]] for side in (0, 1)]
    assert {len(line) for column in columns for line in column} == {19}
    for column, text in zip(columns, texts, strict=True):
        assert re.sub(r"\s", "", "".join(column)) == re.sub(r"\s", "", text)


@pytest.mark.parametrize("argv, message", [
    (["--run=ar", "--infill=a ____ b"], "can not fill a gap"), (["--run=ar", "--steps=4"], "are for diffusion"),
    (["--run=ar", "--order=left"], "are for diffusion"), (["--run=diffusion", "--order=up"], "invalid choice: 'up'"),
    (["--run=diffusion", "--infill=@ar/best.pt"], "utf-8"), (["--json", "--probe"], "not allowed with"),
    (["--run=diffusion", "--infill=w1a"], "needs gaps"), (["--run=diffusion", "--infill=@none"], "none"),
    (["--run=diffusion", "--temperature=-1"], "--temperature=-1"), (["--run=ar", "--temperature=nan"], "--temperature"),
    (["--run=ar", "--top_p=0"], "--top_p=0"), (["--run=ar", "--top_p=1.1"], "--top_p=1.1"), (["--seed=x"], "--seed"),
    (["--run=ar", "--length=2", "--prompt=w1a"], "leaves nothing to write"), (["--nonsense"], "--nonsense"),
    (["--run=ar", "--num_samples=0"], "--num_samples=0"), (["--run=none"], "no such checkpoint"),
    (["--run=ar", "--compare", "ar", "diffusion"], "not allowed with"), (["--run=ar", "--prompt=\u2603"], "lacks"),
    (["--run=ar", "--prompt=a", "--infill=a ____ b"], "not allowed with"),
    (["--run=ar", "--checkpoint=last"], "last.pt"),
])
def test_bad_input_is_answered_in_one_line(runs, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(runs)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


# ----- probes


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents of sentences with words of their own, so that one can tell whose continuation a choice is."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for i in range(120):
        words = [f"w{i}{c}" for c in "abcdef"]
        text = "".join(" ".join(rng.choice(words, 6)) + ". " for _ in range(60))
        (folder / f"{i}.txt").write_text(text)
    prepare.prepare(inputs=sorted(folder.glob("*.txt")), tokenizer="char", out=folder / "data")
    return prepare.load(folder / "data")


def test_questions_share_the_context_and_only_the_first_choice_goes_on(documents):
    asked = questions(documents, "val", 64, count=50)
    assert asked.shape == (50, 4, 64) and np.array_equal(asked, questions(documents, "val", 64, count=50))
    held_out = documents.splits["val"].astype(np.int64).tobytes()
    for question in asked:
        assert all(np.array_equal(choice[:48], question[0, :48]) for choice in question)
        assert question[0].tobytes() in held_out and not any(choice.tobytes() in held_out for choice in question[1:])
        texts = [documents.tokenizer.decode(choice) for choice in question]
        owners = {text[49:].split()[1].rstrip(".")[:-1] for text in texts}
        assert len(owners) == 4 and all(text[47] == "." for text in texts)  # four documents, after a sentence


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_an_untrained_model_guesses(documents, objective):
    torch.manual_seed(0)
    model = GPT(GPTConfig(objective, documents.tokenizer.vocab_size, 32, 1, 1, 16)).eval()
    right, interval = multiple_choice(model, questions(documents, "val", 32, count=400))
    assert abs(right - 0.25) < 1.5 * interval and interval == pytest.approx(1.96 * math.sqrt(right * (1 - right) / 400))


def test_questions_need_four_documents(documents):
    with pytest.raises(UserError, match="too few documents"):
        questions(documents, "val", 100000)


def test_memorised_counts_verbatim_sequences():
    training = np.arange(100)
    recited = np.arange(20, 40)[None]  # 13 sequences of 8, all there
    half = np.concatenate((np.arange(10, 20), np.arange(60, 70)))[None]  # 3 + 3 of 13
    assert memorised(recited, training) == 1
    assert memorised(half, training) == 6 / 13
    assert memorised(recited[:, ::-1], training) == 0


def test_a_checkpoint_carries_all_that_sampling_needs(tmp_path, documents):
    model = GPT(GPTConfig("ar", documents.tokenizer.vocab_size, 16, 1, 1, 16))
    save_checkpoint(tmp_path / "best.pt", {"model": model.state_dict(), "tokenizer": documents.tokenizer.spec})
    tokenizer = prepare.Tokenizer(load_checkpoint(tmp_path / "best.pt")["tokenizer"])
    assert tokenizer.decode(tokenizer.encode("w1a w2b.")) == "w1a w2b."
