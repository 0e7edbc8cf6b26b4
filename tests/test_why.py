"""The batches of notebooks/why.py: fixed orders for AR, fixed masks for diffusion."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conftest import tiny
from model import UserError, evaluate, make_optimizers, save_checkpoint

sys.path.append(str(Path(__file__).parent.parent / "notebooks"))

import why  # noqa: E402

TOKENS = torch.arange(100)
CONFIG = train.make_config("laptop", objective="ar", block_size=7, batch_size=4, seed=1) | {"vocab_size": 100}


def permuted(objective, **shape):
    """conftest's tiny network as a PermutedGPT: the same weights."""
    model = tiny(objective, **shape)
    other = why.PermutedGPT(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def test_one_order_is_plain_ar():
    model = permuted("ar", V=100, T=7)
    plain, one = train.get_batch(CONFIG, TOKENS, 7)[0], why.orders(1)(CONFIG, TOKENS, 7)[0]
    assert torch.equal(plain["x"], one["x"]) and torch.allclose(model(**plain), model(**one))


def test_a_network_may_read_in_another_order():
    model, T = permuted("ar"), 5
    x, straight = torch.randint(3, (4, T)), torch.arange(T).expand(4, T)
    assert torch.allclose(model(x, position=straight), model(x), atol=1e-6)
    assert not torch.allclose(model(x, position=straight.flip(1)), model(x), atol=1e-3)
    assert torch.equal(model(x), tiny("ar")(x))  # without positions it is a GPT
    assert evaluate(model, x) == evaluate(tiny("ar"), x)


def test_what_is_replaced_moves_too():
    config = CONFIG | {"replace": 0.5}
    plain, batch = train.get_batch(config, TOKENS, 3)[0], why.orders(4)(config, TOKENS, 3)[0]
    for name in ("x", "read"):
        assert torch.equal(batch[name].sort().values, plain[name].sort().values)
    assert (batch["read"] != batch["x"]).any()


def test_hide_masks_the_share_asked_for_and_predicts_what_is_there():
    hidden = 0
    for step in range(400):
        given, weight = why.hide(0.1)(CONFIG, TOKENS, step)
        assert torch.equal(given["x"], train.get_batch(CONFIG, TOKENS, step)[0]["x"]) and (weight == 1).all()
        kept = given["read"] != 100
        assert torch.equal(given["read"][kept], given["x"][kept])
        hidden += (~kept).double().mean().item() / 400
    assert abs(hidden - 0.1) < 5 * (0.09 / 28 / 400) ** 0.5


def test_every_order_moves_tokens_and_positions_together():
    seen = set()
    for step in range(40):
        plain, batch = train.get_batch(CONFIG, TOKENS, step)[0]["x"], why.orders(4)(CONFIG, TOKENS, step)[0]
        for x, permuted, position in zip(plain, *batch.values(), strict=True):
            assert position[0] == 0 and permuted[0] == x[0]  # the start symbol, then always the first token
            assert torch.equal(x[position[1:] - 1], permuted[:-1])  # what is read stands where its position says
            assert torch.equal(permuted.sort().values, x.sort().values)
            seen.add(tuple(position.tolist()))
    assert len(seen) == 4 and tuple(range(7)) in seen


def test_a_block_comes_back_with_its_mask_after_m_epochs_and_never_with_fresh_masks():
    config = CONFIG | {"objective": "diffusion", "batch_size": 14, "mask_weight": 0.0}  # one step an epoch

    def epoch(M, step):
        batch, weight = why.masks(M)(config, TOKENS, step)
        assert (weight == 1).all()
        return {tuple(x): tuple(mask) for x, mask in zip(batch["x"].tolist(), batch["mask"].tolist(), strict=True)}

    for M in (1, 3):
        assert epoch(M, 0) == epoch(M, M) and (M == 1 or epoch(M, 0) != epoch(M, 1))
    assert set(epoch(0, 0)) == set(epoch(0, 1)) and all(epoch(0, 0) != epoch(0, step) for step in range(1, 5))
    assert all(any(mask) for mask in epoch(0, 0).values())
    noisy, _ = why.masks(3)(config | {"replace": 0.5}, TOKENS, 0)  # --replace serves here, too
    assert 0.3 < (noisy["read"] != noisy["x"]).float().mean() < 0.7


def test_a_run_goes_on_with_its_own_batches_only(tmp_path):
    saved = {"config": CONFIG | {"batch": "orders(2)"}, "optimizers": [], "records": []}
    save_checkpoint(tmp_path / "last.pt", saved)
    with pytest.raises(UserError, match="orders\\(2\\)"):
        train.reopen(tmp_path, {}, get_batch=why.orders(4))
    assert train.reopen(tmp_path, {}, get_batch=why.orders(2))[0]["batch"] == "orders(2)"


def test_reveal_masks_the_last_k_of_one_order_and_leaves_k_alone():
    config = CONFIG | {"objective": "diffusion"}
    for step in range(20):
        plain, same = train.get_batch(config, TOKENS, step)[0], why.reveal(0)(config, TOKENS, step)[0]
        assert plain.keys() == same.keys() and all(torch.equal(plain[name], same[name]) for name in plain)
        for N in (1, 3):
            given = why.reveal(N)(config, TOKENS, step)[0]
            mask = given["mask"]
            assert torch.equal(given["x"], plain["x"]) and torch.equal(mask.sum(1), plain["mask"].sum(1))
            assert torch.equal(given["at"], mask.flatten().nonzero().squeeze(1))
            assert N > 1 or not (mask[:, :-1] & ~mask[:, 1:]).any()
            for row in mask:
                ends = why.fixed_orders(N, 7, config["seed"])[:, 7 - int(row.sum()):].sort(1).values
                assert row.nonzero().flatten().tolist() in ends.tolist()


@pytest.mark.parametrize("a, spread", [(1, 12**-0.5), (3, 28**-0.5)])  # Beta(a, a): variance 1 / (8 a + 4)
def test_bell_masks_about_half_in_pairs_and_weighs_all_tokens_alike(a, spread):
    B, T, ks = 16, 127, []
    config = CONFIG | {"objective": "diffusion", "block_size": T, "batch_size": B}
    for step in range(100):
        given, weight = why.bell(a)(config, torch.arange(5000) % 100, step)
        k = given["mask"].sum(1)
        assert torch.equal(weight, 2 * k / T) and (k.view(-1, 2).sum(1) == T + 1).all()
        assert torch.equal(given["x"], train.get_batch(config, torch.arange(5000) % 100, step)[0]["x"])
        ks.append(k)
    ks = torch.cat(ks).double()
    few = {1: 1, 3: T * 0.08}[a]  # of Beta(3, 3) less than 1 in T is under that
    assert 1 <= ks.min() <= few + 3 and ks.max() == T + 1 - ks.min()
    assert (ks / T).std().item() == pytest.approx(spread, rel=0.05)
    given = why.bell(a)(config | {"replace": 0.5}, torch.arange(5000) % 100, 5)[0]
    assert (given["read"] != given["x"]).any()
    part = why.bell(a)(config, torch.arange(5000) % 100, 5, slice(4, 8))  # of a process
    whole = why.bell(a)(config, torch.arange(5000) % 100, 5)
    assert torch.equal(part[0]["mask"], whole[0]["mask"][4:8]) and torch.equal(part[1], whole[1][4:8])


def test_the_embedding_alone_has_another_learning_rate():
    model = tiny("diffusion")
    optimizers, before = make_optimizers(model, "muon", 0.1, 0.0), {}
    for step in (train.descend, why.embedding_rate(3)):
        step(optimizers, 0.0)  # no gradient: nothing moves
        for name, p in model.named_parameters():
            p.grad = torch.ones_like(p)
            before[name] = p.detach().clone()
        step(optimizers, 0.01)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rate = {id(p): group["lr"] for group in groups for p in group["params"]}
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(before)
    assert {name for name, p in model.named_parameters() if rate[id(p)] == 0.03} == {"embed.weight"}
    assert {rate[id(p)] for name, p in model.named_parameters() if name != "embed.weight"} == {0.01}


def test_a_learning_rate_that_falls_to_another_share_of_its_peak():
    zero, tenth = why.decay_to(0.0), why.decay_to(0.1)
    for step in range(1001):
        usual = train.learning_rate(step, 1000, 2.0)
        assert tenth(step, 1000, 2.0) == pytest.approx(usual)
        assert step >= 10 or zero(step, 1000, 2.0) == usual  # while it warms up
        assert zero(step, 1000, 2.0) <= usual + 1e-12
    assert zero(1000, 1000, 2.0) == pytest.approx(0) and zero(505, 1000, 2.0) == pytest.approx(1.0)


def test_dropout_in_the_attention_alone():
    model = why.with_dropout_in_attention_only({**tiny("ar").config.__dict__, "dropout": 0.5})
    x = torch.randint(0, model.config.vocab_size, (64, model.config.block_size))
    assert not torch.equal(model(x), model(x))  # the attention weights are dropped
    for block in model.blocks:
        block.attn.dropout = 0.0
    assert torch.equal(model(x), model(x))  # and nothing else is


def test_the_source_is_as_its_entropy_says(tmp_path):
    p = why.markov()
    pair = why.stationary(p)
    assert np.allclose(p.sum(2), 1) and np.isclose(pair.sum(), 1)
    assert np.allclose(np.einsum("ab,abc->bc", pair, p), pair)
    q = why.markov(K=3, concentration=1)  # all 3^5 blocks at once
    blocks = np.stack(np.meshgrid(*[range(3)] * 5, indexing="ij"), -1).reshape(-1, 5)
    nll = 5 * why.source_nll(q, blocks)
    assert np.isclose(np.exp(-nll).sum(), 1)
    assert np.isclose((np.exp(-nll) * nll).sum() / 5, why.block_entropy(q, 5))
    why.write_source(tmp_path / "source", 4096, 65_536)
    data = why.prepare.load(tmp_path / "source")
    assert len(data.splits["train"]) == 4096 and data.tokenizer.eot not in data.splits["val"]
    x = np.asarray(data.splits["val"]).astype(int).reshape(-1, 32)
    nll = why.source_nll(p, x)
    assert abs(nll.mean() - why.block_entropy(p, 32)) < 4 * nll.std() / len(nll) ** 0.5
    assert (data.splits["val"][:4096] != data.splits["train"]).mean() > 0.5


@pytest.mark.parametrize("words, named", [("hide 15 --objective=ar", "python notebooks/why.py"),
                                          ("embedding 3 --optimizer=adamw", "it takes Muon")])
def test_another_experiment_than_asked_for_is_refused(words, named, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["why.py", *words.split()])
    monkeypatch.setattr(train, "main", None)
    assert why.main() == 2
    assert named in "".join(capsys.readouterr())
