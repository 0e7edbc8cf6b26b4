"""Four changes that readers make: each takes one place, trains, and leaves what is reported alone.

Copy the code of a test to begin with your own.
"""

import math

import pytest
import torch
import torch.nn as nn

import prepare
import train
from conftest import any_order_losses, run, tiny
from model import GPT, GPTConfig, evaluate, load_checkpoint, make_model, mask_k, model_from_checkpoint


# ----- another training loss, another mask schedule: train.draw_mask


def papers_masks(B, T, generator, clip=0):
    """The paper's loss: t ~ U(0, 1), every token masked with probability t, the sum over the masked times 1/(t T).

    GPT.forward gives the mean over the k masked tokens, so that the weight of a block is k/(t T).
    """
    t = 1e-3 + (1 - 1e-3) * torch.rand(B, generator=generator)  # (B,), away from 0, as in the paper's code
    mask = torch.rand(B, T, generator=generator) < t[:, None]
    return mask, mask.sum(1) / (t * T)


def cosine_masks(B, T, generator, clip=0):
    """Masked shares cos(pi s / 2) for s ~ U(0, 1), rounded up to k of T, and the weight 1 / (T P(k)): the bound."""
    def below(k):  # the probability of at most k
        return 1 - 2 / math.pi * torch.arccos(k / T)

    s = torch.rand(B, generator=generator, dtype=torch.float64)
    k = (T * torch.cos(math.pi / 2 * s)).ceil().clamp(1, T)  # (B,)
    return mask_k(k, T, generator), 1 / (T * (below(k) - below(k - 1)))


def only_few_masks(B, T, generator, clip=0):
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
        def draw(B, T, generator, clip):
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
    monkeypatch.setattr(train, "draw_mask", lambda B, T, g, clip: (mask_k(torch.ones(B), T, g), torch.ones(B, B)))
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
    log = run(corpus, tmp_path / "run", optimizer=optimizer, epochs=20.0, objective="ar", ema=0.2)
    saved = load_checkpoint(tmp_path / "run" / "last.pt")["average"]
    assert saved["positions.weight"].abs().max() > 0.1  # it began with 0.02
    assert log[-1]["val_loss"] < 0.9 * log[0]["config"]["unigram_entropy"]
    model = learned(log[0]["config"])
    model.load_state_dict(saved)
    assert evaluate(model.eval(), prepare.open_data(log[0]["config"])[2])[0] == log[-1]["val_loss"]


# ----- EMA of the weights: --ema, another one in train.update_average


def last(folder):
    return load_checkpoint(folder / "last.pt")


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_the_average_is_evaluated_and_kept_as_the_best_and_changes_no_step(corpus, tmp_path, objective):
    given = {"objective": objective, "dropout": 0.1}
    plain, log = run(corpus, tmp_path / "plain", **given), run(corpus, tmp_path / "ema", ema=0.2, **given)
    assert [r["train_loss"] for r in log[1:]] == [r["train_loss"] for r in plain[1:]]
    assert all(a["val_loss"] != b["val_loss"] for a, b in zip(log[1:], plain[1:], strict=True))
    a, b = last(tmp_path / "plain"), last(tmp_path / "ema")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"]) and "average" not in a
    best, blocks = load_checkpoint(tmp_path / "ema" / "best.pt"), prepare.open_data(log[0]["config"])[2]
    assert evaluate(model_from_checkpoint(best), blocks)[0] == min(r["val_loss"] for r in log[1:])
    assert evaluate(model_from_checkpoint(best), blocks, log[0]["config"]["final_draws"])[0] == log[-1]["best_loss"]


def test_the_average_is_that_of_the_weights_after_each_step(corpus, tmp_path, monkeypatch):
    steps, update = [], train.update_average

    def noted(average, model, rate):
        steps.append((model.embed.weight.detach().clone(), rate))
        update(average, model, rate)

    monkeypatch.setattr(train, "update_average", noted)
    run(corpus, tmp_path / "run", ema=0.5, epochs=1.0)
    expected = torch.zeros(())
    for weight, rate in steps:
        expected = (1 - rate) * expected + rate * weight
    assert [rate for _, rate in steps[:3]] == [1, 1 / 1.5, 1 / 2]  # so the weights at the start leave no trace
    torch.testing.assert_close(last(tmp_path / "run")["average"]["embed.weight"], expected)


def test_a_resumed_run_goes_on_with_its_average(corpus, tmp_path):
    run(corpus, tmp_path / "whole", ema=0.2, mask_weight=1.5)
    given, asked = {"out": str(tmp_path / "parts"), "ema": 0.2, "mask_weight": 1.5}, iter(range(1000))
    run_until = lambda: next(asked) == 40  # noqa: E731
    config = run(corpus, tmp_path / "other", ema=0.2, mask_weight=1.5)[0]["config"]
    names = set(train.FLAGS) | {"preset"}
    train.train({name: config[name] for name in names} | given, None, run_until)
    config, saved = train.reopen(tmp_path / "parts", {})
    assert saved["state"]["step"] == 41
    train.train(config, saved)
    a, b = last(tmp_path / "whole"), last(tmp_path / "parts")
    for part in ("model", "average"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


# ----- the weights of the mask rates: --mask_weight


@pytest.mark.parametrize("clip", [0, 0.8, 1, 1.5, 16])
def test_a_masked_token_weighs_one_over_t_and_at_most_mask_weight(clip):
    B, T = 64, 16
    mask, weight = train.draw_mask(B, T, torch.Generator().manual_seed(0), clip)
    k = mask.sum(1)
    each = weight / k * T  # the weight of one token: that of the block, a mean over k, times T
    torch.testing.assert_close(each, torch.minimum(T / k, torch.tensor(clip or math.inf)))


def test_a_clipped_weight_is_descended_and_the_log_keeps_the_bound(corpus, tmp_path):
    bound, clipped = (run(corpus, tmp_path / str(clip), mask_weight=clip, epochs=1.0) for clip in (0.0, 1.5))
    same = run(corpus, tmp_path / "same", mask_weight=16.0, epochs=1.0)  # T: no weight is clipped
    assert same[1:] != clipped[1:] and same[-1]["val_loss"] == bound[-1]["val_loss"] != clipped[-1]["val_loss"]
    first = {**bound[0]["config"], **clipped[0]["config"]}  # before the first step both would log the same loss
    batch = train.get_batch(first, prepare.open_data(first)[1], 0)
    assert (batch[1] < 1).any() and batch[1].max() == 1
