"""The mathematics: what model.py claims, checked by enumeration on networks that are small enough for it."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as model_module
from conftest import any_order_losses, tiny
from model import GPT, GPTConfig, evaluate, make_optimizers, mask_k, standard_error, uniform_k
from probe import chain_rule_nll, conditional_nll


def draw_mask(B, T, generator):
    """The masks of the bound, as training and evaluation draw them."""
    return mask_k(uniform_k(B, T, generator), T, generator)


def uniform(objective, V=7, T=6):
    """A network that knows nothing: zero embeddings make every logit zero."""
    model = tiny(objective, V, T)
    model.embed.weight.data.zero_()
    return model


def all_masks(T):
    """Every mask with at least one hidden position, (2^T - 1, T) bool."""
    masks = torch.tensor(list(itertools.product((False, True), repeat=T)))
    return masks[masks.any(1)]


def masked_nll(model, x, mask):
    """-log p of each token given the visible ones, (B, T), zero where visible: the plain way, all logits."""
    logits = model.logits(x.masked_fill(mask, model.config.vocab_size)).double()
    return F.cross_entropy(logits.transpose(1, 2), x, reduction="none") * mask


def exact_k(nll, mask):
    """The objective as model.py has it: the mean over the masked tokens of each block."""
    return nll.sum(1) / mask.sum(1)


def exact_k_expectation(model, x, per_block=exact_k):
    """The expectation of a loss when k ~ U{1..T} and the mask is uniform among those with k hidden; x: (T,)."""
    T = len(x)
    masks = all_masks(T)
    k = masks.sum(1)
    probability = torch.tensor([1 / (T * math.comb(T, int(n))) for n in k], dtype=torch.float64)
    with torch.no_grad():
        return (probability * per_block(masked_nll(model, x.expand(len(masks), T), masks), masks)).sum()


def paper_expectation(model, x, per_block):
    """The expectation of a loss when t ~ U(0,1) and every token is masked with probability t: Gauss-Legendre in t.

    per_block(nll (M, T), mask (M, T), t) -> (M,). The paper's own is 1/t sum / T. All of these are polynomials in t, so
    that 20 nodes are exact.
    """
    T = len(x)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    nodes, weights = (nodes + 1) / 2, weights / 2  # from (-1, 1) to (0, 1)
    masks = all_masks(T)
    with torch.no_grad():
        nll = masked_nll(model, x.expand(len(masks), T), masks)
    k = masks.sum(1)
    return sum(w * (t**k * (1 - t) ** (T - k) * per_block(nll, masks, t)).sum()
               for t, w in zip(nodes, weights, strict=True))


# ----- the flag changes only the objective


def test_both_objectives_have_the_same_weights_and_parameter_count():
    ar, diffusion = (tiny(objective, V=11, T=8, seed=3) for objective in ("ar", "diffusion"))
    assert ar.num_params() == diffusion.num_params() == 12 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 64) + 5 * 16
    for (name, a), (other, b) in zip(ar.state_dict().items(), diffusion.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


def test_parameters_of_the_papers_smallest_model():
    assert GPT(GPTConfig("ar", 50257, 2048, 3, 4, 128)).num_params() == pytest.approx(7.0e6, rel=0.005)


def test_uniform_model_scores_log_V_under_both_objectives_and_both_forms():
    V, T = 7, 6
    x = torch.randint(V, (4, T))
    assert uniform("ar", V, T)(x).tolist() == pytest.approx([math.log(V)] * 4)
    model = uniform("diffusion", V, T)
    mask = draw_mask(4, T, torch.Generator().manual_seed(0))
    assert model(x, mask=mask).tolist() == pytest.approx([math.log(V)] * 4)
    assert paper_expectation(model, x[0], lambda nll, mask, t: nll.sum(1) / t / T) == pytest.approx(math.log(V))
    assert evaluate(model, x)[0] == pytest.approx(math.log(V))


# ----- the diffusion loss is the mean over all orders


@pytest.mark.parametrize("T", [4, 5])
def test_exact_k_equals_the_papers_form_and_the_mean_over_orders(T):
    model, x = tiny("diffusion", T=T), torch.randint(3, (T,), generator=torch.Generator().manual_seed(T))
    orders = any_order_losses(model, x)
    assert orders.std() > 0.05  # the orders differ, so that their agreement means something
    assert exact_k_expectation(model, x) == pytest.approx(orders.mean().item(), rel=1e-6)
    paper = paper_expectation(model, x, lambda nll, mask, t: nll.sum(1) / t / T)
    assert paper == pytest.approx(orders.mean().item(), rel=1e-6)


def test_forward_computes_exactly_that_loss_mask_by_mask():
    model, x = tiny("diffusion"), torch.tensor([0, 2, 1, 1, 0])
    masks = all_masks(5)
    blocks = x.expand(len(masks), 5)
    expected = exact_k(masked_nll(model, blocks, masks), masks)
    index = masks.flatten().nonzero().squeeze(1)
    assert torch.allclose(model(blocks, mask=masks).double(), expected, atol=1e-6)
    assert torch.equal(model(blocks, mask=masks), model(blocks, mask=masks, at=index))


WRONG = {  # losses in the wild that are not a bound (per block and batch-free ones); each would pass a weaker test
    "a sum weighted by 1/t, divided by the number masked": lambda nll, mask, t: nll.sum(1) / t / mask.sum(1),
    "the mean over masked tokens of Bernoulli masks": lambda nll, mask, t: nll.sum(1) / mask.sum(1),
    "the weight 1/(1-t) of a schedule turned around": lambda nll, mask, t: nll.sum(1) / (1 - t) / nll.shape[1],
    "no weight": lambda nll, mask, t: nll.sum(1) / nll.shape[1],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_losses_do_not_equal_the_mean_over_orders(name):
    model, x = tiny("diffusion", T=4), torch.tensor([0, 2, 1, 1])
    assert abs(paper_expectation(model, x, WRONG[name]) - any_order_losses(model, x).mean()) > 0.02


def test_the_mean_over_all_masked_tokens_of_a_batch_is_wrong_although_a_uniform_model_can_not_tell():
    """It weighs a block by its k, so it sees the easy end of few masks less: FACTS's first row of trap losses."""
    model, x = tiny("diffusion", T=4), torch.tensor([0, 2, 1, 1])
    big_batch = exact_k_expectation(model, x, lambda nll, mask: nll.sum(1)) / 2.5  # E[sum] / E[k], E[k] = (T+1)/2
    assert abs(big_batch - any_order_losses(model, x).mean()) > 0.02
    blind = exact_k_expectation(uniform("diffusion", 3, 4), x, lambda nll, mask: nll.sum(1)) / 2.5
    assert blind == pytest.approx(math.log(3))


def test_the_bound_is_never_under_the_likelihood_of_the_mixture_over_orders():
    for seed in range(5):
        model = tiny("diffusion", T=4, seed=seed)
        total = 0.0
        for values in itertools.product(range(3), repeat=4):
            x = torch.tensor(values)
            orders = any_order_losses(model, x)
            mixture = -(torch.logsumexp(-4 * orders, 0) - math.log(len(orders))) / 4
            assert exact_k_expectation(model, x) >= mixture - 1e-6
            total += math.exp(-4 * mixture)
            if seed:  # the sum over all 81 texts once, one text for the other networks
                break
        if not seed:
            assert total == pytest.approx(1, abs=1e-5)  # so the mixture is a distribution, and comparing with it fair


# ----- masks


@pytest.mark.parametrize("T", [1, 2, 5, 8])
@pytest.mark.parametrize("B", [2, 6, 7])
def test_masks_have_uniform_k_uniform_places_and_a_fixed_total(B, T):
    generator = torch.Generator().manual_seed(B * 100 + T)
    masks = torch.stack([draw_mask(B, T, generator) for _ in range(4000)])  # (4000, B, T)
    k = masks.sum(2)
    assert k.min() >= 1
    if B % 2 == 0:
        assert (k.sum(1) == B * (T + 1) // 2).all()
    for row in (0, B - 1):  # every single row is uniform, so that no block of a batch is favoured
        frequency = torch.bincount(k[:, row], minlength=T + 1)[1:] / len(masks)
        assert (frequency - 1 / T).abs().max() < 5 * math.sqrt(1 / T * (1 - 1 / T) / 4000) + 1e-9
    place = masks.float().mean((0, 1))
    assert (place - (T + 1) / (2 * T)).abs().max() < 0.02


def test_stratified_pairs_cover_every_k_alike():
    k = draw_mask(64, 32, torch.Generator().manual_seed(0)).sum(1)
    assert torch.bincount(k, minlength=33)[1:].tolist() == [2] * 32


# ----- attention and the extra token


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_logits_in_parts_give_the_same_loss_and_gradient(monkeypatch, objective):
    model = tiny(objective, V=500)
    V, T = model.config.vocab_size, model.config.block_size
    x, mask = torch.randint(V, (8, T)), draw_mask(8, T, torch.Generator().manual_seed(0))
    results = []
    for most in (2**27, 3 * V):
        monkeypatch.setattr(model_module, "MAX_LOGITS", most)
        model.zero_grad()
        kept = []  # sizes of what the backward pass will need
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = model(x, mask=mask if objective == "diffusion" else None)
        loss.mean().backward()
        results.append([loss] + [p.grad.clone() for p in model.parameters()])
        assert (max(kept) >= V * 8 * T // 2) == (most > 3 * V)  # all logits kept, or not
        assert sum(n for n in kept if n == 3 * V) < V * 7 * T // 2  # nor kept part by part
    for a, *others in zip(*results, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for b in others)


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_a_124M_network_on_32_blocks_of_1024_fits_a_card_of_24_GB(objective):
    """By what the backward pass keeps of small cases, by layer and by block. That is eager; compiled keeps less."""
    V, T, C = 50257, 1024, 768

    def kept(L, B):
        model = GPT(GPTConfig(objective, 100, T, L, 12, C))
        weights, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return t

        mask = draw_mask(B, T, torch.Generator().manual_seed(0)) if objective == "diffusion" else None
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16), \
                sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # what a GPU takes: no T x T weights are kept
            loss = model(torch.randint(100, (B, T)), mask=mask).mean()
        assert loss > 0  # and so its graph still holds what was counted
        return sum(sizes.values())

    block = {L: (kept(L, 4) - kept(L, 2)) / 2 for L in (1, 2)}  # bytes a block of text, with that many layers
    activations = 32 * (block[1] + 11 * (block[2] - block[1]))
    assert 10e9 < activations < 20e9
    weights = 16 * GPT(GPTConfig(objective, V, T, 12, 12, C)).num_params()  # with gradients and two moments
    logits = 16 * model_module.MAX_LOGITS  # one part of them, its softmax and gradients, in bf16 and float32
    assert activations + weights + logits < 24 * 2**30


def test_diffusion_may_read_other_tokens_than_it_predicts():
    model = tiny("diffusion")
    V, T = model.config.vocab_size, model.config.block_size
    x, seen, mask = torch.randint(V, (4, T)), torch.randint(V, (4, T)), torch.rand(4, T) < 0.5
    mask[:, 0] = True
    nll = F.cross_entropy(model.logits(seen.masked_fill(mask, V)).transpose(1, 2), x, reduction="none")
    assert torch.allclose(model(x, mask, read=seen), (nll * mask).sum(1) / mask.sum(1))


def test_an_ar_model_may_read_other_tokens_than_it_predicts():
    model = tiny("ar")
    V, T = model.config.vocab_size, model.config.block_size
    x, seen = torch.randint(V, (4, T)), torch.randint(V + 1, (4, T))
    logits = model.logits(torch.cat((torch.full((4, 1), V), seen[:, :-1]), dim=1))
    expected = F.cross_entropy(logits.transpose(1, 2), x, reduction="none").mean(1)
    assert torch.allclose(model(x, read=seen), expected) and torch.equal(model(x, read=x), model(x))


def test_ar_logits_do_not_see_the_future():
    model = tiny("ar", V=5, T=8)
    x = torch.randint(5, (1, 8))
    for j in range(8):
        changed = x.clone()
        changed[0, j] = (x[0, j] + 1) % 5
        difference = (model.logits(changed) - model.logits(x)).abs().amax(2)[0]
        assert (difference[:j] == 0).all() and (difference[j:] > 0).all()


def test_ar_scores_a_token_from_its_past_alone():
    model, x = tiny("ar", V=5, T=6), torch.randint(5, (1, 6))
    prefix = torch.cat((torch.tensor([[5]]), x[:, :3]), dim=1)  # the start symbol, x_1..x_3
    expected = F.log_softmax(model.logits(prefix)[0, 3], -1)[x[0, 3]]
    total = conditional_nll(model, x, torch.tensor([[False] * 3 + [True] * 3]))
    less = conditional_nll(model, x, torch.tensor([[False] * 4 + [True] * 2]))
    assert (less - total).item() == pytest.approx(expected.item())


def test_diffusion_sees_both_sides_at_every_masked_position():
    model, x = tiny("diffusion", V=5, T=8), torch.randint(5, (1, 8))
    x[0, [1, 4, 7]] = 5
    for j in (0, 2, 3, 5, 6):
        changed = x.clone()
        changed[0, j] = (x[0, j] + 1) % 5
        assert ((model.logits(changed) - model.logits(x)).abs().amax(2)[0, [1, 4, 7]] > 0).all()


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_the_extra_token_can_not_be_predicted(objective):
    model = tiny(objective, V=5)
    assert model.logits(torch.full((2, 5), 5)).shape == (2, 5, 5)


@pytest.mark.parametrize("wrong", [{"n_head": 3}, {"n_embd": 6, "n_head": 2}, {"n_layer": 0}, {"dropout": 1.0},
                                   {"objective": "bert"}, {"rope_base": 1.0}, {"vocab_size": 0}])
def test_impossible_shapes_are_refused_with_the_value(wrong):
    with pytest.raises(ValueError, match=str(list(wrong.values())[0])):
        GPTConfig(**wrong)


# ----- evaluation


def test_evaluate_is_exact_for_ar_and_unbiased_for_diffusion():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(3, (6, 5), generator=generator)
    ar = tiny("ar")
    assert evaluate(ar, blocks, batch_size=4) == (pytest.approx(ar(blocks).mean().item()), 0.0)
    diffusion = tiny("diffusion")
    exact = torch.stack([exact_k_expectation(diffusion, x) for x in blocks]).mean().item()
    estimates = torch.tensor([evaluate(diffusion, blocks, seed=seed)[0] for seed in range(400)])
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(400)


def test_reported_standard_error_is_the_spread_over_200_seeds():
    model = tiny("diffusion", V=5, T=16)
    blocks = torch.randint(5, (96, 16), generator=torch.Generator().manual_seed(1))
    results = torch.tensor([evaluate(model, blocks, seed=seed, batch_size=96) for seed in range(200)])
    spread, reported = results[:, 0].std(), results[:, 1].square().mean().sqrt()
    # the spread of 200 normal values is known to 1/sqrt(400) = 5 %, so 3 sigma is 15 %
    assert abs(spread / reported - 1) < 0.15
    assert results[:, 1].std() / results[:, 1].mean() < 0.2  # and a single report is close to it, not only their mean


def test_evaluate_restores_training_mode_and_refuses_a_single_draw():
    model = tiny("diffusion").train()
    evaluate(model, torch.zeros(2, 5, dtype=torch.long))
    assert model.training
    with pytest.raises(ValueError, match="1 mask draws"):
        evaluate(model, torch.zeros(2, 5, dtype=torch.long), draws=1)


@pytest.mark.parametrize("N", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("T", [1, 2, 5, 64, 257])
def test_evaluate_takes_its_own_masks_and_refuses_a_k_that_is_not_uniform(monkeypatch, N, T):
    model, blocks = tiny("diffusion", T=T, n_layer=1), torch.zeros(N, T, dtype=torch.long)
    for seed in range(20):
        evaluate(model, blocks, seed=seed)
    right = uniform_k
    for k in (lambda B, T, generator: torch.ones(B), lambda B, T, generator: torch.full((B,), T),
              lambda B, T, generator: right(B, T, generator) - 1, lambda B, T, generator: right(B, T, generator) + 1):
        monkeypatch.setattr(model_module, "uniform_k", k)
        if N >= 64 and T >= 5:  # where there is enough to tell by
            with pytest.raises(ValueError, match="not uniform on 1..T"):
                evaluate(model, blocks)


# ----- optimizers


def test_every_parameter_is_in_one_optimizer_or_is_named():
    for optimizer in ("adamw", "muon"):
        model = tiny("ar")
        grouped = [p for o in make_optimizers(model, optimizer, 1e-3, 0.1) for g in o.param_groups for p in g["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
        model.blocks[0].scale = torch.nn.Parameter(torch.ones(2, 2, 2))
        with pytest.raises(ValueError, match="blocks.0.scale"):
            make_optimizers(model, optimizer, 1e-3, 0.1)


def test_muons_updates_are_as_large_as_adamws():
    muon = make_optimizers(GPT(GPTConfig(n_layer=1)), "muon", 1.0, 0.0)[1]
    matrices = muon.param_groups[0]["params"]
    before = [p.detach().clone() for p in matrices]
    for p in matrices:
        p.grad = torch.randn_like(p)
    muon.step()
    for p, old in zip(matrices, before, strict=True):
        assert (p - old).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


def test_chain_rule_equals_brute_force_and_sums_to_one():
    model = tiny("diffusion", T=4)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    nll = chain_rule_nll(model, every)
    identity = [any_order_losses(model, x)[0].item() for x in every[::20]]  # the first permutation is left to right
    assert nll[::20].tolist() == pytest.approx(identity)
    assert torch.exp(-4 * nll).sum().item() == pytest.approx(1)
    ar = tiny("ar", T=4)
    assert torch.allclose(chain_rule_nll(ar, every), ar(every).double())
    ranks = torch.tensor([[order.index(i) for i in range(4)] for order in itertools.permutations(range(4))])
    for x in every[[7, 50]]:  # and in all 24 orders, in each of which the token of rank 0 is revealed first
        nll = conditional_nll(model, x.expand(24, -1), ranks >= 0, ranks)
        assert torch.allclose(nll, 4 * any_order_losses(model, x))


def test_conditional_equals_enumeration():
    x = torch.tensor([[2, 0, 1, 1, 0]])
    for objective, target in (("diffusion", [0, 1, 0, 1, 1]), ("diffusion", [1, 0, 0, 0, 0]), ("ar", [0, 0, 0, 1, 1])):
        model, target = tiny(objective), torch.tensor([target], dtype=torch.bool)
        n = int(target.sum())
        fillings = torch.tensor(list(itertools.product(range(3), repeat=n)))
        every = x.repeat(len(fillings), 1)
        every[:, target[0]] = fillings
        nll = conditional_nll(model, every, target.expand(len(every), -1))
        assert torch.exp(-nll).sum().item() == pytest.approx(1)
        if objective == "ar":  # p(targets | rest) = p(block) / sum over fillings of p(block)
            joint = torch.log_softmax(-5 * model(every).double(), 0)
            assert torch.allclose(-nll, joint)
        else:  # the chain rule over the targets, from left to right
            seen, total = x.masked_fill(target, 3), 0.0
            for i in target[0].nonzero().flatten().tolist():
                total += F.cross_entropy(model.logits(seen)[0, i], x[0, i]).item()
                seen = seen.clone()
                seen[0, i] = x[0, i]
            assert conditional_nll(model, x, target).item() == pytest.approx(total)
    with pytest.raises(ValueError, match="past alone"):
        conditional_nll(tiny("ar"), x, torch.tensor([[True, False, False, False, True]]))


def test_standard_error_of_pure_noise():
    """Blocks and mask sizes that differ are not noise; 512 values of spread 0.5 on top are, by 0.5 / sqrt(512)."""
    generator = torch.Generator().manual_seed(0)
    k = torch.stack([torch.randperm(256, generator=generator) // 2 + 1 for _ in range(2)], dim=1)
    noise = 0.5 * torch.randn(256, 2, generator=generator, dtype=torch.float64)
    loss = 3 * torch.randn(256, 1, generator=generator) + k.double().log() + noise
    assert standard_error(loss, k) == pytest.approx(0.5 / math.sqrt(512), rel=0.15)
