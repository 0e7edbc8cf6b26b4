"""The samplers draw from the distribution they claim, and the probes measure what they say."""

import itertools
import math

import numpy as np
import pytest
import torch

import prepare
from conftest import any_order_losses, tiny
from model import GPT, GPTConfig, UserError, load_checkpoint, save_checkpoint
from sample import memorised, multiple_choice, pick, questions, sample_ar, sample_diffusion, unmask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(samples, probabilities):
    """Pearson's statistic of samples (n, T) in 0..2 against the probabilities of all 3^T texts, and its 0.1 % bound."""
    T = samples.shape[1]
    index = (samples * 3 ** torch.arange(T - 1, -1, -1)).sum(1)
    expected = len(samples) * probabilities
    assert expected.min() > 5  # so that the statistic has its textbook distribution
    statistic = ((torch.bincount(index, minlength=3**T) - expected) ** 2 / expected).sum().item()
    free = 3**T - 1
    return statistic, free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3  # Wilson-Hilferty


def soft(objective):
    """A network over 3 letters and 3 places whose distribution has no improbable corner."""
    model = tiny(objective, V=3, T=3)
    model.embed.weight.data *= 0.4
    return model


EVERY_TEXT = torch.tensor(list(itertools.product(range(3), repeat=3)))


def test_one_by_one_in_random_order_samples_the_mixture_over_orders():
    model = soft("diffusion")
    exact = torch.stack([torch.exp(-3 * any_order_losses(model, x)).mean() for x in EVERY_TEXT])
    samples = unmask(model, torch.full((20000, 3), 3), generator=generator())
    statistic, bound = chi_square(samples, exact)
    assert statistic < bound
    independent = unmask(model, torch.full((20000, 3), 3), steps=1, generator=generator())
    assert chi_square(independent, exact)[0] > bound  # and the test is sharp enough to see that one step is not exact


def test_ar_samples_its_own_joint_distribution():
    model = soft("ar")
    exact = torch.exp(-3 * model(EVERY_TEXT).double())
    samples = sample_ar(model, torch.empty(20000, 0, dtype=torch.long), 3, generator=generator())
    statistic, bound = chi_square(samples, exact)
    assert statistic < bound


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13, 20])
@pytest.mark.parametrize("steps", [0, 1, 3, 8, 50])
def test_no_mask_is_left_and_the_prompt_is_kept(length, steps):
    model, prompt = tiny("diffusion", V=5, T=8), torch.tensor([[4, 0, 2]])[:, :length - 1].repeat(2, 1)
    ids = sample_diffusion(model, prompt, length, steps, generator=generator())
    assert ids.shape == (2, length) and ids.min() >= 0 and ids.max() < 5
    assert torch.equal(ids[:, :prompt.shape[1]], prompt)
    assert torch.equal(ids, sample_diffusion(model, prompt, length, steps, generator=generator()))


def test_unmask_keeps_what_is_not_masked_wherever_it_stands():
    model = tiny("diffusion", V=5, T=8)
    x = torch.tensor([[5, 1, 5, 5, 2, 5, 5, 3], [0, 5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 0, 1, 2, 3]])
    for steps in (0, 1, 2, 5):
        filled = unmask(model, x, steps, generator=generator(steps))
        assert (filled < 5).all() and torch.equal(filled[x < 5], x[x < 5])


def test_ar_text_longer_than_the_block_slides_on():
    model = tiny("ar", V=5, T=8)
    ids = sample_ar(model, torch.tensor([[1, 2]]), 30, generator=generator())
    assert ids.shape == (1, 30) and ids[0, :2].tolist() == [1, 2]


def test_temperature_orders_the_entropy_and_nothing_overflows():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    entropies = []
    for temperature in (0, 1e-30, 0.5, 1, 2, 1e30):
        p = torch.bincount(pick(logits, temperature, 0, generator()), minlength=4) / 20000
        entropies.append(-(p[p > 0] * p[p > 0].log()).sum().item())
    assert entropies[0] == entropies[1] == 0 and entropies == sorted(entropies)
    assert entropies[-1] == pytest.approx(math.log(4), abs=1e-3)
    assert pick(torch.tensor([[-1e38, 1e38, 0.0]]), 1e-3, 2, generator()).tolist() == [1]
    assert set(pick(logits, 5.0, 2, generator()).tolist()) == {0, 1}


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
    save_checkpoint(tmp_path / "best.pt", {"model": model.state_dict(), "tokenizer": documents.tokenizer.to_dict()})
    tokenizer = prepare.Tokenizer.from_dict(load_checkpoint(tmp_path / "best.pt")["tokenizer"])
    assert tokenizer.decode(tokenizer.encode("w1a w2b.")) == "w1a w2b."
