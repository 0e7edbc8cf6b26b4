"""The samplers draw from the distribution they claim, and the command line does what it says."""

import itertools
import json
import math
import os
import re
import shutil
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from conftest import any_order_losses, tiny
from model import GPTConfig, UserError, save_checkpoint
from prepare import Tokenizer
from sample import encode_gaps, main, pick, sample_ar, sample_diffusion, unmask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blank(B, T, V):
    return torch.full((B, T), V)


def nothing(B):
    return torch.empty(B, 0, dtype=torch.long)


class Table:
    """A known joint distribution p (V, V, ..., V) over texts of T tokens: it answers as a perfect GPT."""

    def __init__(self, objective, p):
        V, T = p.shape[0], p.dim()
        self.config, self.blocks, self.seen = GPTConfig(objective, V, T, 1, 1, 2), [None], []
        self.texts = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (N, T)
        self.weight = p.flatten()[:, None, None] * F.one_hot(self.texts, V)  # (N, T, V)

    def hidden(self, idx, cache=None):
        """log p (B, T, V) of the token at each position given all others; AR: of the token after it."""
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


class Constant:
    """A diffusion model with the same logits (T, V), whatever it reads."""

    def __init__(self, V, logits):
        self.config, self.logits = GPTConfig("diffusion", V, len(logits), 1, 1, 2), logits

    def hidden(self, idx):
        return self.logits.expand(len(idx), -1, -1)

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
    """A joint distribution of three letters at three positions, each of which depends on the others."""
    p = (1.2 * torch.randn(3, 3, 3, generator=generator(seed), dtype=torch.float64)).exp()
    return p / p.sum()


def alternating(T):
    """Two texts, as likely: ABAB... and BABA..."""
    p = torch.zeros([2] * T, dtype=torch.float64)
    for start in (0, 1):
        p[tuple((start + i) % 2 for i in range(T))] = 0.5
    return p


def chi_square(samples, probabilities):
    """Pearson's statistic of samples (n, T) in 0..2 against probabilities (3^T,), and its 0.1 % bound."""
    T = samples.shape[1]
    index = (samples * 3 ** torch.arange(T - 1, -1, -1)).sum(1)
    return pearson(torch.bincount(index, minlength=3**T), len(samples) * probabilities)


def pearson(counts, expected):
    assert expected.min() > 5  # so that the statistic has its textbook distribution
    free = len(expected) - 1
    bound = free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3  # Wilson-Hilferty
    return ((counts - expected) ** 2 / expected).sum().item(), bound


def soft(objective):
    """A network over 3 letters and 3 positions whose distribution has no improbable corner."""
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
    assert chi_square(independent, exact)[0] > bound  # the test is sharp enough: one step is not exact


def test_ar_samples_its_own_joint_distribution():
    model = soft("ar")
    exact = torch.exp(-3 * model(EVERY_TEXT).double())
    statistic, bound = chi_square(write("ar", model, 20000, generator=generator()), exact)
    assert statistic < bound


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_model_samples_the_known_joint_distribution(sampler):
    samples = write(sampler, Table(objective(sampler), uneven()), 20000, generator=generator())
    statistic, bound = chi_square(samples, uneven().flatten())
    assert (statistic < bound) == (sampler != "confidence")  # the surest are not a fair sample


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
    _, when = unmask(Constant(3, torch.zeros(T, 3)), blank(B, T, 3), steps, generator=generator())
    assert when.max() == steps  # with so many rows no step is empty
    for step in range(1, steps):
        left, t = (when > step).sum(1), 1 - step / steps  # t: the probability of a mask
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
def test_what_is_not_masked_is_kept_at_every_position(order):
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
    certain = Constant(5, torch.arange(8.0)[:, None] * torch.tensor([1.0, 0, 0, 0, 0]))  # the later the surer
    ids, when = unmask(certain, x, 0, "confidence", temperature=0)
    assert when.tolist() == [[7, 0, 6, 5, 4, 3, 2, 1]] and ids.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]


def test_no_forward_pass_is_made_that_writes_nothing():
    for order, steps in itertools.product(ORDERS, (0, 3, 6, 7)):
        fewer = 0
        for seed in range(10):
            model = Table("diffusion", torch.ones([2] * 8).double() / 2**8)
            _, when = unmask(model, blank(1, 8, 2), steps, order, generator=generator(seed))
            assert len(model.seen) == when.max()
            assert when.unique().tolist() == list(range(1, int(when.max()) + 1))
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
        again, _ = sample_ar(model, prompt, 42, use_cache=False, generator=generator(), **how)
        assert torch.equal(ids, again)
        assert ids.shape == (4, 42) and torch.equal(ids[:, :P], prompt) and ids.max() < 11
        assert torch.equal(when, (torch.arange(1, 43) - P).clamp(min=0).expand(4, 42))


def test_cached_hidden_states_are_those_of_the_whole_text():
    model, x = tiny("ar", V=11, T=8), torch.randint(11, (3, 8), generator=generator())
    cache = [[] for _ in model.blocks]
    parts = [model.hidden(part, cache=cache) for part in (x[:, :3], *x[:, 3:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(x), rtol=1e-9, atol=1e-9)


def test_what_the_ar_network_reads(monkeypatch):
    model, read = tiny("ar", V=11, T=8), []
    hidden = model.hidden

    def spy(idx, cache):
        read.append(idx[0].tolist())
        return hidden(idx, cache=cache)

    monkeypatch.setattr(model, "hidden", spy)
    ids = sample_ar(model, torch.tensor([[1, 2]]), 14, generator=generator())[0][0].tolist()
    spans = [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7),
             (4, 8), (8, 9), (9, 10), (10, 11), (8, 12), (12, 13)]
    assert len(read) == len(spans)
    for i, (start, end) in enumerate(spans):
        first = [11] if i in (0, 6, 10) else []  # a start symbol and all that is kept; later only what is new
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


@pytest.mark.parametrize("top_p, kept", [
    (1e-9, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    p = torch.tensor([0.15, 0.5, 0.05, 0.3]).double()
    order = torch.tensor([1, 3, 0, 2])
    drawn = pick(p.log().expand(20000, 4), top_p=top_p, generator=generator())
    share = torch.bincount(drawn, minlength=4)[order] / 20000
    expected = torch.where(torch.arange(4) < kept, p[order], 0)
    torch.testing.assert_close(share, (expected / expected.sum()).float(), atol=0.015, rtol=0)
    assert (share > 0).sum() == kept


def test_top_p_counts_after_the_temperature():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(999, 3)  # the first has 0.87 at temperature 0.25
    assert set(pick(logits, 1.0, top_p=0.85, generator=generator()).tolist()) == {0, 1, 2}
    assert set(pick(logits, 0.25, top_p=0.85, generator=generator()).tolist()) == {0}


# ----- the command line


TOKENIZER = Tokenizer({"kind": "char", "characters": " .0123456789abcdefw"})


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


def say(capsys, *argv):
    """Standard output of a command that must succeed."""
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def test_gaps_become_masks_and_all_else_is_kept():
    V = TOKENIZER.vocab_size
    for text, parts in (("w1a ____ w2b", ["w1a", 8, " w2b"]), ("__3__w1a__", [3, "w1a", 8]),
                        ("__12__ __", [12, 8]), ("w1a  __ w2b____2____.", ["w1a ", 8, " w2b", 2, "."])):
        expected = []
        for part in parts:
            expected += [V] * part if isinstance(part, int) else TOKENIZER.encode(part).tolist()
        assert encode_gaps(TOKENIZER, text, 8).tolist() == expected
    for text in ("w1a", "w1a __0__", "__99999999__", f"__{'9' * 5000}__"):
        with pytest.raises(UserError, match="--infill needs gaps"):
            encode_gaps(TOKENIZER, text, 8)


def test_infill_keeps_the_text_around_the_gaps(runs, capsys, tmp_path):
    long = "w1a w2b " * 20  # more than a block
    (tmp_path / "text.txt").write_text(f"{long}____ w3c")
    for text, pattern in (("w1a ____ w2b", r"w1a.{6} w2b"),
                          (f"@{tmp_path / 'text.txt'}", f"{long[:-1]}.{{6}} w3c")):
        for extra in (["--steps=2"], ["--order=confidence"], ["--temperature=0"]):
            out = say(capsys, "--run", runs / "diffusion", "--infill", text, "--gap=6", "--json", *extra)
            for written in json.loads(out)["samples"]:
                assert re.fullmatch(pattern, written.replace("<|endoftext|>", "."), re.DOTALL)


def test_json_has_all_that_made_the_samples(runs, capsys):
    how = ["--num_samples=2", "--length=40", "--steps=4", "--top_p=0.9", "--seed=5", "--json", "--prompt=w1a"]
    first, again = (json.loads(say(capsys, "--run", runs / "diffusion", *how)) for _ in range(2))
    assert first["samples"] == again["samples"] and len(first["samples"]) == 2
    assert all(text.startswith("w1a") for text in first["samples"])
    assert first.items() >= {
        "objective": "diffusion", "order": "random", "seed": 5, "steps": 4, "top_p": 0.9, "length": 40,
        "num_samples": 2, "prompt": "w1a", "temperature": 1.0, "checkpoint": "best", "step": 7}.items()
    assert 2 <= first["network_evaluations"] <= 8 and first["seconds"] > 0  # two windows
    assert first["tokens_per_second"] == pytest.approx(2 * 37 / first["seconds"])
    how.remove("--steps=4")
    ar = json.loads(say(capsys, "--run", runs / "ar", *how))
    assert (ar["objective"], ar["order"], ar["network_evaluations"]) == ("ar", "left", 37)


@pytest.mark.parametrize("name, flags, order", [
    ("ar", [], "left"), ("diffusion", [], "random"), ("diffusion", ["--infill=a ____ b"], "random"),
    ("diffusion", ["--temperature=0"], "random"), ("diffusion", ["--order=confidence"], "confidence"),
    ("diffusion", ["--order=left"], "left")])
def test_json_tells_the_order_that_was_used(runs, capsys, name, flags, order):
    how = ["--run", runs / name, "--num_samples=1", "--length=9", "--json", *flags]
    record = json.loads(say(capsys, *how))
    assert record["order"] == order
    if name == "diffusion":  # to name that order changes nothing
        assert json.loads(say(capsys, *how, "--order", order))["samples"] == record["samples"]


@pytest.mark.parametrize("argv, message", [
    (["--run=ar", "--infill=a ____ b"], "for diffusion"), (["--run=ar", "--steps=4"], "for diffusion"),
    (["--run=ar", "--order=left"], "for diffusion"), (["--run=diffusion", "--order=up"], "invalid choice"),
    (["--run=diffusion", "--infill=@ar/best.pt"], "utf-8"),
    (["--run=diffusion", "--infill=w1a"], "needs gaps"), (["--run=diffusion", "--infill=@none"], "none"),
    (["--run=diffusion", "--temperature=-1"], "--temperature=-1"), (["--run=ar", "--top_p=0"], "--top_p=0"),
    (["--run=ar", "--temperature=nan"], "--temperature"), (["--run=ar", "--top_p=1.1"], "--top_p=1.1"),
    (["--run=ar", "--length=2", "--prompt=w1a"], "leaves nothing to write"), (["--nonsense"], "--nonsense"),
    (["--run=ar", "--num_samples=0"], "--num_samples=0"), (["--run=none"], "no such checkpoint"),
    (["--seed=x"], "--seed"),
    (["--run=ar", "--prompt=a", "--infill=a ____ b"], "not allowed with"), (["--prompt=\u2603"], "no run"),
    (["--run=ar", "--prompt=\u2603"], "lacks"),
    (["--run=ar", "--checkpoint=last"], "last.pt"), ([], "no run under out/")])
def test_bad_input_is_answered_in_a_line_or_two(runs, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(runs)
    try:
        code = main(argv)
    except SystemExit as end:  # argparse
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and "error: " in err.splitlines()[-1] and message in err.splitlines()[-1]
    assert err.count("\n") <= 2


def test_the_newest_run_is_the_default_and_says_if_it_was_not_evaluated(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("ar", "diffusion")):
        shutil.copytree(runs / name, tmp_path / "out" / name)
        shutil.copy(runs / name / "best.pt", tmp_path / "out" / name / "last.pt")
        os.utime(tmp_path / "out" / name / "last.pt", (1e9 - age, 1e9 - age))
    assert json.loads(say(capsys, "--json", "--length=4"))["run"] == "out/ar"
    (tmp_path / "out" / "ar" / "best.pt").unlink()
    assert main([]) == 2 and "has not been evaluated yet" in capsys.readouterr().err
    assert json.loads(say(capsys, "--json", "--length=4", "--checkpoint=last"))["checkpoint"] == "last"
