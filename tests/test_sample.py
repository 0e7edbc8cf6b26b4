"""The samplers draw from the distribution they claim, and the command line does what it says."""

import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import any_order_losses, tiny
from model import GPT, GPTConfig, UserError, evaluate, load_checkpoint, model_from_checkpoint, save_checkpoint
from prepare import EOT, Tokenizer
from sample import encode_gaps, main, pick, sample_ar, sample_diffusion, unmask

ROOT = Path(__file__).parent.parent


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
    alone = write(sampler, model, 1, temperature=0, generator=generator())
    assert torch.equal(cold[0], alone.expand(50, -1))  # nor on how many are written


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
    for text, parts in (("w1a ____ w2b", ["w1a", 8, " w2b"]), ("__3__w1a ____", [3, "w1a", 8]),
                        ("__12__ __", [12, 8]), ("w1a  __ w2b____2____.", ["w1a ", 8, " w2b", 2, "."]),
                        ("w1a____w2b", ["w1a", 8, "w2b"])):
        expected = []
        for part in parts:
            expected += [V] * part if isinstance(part, int) else TOKENIZER.encode(part).tolist()
        assert encode_gaps(TOKENIZER, text, 8).tolist() == expected
    for text in ("w1a", "w1a __0__", "__99999999__", f"__{'9' * 5000}__"):
        with pytest.raises(UserError, match="--infill needs gaps"):
            encode_gaps(TOKENIZER, text, 8)


BYTES = Tokenizer({"kind": "char", "characters": "".join(map(chr, range(32, 127))) + "\n\u6211"})


def with_gaps(text):
    """A text as encode_gaps reads it, with [n] for a gap of n tokens; without a gap, the text."""
    try:
        ids = encode_gaps(BYTES, text, 5).tolist()
    except UserError:
        return text
    runs = [(masked, [*group]) for masked, group in itertools.groupby(ids, lambda i: i == BYTES.vocab_size)]
    return "".join(f"[{len(group)}]" if masked else BYTES.decode(group) for masked, group in runs)


@pytest.mark.parametrize("text", [
    "def __init__(self):", 'if __name__ == "__main__":', "snake__case", "self.__class__.__name__", "__all__ = ['a']",
    "_, x = __file__, __private", "trailing__ = a__", "from .a import __version__, b__c", "f'{__doc__}'",
    "__bold__ and ___both___", "__Note:__ read on", "a __(bold)__ word, __\"quoted\"__.", "**__x__** _y_ a_b",
    "- [__link__](page/__b__)", "a_b", "_", "__2to3__ and __x86_64__"])
def test_underscores_of_a_text_are_text(text):
    assert with_gaps(text) == text
    assert with_gaps(f"{text}\n____") == f"{text}\n[5]"
    assert with_gaps(f"____ {text}") == f"[5] {text}"


@pytest.mark.parametrize("text, read", [
    ("def __init__(self): ____", "def __init__(self):[5]"), ("____, ____.", "[5],[5]."), ("____", "[5]"),
    ("a __ b ___ c", "a[5] b[5] c"), ("we __. Or __!", "we[5]. Or[5]!"), ("__\n__", "[5]\n[5]"),
    ("(____) \"____\" x=____;", "([5]) \"[5]\" x=[5];"), ("a __7__ b", "a[7] b"), ("__7__", "[7]"),
    ("f(__2__, __3__)", "f([2],[3])"), ("__0000000000003__", "[3]"), ("____4____", "[4]"),
    ("________________", "[5]"),
    ("\u6211____\u6211__3__\u6211", "\u6211[5]\u6211[3]\u6211"), ("un____ed", "un[5]ed")])
def test_a_gap_is_what_the_help_says(text, read):
    assert with_gaps(text) == read


def test_the_help_states_the_rule_for_gaps(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "a gap is 4 underscores or more, 2 or 3 only as a word of their own, or __7__ (7 tokens)" in text
    assert "--stop_at_eot" in text


def test_infill_keeps_the_text_around_the_gaps(runs, capsys, tmp_path):
    long = "w1a w2b " * 20  # more than a block
    (tmp_path / "text.txt").write_text(f"{long}____ w3c")
    for text, pattern in (("w1a ____ w2b", r"w1a.{6} w2b"),
                          (f"@{tmp_path / 'text.txt'}", f"{long[:-1]}.{{6}} w3c")):
        for extra in (["--steps=2"], ["--order=confidence"], ["--temperature=0"]):
            out = say(capsys, "--run", runs / "diffusion", "--infill", text, "--gap=6", "--json", *extra)
            for written in json.loads(out)["samples"]:
                assert re.fullmatch(pattern, written.replace("<|endoftext|>", "."), re.DOTALL)


def test_a_text_may_stand_in_a_file(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfw1a w2b")  # with a byte order mark
    (tmp_path / "gaps.txt").write_text("w1a ____ w2b")
    for path in (tmp_path / "prompt.txt", "~/prompt.txt"):
        record = json.loads(say(capsys, "--run", runs / "ar", f"--prompt=@{path}", "--length=12", "--json"))
        assert record["prompt"] == f"@{path}" and all(text.startswith("w1a w2b") for text in record["samples"])
    record = json.loads(say(capsys, "--run", runs / "diffusion", "--infill=@~/gaps.txt", "--json"))
    assert all(text.startswith("w1a") and text.endswith(" w2b") for text in record["samples"])


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_endoftext_in_a_prompt_is_the_token_that_ends_a_document(runs, capsys, monkeypatch, name):
    read, hidden = [], GPT.hidden

    def spy(self, idx, **how):
        read.append(idx[0].tolist())
        return hidden(self, idx, **how)

    monkeypatch.setattr(GPT, "hidden", spy)
    record = json.loads(say(capsys, "--run", runs / name, f"--prompt={EOT}w1a{EOT}", "--length=12", "--json"))
    assert all(text.startswith(f"{EOT}w1a{EOT}") for text in record["samples"])
    start = [TOKENIZER.vocab_size] * (name == "ar")
    assert read[0][:5 + len(start)] == [*start, TOKENIZER.eot, *TOKENIZER.encode("w1a"), TOKENIZER.eot]
    if name == "diffusion":
        say(capsys, "--run", runs / name, f"--infill={EOT}w1a ____{EOT}.", "--gap=2", "--json")
        assert read[-1][:4] == read[0][:4] and read[-1][6:8] == [TOKENIZER.eot, TOKENIZER.ids["."]]


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_stop_at_eot_ends_a_text_at_the_first_that_was_written(runs, capsys, name):
    how = ["--run", runs / name, f"--prompt={EOT}w1a", "--length=150", "--num_samples=6", "--temperature=3"]
    whole = json.loads(say(capsys, *how, "--json"))["samples"]
    record = json.loads(say(capsys, *how, "--json", "--stop_at_eot"))
    assert record["stop_at_eot"] and record["length"] == 150
    begin = len(f"{EOT}w1a")
    expected = [text[:text.index(EOT, begin) + len(EOT)] if EOT in text[begin:] else text for text in whole]
    assert record["samples"] == expected and expected != whole
    assert "".join(f"----- {n}\n{text}\n" for n, text in enumerate(expected, 1)) in say(capsys, *how, "--stop_at_eot")


def test_stop_at_eot_makes_no_forward_pass_for_what_is_cut(runs, capsys):
    for name in ("ar", "diffusion"):
        how = ["--run", runs / name, "--length=2000", "--num_samples=1", "--temperature=3", "--json"]
        record = json.loads(say(capsys, *how, "--stop_at_eot"))
        assert record["samples"][0].count(EOT) == 1 and record["samples"][0].endswith(EOT)
        assert record["network_evaluations"] < 1000


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
    (["--run=diffusion/best.pt", "--checkpoint=last"], "--checkpoint=last"),
    (["--run=ar/last.pt"], "ar/last.pt"), (["--run=dif"], "ar, diffusion"), (["--run=x/y.pt"], "x/y.pt"),
    (["--run=~nobody"], "no such checkpoint"), (["--run=ar", "--prompt=@~/none"], "none"),
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


def test_a_run_may_be_named_by_its_checkpoint(runs, capsys, monkeypatch, tmp_path):
    shutil.copytree(runs, tmp_path / "out")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "ar"
    state = load_checkpoint(folder / "best.pt")
    save_checkpoint(folder / "last.pt", state | {"state": {"step": 9}})
    for run, name, step in (("out/ar", "best", 7), ("out/ar/best.pt", "best", 7), ("out/ar/last.pt", "last", 9),
                            ("~/out/ar/last.pt", "last", 9), ("~/out/ar", "best", 7)):
        record = json.loads(say(capsys, f"--run={run}", "--length=4", "--json"))
        assert (record["checkpoint"], record["step"]) == (name, step)
        assert record["run"] == run.replace("~", str(tmp_path)).removesuffix(f"/{name}.pt")
        assert say(capsys, f"--run={run}", "--length=4").startswith(f"{record['run']}/{name}.pt: ar, ")
    (folder / "best.pt").unlink()
    assert main(["--run=out/ar/best.pt"]) == 2 and "has not been evaluated yet" in capsys.readouterr().err
    assert main(["--run=out/ar/typo.pt"]) == 2 and "out/ar/typo.pt: no such checkpoint" in capsys.readouterr().err
    assert main(["--run=out/air"]) == 2 and "out/ar, out/diffusion" in capsys.readouterr().err
    assert main(["--run=elsewhere"]) == 2 and "out/ar, out/diffusion" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_the_pretrained_models_are_small_and_write(capsys, name):
    path = ROOT / "notebooks" / "checkpoints" / f"{name}.pt"
    assert path.stat().st_size < 2.5e6
    saved = load_checkpoint(path)
    model, tokenizer = model_from_checkpoint(saved), Tokenizer(saved["tokenizer"])
    assert model.config.objective == saved["config"]["objective"] == name
    assert {w.dtype for w in saved["model"].values()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    prompt = torch.from_numpy(tokenizer.encode("Fellow citizens of the Senate and of the House of Representatives"))
    text = F.pad(prompt, (0, 128 - len(prompt)), value=tokenizer.eot)[None]
    assert evaluate(model, text, draws=64)[0] < math.log(model.config.vocab_size)  # it has learned something
    record = json.loads(say(capsys, f"--run={path}", "--prompt=Fellow citizens", "--length=30", "--json"))
    assert record["objective"] == name and all(t.startswith("Fellow citizens") for t in record["samples"])


def test_without_a_run_the_pretrained_diffusion_model_writes(capsys, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "notebooks" / "checkpoints", tmp_path / "notebooks" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    assert main(["--length=4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["objective"] == "diffusion" and not Path("out").exists()
    assert err.count("\n") == 1 and "no run under out/" in err and "notebooks/checkpoints/diffusion.pt" in err
    say(capsys, "--length=4", "--run=notebooks/checkpoints/diffusion.pt")  # by name: nothing to explain
    assert main(["--checkpoint=last"]) == 2 and "--checkpoint=last" in capsys.readouterr().err


def test_from_python_in_five_lines(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    saved = load_checkpoint("ar/best.pt")
    model, tokenizer = model_from_checkpoint(saved), Tokenizer(saved["tokenizer"])
    ids = torch.from_numpy(tokenizer.encode("w1a"))[None]
    ids, when = sample_ar(model, ids, 12, temperature=0)
    text = tokenizer.decode(ids[0])
    loss, error = evaluate(model, ids[:, :8])
    assert [text] == json.loads(say(capsys, "--run=ar", "--prompt=w1a", "--length=12", "--temperature=0",
                                    "--num_samples=1", "--json"))["samples"]
    assert 0 < loss < math.inf and error == 0


# ----- what reaches a terminal, a pipe, and a pipe that nobody reads


STRANGE = Tokenizer({"kind": "char", "characters": "a\x1b[2J\r\n\t\x07\x9b\x7f\0\u202e\u6211\u2603"})


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A run that writes what steers a terminal, and what ASCII does not have."""
    folder = tmp_path_factory.mktemp("strange")
    model = tiny("ar", STRANGE.vocab_size, 32).float()
    save_checkpoint(folder / "best.pt", {
        "config": asdict(model.config) | {"dtype": "float32"}, "state": {"step": 7},
        "tokenizer": STRANGE.spec, "model": model.state_dict()})
    return folder


STRANGE_PROMPT = "a\x1b[2J\r\n\ta\x07\x9b\x7f\r\u202e\u6211\u2603a"


def test_nothing_in_a_text_steers_a_terminal(strange, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main([f"--run={strange}", f"--prompt={STRANGE_PROMPT}", "--temperature=3", "--length=100"]) == 0
    out = sys.stdout.getvalue()
    assert not re.search(r"[\0-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert out.count("a\\x1b[2J\n        a\\x07\\x9b\\x7f\\r\\u202e\u6211\u2603a") == 3


def command(*argv, script="sample.py", **how):
    return subprocess.run([sys.executable, ROOT / script, *map(str, argv)], capture_output=True, timeout=60, **how)


def test_into_a_pipe_a_text_is_exact(strange, capsys):
    how = [f"--run={strange}", "--prompt=" + STRANGE_PROMPT, "--temperature=3", "--length=60"]
    texts = json.loads(say(capsys, *how, "--json"))["samples"]
    expected = "".join(f"----- {n}\n{text}\n" for n, text in enumerate(texts, 1))
    exact = command(*how, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (exact.returncode, exact.stderr) == (0, b"") and exact.stdout.endswith(expected.encode())
    poor = command(*how, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (poor.returncode, poor.stderr) == (0, b"")
    assert poor.stdout.endswith(expected.encode("ascii", "backslashreplace"))


@pytest.mark.parametrize("script", ["sample.py", "notebooks/watch.py"])
def test_a_reader_who_has_seen_enough_gets_no_traceback(runs, script):
    run = runs / "ar" if "watch" in script else f"--run={runs / 'ar'}"
    for length, closed in ((60, "| head -1"), (4, "| head -1"), (60, "| true"), (4, ">&-")):
        words = map(str, (sys.executable, ROOT / script, run, "--num_samples=200", f"--length={length}"))
        line = f"{shlex.join(words)} {closed}"
        done = subprocess.run(["bash", "-c", f"{line}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True,
                              timeout=60)
        assert done.stderr == "" and int(done.stdout.split()[-1]) in (0, 141)
        assert len(done.stdout.splitlines()) == 1 + ("head" in closed)
