"""The batches of notebooks/why.py: fixed orders for AR, fixed masks for diffusion."""

import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import tiny
from model import UserError

sys.path.append(str(Path(__file__).parent.parent / "notebooks"))

import why  # noqa: E402

TOKENS = torch.arange(100)
CONFIG = train.make_config("laptop", objective="ar", block_size=7, batch_size=4, seed=1) | {"vocab_size": 100}


def test_one_order_is_plain_ar():
    model = tiny("ar", V=100, T=7)
    plain, one = train.get_batch(CONFIG, TOKENS, 7), why.orders(1)(CONFIG, TOKENS, 7)
    assert torch.equal(plain["x"], one["x"]) and torch.allclose(model(**plain), model(**one))


def test_what_is_hidden_moves_too():
    config = CONFIG | {"hide": 0.5}
    plain, batch = train.get_batch(config, TOKENS, 3), why.orders(4)(config, TOKENS, 3)
    for name in ("x", "seen"):
        assert torch.equal(batch[name].sort().values, plain[name].sort().values)
    assert torch.equal(batch["seen"] == 100, batch["seen"] != batch["x"]) and (batch["seen"] == 100).any()


def test_every_order_moves_tokens_and_positions_together():
    seen = set()
    for step in range(40):
        plain, batch = train.get_batch(CONFIG, TOKENS, step)["x"], why.orders(4)(CONFIG, TOKENS, step)
        for x, permuted, position in zip(plain, *batch.values(), strict=True):
            assert position[0] == 0 and permuted[0] == x[0]  # the start symbol, then always the first token
            assert torch.equal(x[position[1:] - 1], permuted[:-1])  # what is read stands where its position says
            assert torch.equal(permuted.sort().values, x.sort().values)
            seen.add(tuple(position.tolist()))
    assert len(seen) == 4 and tuple(range(7)) in seen


def test_a_block_comes_back_with_its_mask_after_m_epochs_and_never_with_fresh_masks():
    config = CONFIG | {"objective": "diffusion", "batch_size": 14}  # one step an epoch

    def epoch(M, step):
        batch = why.masks(M)(config, TOKENS, step)
        return {tuple(x): tuple(mask) for x, mask in zip(batch["x"].tolist(), batch["mask"].tolist(), strict=True)}

    for M in (1, 3):
        assert epoch(M, 0) == epoch(M, M) and (M == 1 or epoch(M, 0) != epoch(M, 1))
    assert set(epoch(0, 0)) == set(epoch(0, 1)) and all(epoch(0, 0) != epoch(0, step) for step in range(1, 5))
    assert all(any(mask) for mask in epoch(0, 0).values())


def test_a_run_goes_on_with_its_own_batches_only(tmp_path):
    begun = CONFIG | {"batch": "orders(2)", "out": str(tmp_path)}
    with pytest.raises(UserError, match="orders\\(2\\)"):
        train.train(begun, batch=why.orders(4))
