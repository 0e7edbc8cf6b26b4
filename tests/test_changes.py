"""Four changes that readers make: each takes one place, trains, and leaves what is reported alone.

Copy the code of a test to begin with your own.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import prepare
import train
from conftest import any_order_losses, tiny
from model import GPT, GPTConfig, evaluate, load_checkpoint, make_model, mask_k, model_from_checkpoint


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).choice(["the union ", "has peace ", "keeps law.\n\n"], 4000)
    (folder / "text.txt").write_text("".join(words))
    prepare.prepare(inputs=[folder / "text.txt"], tokenizer="char", out=folder / "data")
    return folder / "data"


def run(corpus, out, **given):
    """A short run; its log."""
    small = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8, "unique_tokens": 1024,
             "eval_blocks": 32, "epochs": 10.0, "lr": 0.01, "dtype": "float32", "device": "cpu"}
    return train.train(train.make_config("laptop", **(small | {"data": str(corpus), "out": str(out)} | given)))


# ----- another training loss, another mask schedule: train.draw_mask


def papers_masks(B, T, generator):
    """The paper's loss: t ~ U(0, 1), every token masked with probability t, the sum over the masked times 1/(t T).

    GPT.forward gives the mean over the k masked tokens, so that the weight of a block is k/(t T).
    """
    t = 1e-3 + (1 - 1e-3) * torch.rand(B, generator=generator)  # (B,), away from 0, as in the paper's code
    mask = torch.rand(B, T, generator=generator) < t[:, None]
    return mask, mask.sum(1) / (t * T)


def cosine_masks(B, T, generator):
    """Masked shares cos(pi s / 2) for s ~ U(0, 1), rounded up to k of T, and the weight 1 / (T P(k)): the bound."""
    def below(k):  # the probability of at most k
        return 1 - 2 / math.pi * torch.arccos(k / T)

    s = torch.rand(B, generator=generator, dtype=torch.float64)
    k = (T * torch.cos(math.pi / 2 * s)).ceil().clamp(1, T)  # (B,)
    return mask_k(k, T, generator), 1 / (T * (below(k) - below(k - 1)))


def only_few_masks(B, T, generator):
    """No bound at all: one masked token a block."""
    return mask_k(torch.ones(B), T, generator), torch.ones(B)


SCHEDULES = [papers_masks, cosine_masks, only_few_masks]


@pytest.mark.parametrize("schedule", [papers_masks, cosine_masks])
def test_a_schedule_with_its_right_weight_descends_the_same_bound(schedule):
    model, x = tiny("diffusion", T=4), torch.tensor([0, 2, 1, 1])
    bound = any_order_losses(model, x).mean().item()
    mask, weight = schedule(60_000, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = weight * model(x.expand(len(mask), 4), mask=mask).double()  # (B,)
    error = loss.std().item() / math.sqrt(len(loss))
    assert abs(loss.mean().item() - bound) < 4 * error + 0.002 * (schedule is papers_masks)  # whose t is over 1e-3


def test_the_weight_is_what_is_descended(corpus, tmp_path, monkeypatch):
    """Blocks of weight 0 teach nothing: the run is that in which the others count twice, and as if they were alone."""
    def half(weights):
        def draw(B, T, generator):
            mask, _ = bound(B, T, generator)
            return mask, weights * torch.tensor([1.0, 0.0]).repeat(B // 2)
        return draw

    bound, weights = train.draw_mask, {}
    for name, factor in (("plain", None), ("half", 1.0), ("none", 0.0)):
        monkeypatch.setattr(train, "draw_mask", bound if factor is None else half(factor))
        run(corpus, tmp_path / name, epochs=0.25, optimizer="adamw", weight_decay=0.0)
        weights[name] = load_checkpoint(tmp_path / name / "last.pt")["model"]["embed.weight"]
    torch.manual_seed(train.derive(1, "weights"))
    begun = make_model(load_checkpoint(tmp_path / "none" / "last.pt")["config"]).embed.weight
    assert torch.equal(weights["none"], begun)  # no weight, no step
    assert not torch.equal(weights["half"], weights["plain"]) and not torch.equal(weights["half"], begun)


def test_a_weight_that_is_not_one_a_block_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_mask", lambda B, T, g: (mask_k(torch.ones(B), T, g), torch.ones(B, B)))
    with pytest.raises(ValueError, match=r"\(8, 8\), it takes \(8,\)"):
        run(corpus, tmp_path / "run")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_training_schedule_moves_what_is_reported(corpus, tmp_path, monkeypatch, schedule):
    model, blocks = tiny("diffusion", V=7, T=16), torch.randint(7, (64, 16))
    before = evaluate(model, blocks, draws=4)
    monkeypatch.setattr(train, "draw_mask", schedule)
    assert evaluate(model, blocks, draws=4) == before  # bit for bit
    log = run(corpus, tmp_path / "run")
    assert log[-1]["val_loss"] != log[1]["val_loss"]
    monkeypatch.undo()
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    blocks = prepare.open_data(saved["config"])[2]
    assert evaluate(model_from_checkpoint(saved), blocks)[0] == log[-1]["val_loss"]


@pytest.mark.parametrize("schedule", [papers_masks, cosine_masks])
def test_a_schedule_trains(corpus, tmp_path, monkeypatch, schedule):
    monkeypatch.setattr(train, "draw_mask", schedule)
    log = run(corpus, tmp_path / "run", epochs=40.0)
    assert log[-1]["val_loss"] < 0.9 * log[0]["config"]["unigram_entropy"]


# ----- another position embedding: a subclass of GPT


class LearnedPositions(GPT):
    """Learned position vectors in place of rotations."""

    def __init__(self, config):
        super().__init__(config)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.embed.register_forward_hook(lambda module, args, x: x + self.positions.weight[: x.shape[1]])  # (B, T, C)

    def rotation(self, start, T):
        cos, sin = super().rotation(start, T)
        return torch.ones_like(cos), torch.zeros_like(sin)


def learned(config):
    return LearnedPositions(GPTConfig(**{name: config[name] for name in GPTConfig.__dataclass_fields__}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learned_positions_are_trained(corpus, tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(train, "make_model", learned)  # in your own copy: the class GPT of model.py itself
    monkeypatch.setattr("model.make_model", learned)
    torch.manual_seed(0)
    log = run(corpus, tmp_path / "run", optimizer=optimizer, epochs=20.0, objective="ar")
    saved = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert saved["positions.weight"].abs().max() > 0.1  # it began with 0.02
    assert log[-1]["val_loss"] < 0.9 * log[0]["config"]["unigram_entropy"]
    model = learned(log[0]["config"])
    model.load_state_dict(saved)
    assert evaluate(model.eval(), prepare.open_data(log[0]["config"])[2])[0] == log[-1]["val_loss"]


# ----- EMA of the weights: a subclass of train.Run


class AveragedRun(train.Run):
    """Evaluates, and saves as the best, an exponential moving average of the weights (it is not kept for a resume)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.scored = self.average.module

    def count(self, loss, norm):
        self.average.update_parameters(self.model)
        super().count(loss, norm)


def test_ema_of_the_weights_is_evaluated_and_kept_as_the_best_and_changes_no_step(corpus, tmp_path, monkeypatch):
    plain = run(corpus, tmp_path / "plain", dropout=0.1)
    monkeypatch.setattr(train, "Run", AveragedRun)
    log = run(corpus, tmp_path / "ema", dropout=0.1)
    assert [r["train_loss"] for r in log[1:]] == [r["train_loss"] for r in plain[1:]]
    assert all(a["val_loss"] != b["val_loss"] for a, b in zip(log[1:], plain[1:], strict=True))
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("plain", "ema"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    best = load_checkpoint(tmp_path / "ema" / "best.pt")
    blocks = prepare.open_data(log[0]["config"])[2]
    assert evaluate(model_from_checkpoint(best), blocks)[0] == min(r["val_loss"] for r in log[1:])
    assert evaluate(model_from_checkpoint(best), blocks, log[0]["config"]["final_draws"])[0] == log[-1]["best_loss"]
