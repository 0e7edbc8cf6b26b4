"""One GPT and the two objectives it can learn by: autoregressive, or masked diffusion.

A block is T tokens x_1..x_T from a vocabulary of V. Each loss tells -log p of a block, in nats per token:

  ar         predict each token from those before it:
             loss = 1/T sum_i -log p(x_i | x_<i)                                  exact
  diffusion  draw k uniformly from 1..T, mask k random tokens, predict these from the rest:
             loss = E_k E_mask 1/k sum_masked -log p(x_i | the unmasked)          an upper bound, the NELBO

These are what evaluate reports. Training descends the bound with less weight on blocks of few masks, which
is no bound but learns sooner: see train.draw_mask.

The NELBO of arXiv 2507.15857, eq. 3, draws t from (0, 1), masks each token with probability t, and weighs the
sum over the masked by 1/(t T). A given mask of k tokens has the chance t^k (1-t)^(T-k); times its weight, and
integrated over t, that is 1/T * 1/binomial(T, k) * 1/k. So k is uniform on 1..T, all masks of k tokens are
alike, and 1/k makes the sum a mean: the two are equal, and drawing k itself has far less noise. Either is
also the mean loss over all T! orders of unmasking the tokens one by one.

The network is the same for both. Its embedding has one row more than V: [MASK] for diffusion, the start
symbol for AR. It gives V logits, so this extra token is never predicted. The lines that differ between the
objectives carry the tags [AR] and [DIFFUSION].
"""

import io
import math
import os
import time
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

FORMAT = "ambigpt-checkpoint-1"
MAX_LOGITS = 2**27  # half a gigabyte: more logits come in parts, computed again in the backward pass


class UserError(ValueError):
    """A fault that the person at the keyboard can mend: the commands print it and exit with 2."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a network. Raises UserError where the numbers do not make one."""

    objective: str = "diffusion"  # "ar" or "diffusion"
    vocab_size: int = 512  # V, without the one extra row
    block_size: int = 128  # T
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 128  # C
    dropout: float = 0.0
    rope_base: float = 20.0  # small, so that near positions differ: a masked token knows only its own

    def __post_init__(self):
        if self.objective not in ("ar", "diffusion"):
            raise UserError(f"unknown objective {self.objective!r}: choose ar or diffusion")
        for name, low in (("vocab_size", 1), ("block_size", 1), ("n_layer", 1), ("n_head", 1), ("n_embd", 1),
                          ("dropout", 0), ("rope_base", 1.01)):
            if not getattr(self, name) >= low:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {low}")
        if self.dropout >= 1:
            raise UserError(f"dropout is {self.dropout}: it must be under 1")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"n_embd={self.n_embd} over n_head={self.n_head} heads: rotary positions need an "
                            f"even, whole number of channels per head; try n_embd={self.n_head * 32}")
        if 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd > 1e12:
            raise UserError(f"n_layer={self.n_layer}, n_embd={self.n_embd}: over 10^12 parameters; lower one")


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864). x: (B, H, T, D); cos, sin: (..., T, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, D/2)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # else bf16 would become float32, and bf16 again
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.causal = config.objective == "ar"  # [AR] a token sees its past; [DIFFUSION] the whole block
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3 * self.n_head, -1).transpose(1, 2)  # (B, 3H, T, D)
        qk, v = qkv.split((2 * self.n_head, self.n_head), dim=1)
        qk = F.rms_norm(qk, qk.shape[-1:])  # QK-norm bounds the attention logits
        q, k = rotate(qk, cos, sin).chunk(2, dim=1)  # (B, H, T, D) each
        if cache is not None:  # [AR] in sampling: empty at first, then the k and v of the P tokens so far
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)  # (B, H, P+T, D)
            cache[:] = k, v
        # With a filled cache T is 1: this token is the last and may see all.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and T == k.shape[2],
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = max(64, 8 * config.n_embd // 3 // 64 * 64)  # the paper's floor(8C/3 / 64) * 64
        self.gate_up = nn.Linear(config.n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(config.n_embd, eps=1e-5), Attention(config)
        self.norm2, self.mlp = nn.RMSNorm(config.n_embd, eps=1e-5), SwiGLU(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None, at=None):
        x = x + self.drop(self.attn(self.norm1(x), cos, sin, cache))
        if at is not None:  # [DIFFUSION] last block: attention has read all, only those scored go on
            x = x.flatten(0, 1)[at]  # (B, T, C) -> (M, C)
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Pre-norm transformer: RMSNorm, rotary positions, SwiGLU, tied embeddings, no biases, no time input."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)  # row V: [MASK] or the start symbol
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        D = config.n_embd // config.n_head
        frequency = config.rope_base ** (-torch.arange(0, D, 2) / D)  # (D/2,)
        angle = torch.outer(torch.arange(config.block_size), frequency)  # (T, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what writes into the residual stream starts smaller: there are 2 n_layer such
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, x, mask=None, at=None, read=None):
        """The loss of each block under the network's objective, (B,) in nats per token.

        x: (B, T) token ids in 0..V-1, to predict. read: (B, T) what the network reads: x, or a copy with
        some tokens replaced (train.py's --replace). mask (diffusion): (B, T) bool. at: (M,) where the
        flattened mask is True, the positions to score; left out, they are found here, and a GPU stalls.
        """
        read = x if read is None else read
        if self.config.objective == "ar":  # [AR]
            return self.ar_loss(x, read)  # [AR]
        at = mask.flatten().nonzero().squeeze(1) if at is None else at  # [DIFFUSION]
        return self.diffusion_loss(x, read, mask, at)  # [DIFFUSION]

    def ar_loss(self, x, read):  # [AR]
        """The mean over all T tokens of -log p(x_i | x_<i), (B,) in nats per token. Exact."""
        past = F.pad(read[:, :-1], (1, 0), value=self.config.vocab_size)  # (B, T): start, x_1..x_{T-1}
        nll = self.nll(self.hidden(past).flatten(0, 1), x.flatten())  # (B T,)
        return nll.view(x.shape).mean(1)

    def diffusion_loss(self, x, read, mask, at):  # [DIFFUSION]
        """The mean over its k masked tokens of -log p(x_i | the unmasked), (B,) in nats per token.

        With k uniform on 1..T its expectation is the NELBO, an upper bound on -log p of the block.
        """
        masked = read.masked_fill(mask, self.config.vocab_size)  # (B, T): [MASK] is the extra token
        nll = self.nll(self.hidden(masked, at=at), x.flatten()[at])  # (M,) of the masked tokens alone
        row = at // x.shape[1]  # (M,) the block that each masked token is in
        k = mask.sum(1)  # (B,)
        return nll.new_zeros(len(x)).index_add(0, row, nll / k[row])  # a block without masks counts 0

    def rotation(self, start, T):
        """cos and sin of the rotary angles of positions start..start+T-1, both (T, D/2)."""
        return self.cos[start:start + T], self.sin[start:start + T]

    def hidden(self, idx, cache=None, at=None):
        """Token ids (B, T) in 0..V to final hidden states (B, T, C).

        at: (M,) positions in the flattened idx whose states (M, C) are all that is wanted. cache (AR): an
        empty list for each block, which keeps what attention needs; idx is then one more token (B, 1) a call.
        """
        start = cache[0][0].shape[2] if cache and cache[0] else 0  # tokens in the cache
        cos, sin = self.rotation(start, idx.shape[1])
        x = self.drop(self.embed(idx.to(self.embed.weight.device)))  # (B, T, C); samples may lie on the CPU
        for block, own_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, cos, sin, own_cache, at if block is self.blocks[-1] else None)
        return self.norm(x)

    def head(self, h):
        """Hidden states (..., C) to float32 logits (..., V): the extra token is an input, never an output."""
        return F.linear(h, self.embed.weight[: self.config.vocab_size]).float()

    def logits(self, idx):
        """Token ids (B, T) to logits (B, T, V): AR's are of the next token, diffusion's of that position."""
        return self.head(self.hidden(idx))

    def nll(self, h, target):
        """-log p in nats, (M,), of target (M,) from hidden states h (M, C).

        More than MAX_LOGITS logits, as with a vocabulary of 50257, are computed in parts, and again in the
        backward pass: else they would fill the memory.
        """
        def part_nll(h, target):
            return F.cross_entropy(self.head(h), target, reduction="none")

        rows = max(1, MAX_LOGITS // self.config.vocab_size)
        if len(h) <= rows:
            return part_nll(h, target)
        parts = zip(h.split(rows), target.split(rows), strict=True)
        return torch.cat([checkpoint(part_nll, *part, use_reentrant=False) for part in parts])

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


def make_optimizers(model, optimizer, lr, weight_decay):
    """AdamW as in the paper, or Muon for the matrices of the blocks with AdamW for the rest; a list.

    Raises ValueError with the names of the parameters that no group takes: neither matrix nor vector.
    """
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and name.startswith("blocks.")]
    tables = [p for name, p in named.items() if p.dim() == 2 and not name.startswith("blocks.")]
    vectors = [p for p in named.values() if p.dim() == 1]
    grouped = {id(p) for p in matrices + tables + vectors}
    if forgotten := [name for name, p in named.items() if id(p) not in grouped]:
        raise ValueError(f"no optimizer has {', '.join(forgotten)}: add a group for them in make_optimizers")
    decayed = tables if optimizer == "muon" else tables + matrices
    optimizers = [torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay},
                                     {"params": vectors, "weight_decay": 0.0}],
                                    lr=lr, betas=(0.9, 0.95), fused=True)]
    if optimizer == "muon":  # its updates are as large as AdamW's (2502.16982): one lr serves both
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


# ----- masks, as evaluation draws them and as training does by default (train.draw_mask)


def uniform_k(B, T, generator):  # [DIFFUSION]
    """How many tokens of each of B blocks to mask, (B,): uniform on 1..T.

    One u is drawn in each of B/2 equal parts of [0, 1/2). It gives a pair of blocks k = 1 + floor(u T) and
    T+1-k. That leaves the distribution of each k unchanged, makes the loss far less noisy, and masks exactly
    B(T+1)/2 tokens of an even batch, so that shapes stay fixed.
    """
    pairs = (B + 1) // 2
    stratum = torch.randperm(pairs, generator=generator).double()  # the part of each pair
    u = torch.rand(pairs, generator=generator, dtype=torch.float64)
    u = (stratum + u) / (2 * pairs)  # in [0, 1/2)
    low = 1 + (u * T).long()  # the smaller k of the pair
    k = torch.stack((low, T + 1 - low), dim=1)  # (pairs, 2)
    swap = torch.rand(pairs, generator=generator) < 0.5  # or the smaller would always come first
    return torch.where(swap[:, None], k.flip(1), k).flatten()[:B]


def mask_k(k, T, generator):  # [DIFFUSION]
    """Masks (B, T) bool with k (B,) masked positions: those of the k lowest of T random numbers."""
    rank = torch.rand(len(k), T, generator=generator).argsort(1).argsort(1)  # (B, T), 0 for the lowest
    return rank < k[:, None]


# ----- evaluation: the number that every run reports, with masks that training has no hand in


@torch.no_grad()
def evaluate(model, blocks, draws=2, seed=0, batch_size=32):
    """The loss of blocks (N, T) in nats per token, and its standard error.

    AR: the exact -log p, error 0. Diffusion: an estimate of the bound from `draws` >= 2 mask draws a block.
    It has its own generator: every checkpoint meets the same masks, and training is not disturbed.
    """
    if model.config.objective == "ar":
        return block_losses(model, blocks, None, batch_size).mean().item(), 0.0  # [AR]
    if draws < 2:
        raise ValueError(f"{draws} mask draws: a diffusion bound needs at least 2 to know its own error")
    N, T = blocks.shape
    generator = torch.Generator().manual_seed(seed)
    masks = [mask_k(uniform_k(N, T, generator), T, generator) for _ in range(draws)]  # [DIFFUSION]
    k = torch.stack([mask.sum(1) for mask in masks], dim=1)  # (N, draws)
    expected = (torch.arange(N) + 0.5) / N * T + 0.5  # (N,) ascending, and exactly even over 1..T
    far = (k.sort(0).values - expected[:, None]).abs().max() > 2 * T / N + 1  # uniform_k: a part is T/N wide
    pairs = k[:N // 2 * 2].view(N // 2, 2, draws).sum(1)  # of k and T+1-k
    if far or (pairs != T + 1).any() or k.min() < 1:
        raise ValueError("evaluate got masks whose k is not uniform on 1..T, and val_loss would be no bound: "
                         "leave uniform_k and mask_k alone; a training schedule goes into train.draw_mask")
    loss = torch.stack([block_losses(model, blocks, mask, batch_size) for mask in masks], dim=1)  # (N, draws)
    return loss.mean().item(), standard_error(loss, k)


def block_losses(model, blocks, mask, batch_size):
    """model(blocks, mask) without dropout, in batches: (N,) float64 on the CPU, nats per token."""
    device, training, losses = model.embed.weight.device, model.training, []
    model.eval()
    try:
        for i in range(0, len(blocks), batch_size):
            part = slice(i, i + batch_size)
            chosen = None if mask is None else mask[part].to(device)
            losses.append(model(blocks[part].to(device), chosen))
    finally:
        model.train(training)
    return torch.cat(losses).cpu().double()  # in this order: not every device has float64


def standard_error(loss, k):
    """Standard error of loss.mean() over the mask draws; loss, k: (N, draws), with at least 2 draws.

    Every draw meets each block once, and each k as often as any other. So neither the differences between
    blocks nor those between values of k are noise: the noise is what remains without the mean of each block,
    and of each of some bins of similar k. With fewer than some 64 blocks the result is rough.
    """
    (N, draws), bins = loss.shape, max(1, min(64, loss.numel() // 16))
    groups = k.flatten().argsort(stable=True).tensor_split(bins)
    residual = loss.clone()
    for _ in range(4):  # to take out one mean brings back a little of the other, ever less
        residual -= residual.mean(1, keepdim=True)
        for group in groups:
            residual.view(-1)[group] -= residual.view(-1)[group].mean()
    freedom = max(1, N * (draws - 1) - bins)  # values less means
    return (residual.square().sum() / freedom / (N * draws)).sqrt().item()


# ----- machinery: devices, processes, checkpoints


def choose_device(name="auto", dtype="auto"):
    """The device and dtype to run on, and a line that says why. Raises UserError without such a device."""
    why = "as asked"
    if name == "auto":
        name, why = "cpu", f"PyTorch sees no GPU, {torch.get_num_threads()} threads"
        if torch.cuda.is_available():
            name, why = "cuda", "PyTorch sees a GPU"
        elif torch.backends.mps.is_available() and processes()[1] == 1:  # it can not be shared by several
            name, why = "mps", "PyTorch sees Apple's GPU"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError("choose cpu, cuda or mps")
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name}: {str(error).splitlines()[0]}; try --device=auto") from None
    fast = {"cpu": torch.cpu._is_avx512_bf16_supported, "cuda": torch.cuda.is_bf16_supported}.get(device.type)
    if dtype == "auto":
        dtype = "bfloat16" if fast and fast() else "float32"
    return device, getattr(torch, dtype), f"device {device} ({why}), matrix products in {dtype}"


def settle_threads(work, most):
    """Set how many CPU threads to use, of most, most/2, ..., 1: the most that work() gains by.

    Beside another program threads wait for each other: two can take 20 times as long as one. Their number
    changes the last digits of results, and OMP_NUM_THREADS, where it is set, fixes it.
    """
    def seconds(threads):
        """How long work() takes with so many threads, from at least 20 ms of it."""
        torch.set_num_threads(threads)
        start, calls, took = time.perf_counter(), 0, 0
        while took < 0.02:
            work()
            calls, took = calls + 1, time.perf_counter() - start
        return took / calls

    threads = most
    while threads > 1 and "OMP_NUM_THREADS" not in os.environ:
        work()  # the first takes longer
        half, tries = min(seconds(threads // 2) for _ in range(2)), []
        while len(tries) < 3 and sum(tries) < 3 * half:  # else they are slower, whatever the rest would take
            tries.append(seconds(threads))
        if sum(tries) < 0.95 * 3 * half:  # faster than half of them by a twentieth
            break
        threads //= 2
    torch.set_num_threads(threads)


@contextmanager
def precision(device, dtype):
    """The context in which the network runs: autocast to bf16, or nothing."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # for the CPU's products, too
    bf16 = dtype == torch.bfloat16
    # On a CPU plain matrix products: the backward pass of the fused attention would take 3 times longer.
    kernel = sdpa_kernel(SDPBackend.MATH) if bf16 and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), kernel:
        yield


def processes():
    """(rank, world) of this process under torchrun; (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device, batch_size):
    """Join the others under torchrun: (rank, world). Raises UserError if they can not share a batch."""
    rank, world = processes()
    if batch_size % (2 * world):
        raise UserError(f"--batch_size={batch_size}: masks are drawn in pairs, so it must be a "
                        f"multiple of {2 * world} (processes: {world})")
    if world > 1 and not dist.is_initialized():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        on_gpu = gpus > 0 and device in ("auto", "cuda")
        if on_gpu and local >= gpus:
            raise UserError(f"process {local} has no GPU, there are {gpus}: start fewer")
        if on_gpu:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=1))
    return rank, world


def make_model(config):
    """The GPT that a dict describes; keys that GPTConfig does not have are left alone."""
    shape = GPTConfig(**{field.name: config[field.name] for field in fields(GPTConfig)})
    try:
        return GPT(shape)
    except RuntimeError as error:
        raise UserError(f"no memory for {shape.n_layer} layers of {shape.n_embd} channels: {error}") from None


def write_atomic(path, write):
    """Call write(file) on a temporary sibling of path, then put that in path's place: never half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, state):
    """Write a checkpoint of tensors and plain values atomically: a zip file, with a CRC of every part."""
    buffer = io.BytesIO()  # not the file itself: on a full disk torch would hide the OSError
    torch.save({"format": FORMAT} | state, buffer)
    write_atomic(path, lambda f: f.write(buffer.getbuffer()))


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. Raises UserError where there is no sound one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train one with python train.py --out={path.parent}")
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()  # the name of a part that does not have its CRC, or None
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        if damaged or found != FORMAT:
            raise ValueError(f"damaged: {damaged}" if damaged else f"its format is {found}, not {FORMAT}")
    except Exception as error:  # these raise a dozen kinds on bytes that are not a checkpoint
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UserError(f"{path} is damaged or not a checkpoint of ambigpt ({reason})") from error
    return state


def model_from_checkpoint(state):
    """The network of a checkpoint, ready to evaluate or sample: with averaged weights, where it has them."""
    model = make_model(state["config"])
    model.load_state_dict(state.get("average", state["model"]))
    return model.eval()
