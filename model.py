"""One GPT and the two ways to teach it: left to right, or by filling in masks.

A block is T tokens x_1..x_T out of a vocabulary of V. Both objectives score all T tokens of a block from nothing,
in nats per token:

  ar         predict x_i from x_1..x_{i-1}:            loss = 1/T sum_i -log p(x_i | x_<i)                   exact
  diffusion  hide k of the T tokens, k ~ U{1..T}, and predict them from the others:
                                                       loss = E_k E_mask 1/k sum_masked -log p(x_i | rest)   bound

The second expectation is the paper's E_t[1/t sum_masked ...]/T (arXiv 2507.15857, eq. 3) with the number of masked
tokens drawn directly: if t ~ U(0,1) and every token is masked with probability t, that number is uniform on 0..T. It is
also the mean loss over all T! orders in which the tokens could be revealed, hence an upper bound on the -log p of the
mixture over orders. Drawing k has no 1/t to blow up and far less noise (notebook 01 shows all three agreeing).

The network is the same for both: V+1 embedding rows, of which the last is [MASK] for diffusion and the start symbol for
AR, and V logits, so that the extra token is never predicted. The lines that differ are tagged [AR] and [DIFFUSION].
"""

import hashlib
import io
import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

FORMAT = "ambigpt-checkpoint-1"
MAX_LOGITS = 2**27  # logits to keep for the backward pass, half a gigabyte: see GPT.nll
CPU_LOGITS = 2**21  # logits a CPU computes at a time: beyond its caches a bf16 step at V = 4096 takes a fifth longer


class UserError(ValueError):
    """A fault that the person at the keyboard can mend: the commands print it in a line or two and exit with 2."""


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
    rope_base: float = 20.0  # small, as a masked token knows only where it stands, and slow rotations hardly tell it

    def __post_init__(self):
        if self.objective not in ("ar", "diffusion"):
            raise UserError(f"unknown objective {self.objective!r}: choose ar or diffusion")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd={self.n_embd} over n_head={self.n_head} heads: rotary positions need an even, "
                            f"whole number of channels per head; try n_embd={self.n_head * 32}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it must be at least 0 and under 1")
        if 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd > 1e12:
            raise UserError(f"n_layer={self.n_layer} and n_embd={self.n_embd} make over 10^12 parameters: lower them")
        if not self.rope_base > 1:
            raise UserError(f"rope_base is {self.rope_base}: it must be over 1")


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864). x: (B, H, T, D); cos, sin: (T, D) or (B, 1, T, D)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.causal = config.objective == "ar"  # [AR] a token sees its past; [DIFFUSION] a token sees the whole block
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        qk, v = self.qkv(x).view(B, T, 3 * self.n_head, -1).transpose(1, 2).split((2 * self.n_head, self.n_head), dim=1)
        q, k = rotate(F.rms_norm(qk, qk.shape[-1:]), cos, sin).chunk(2, dim=1)  # QK-norm bounds the attention logits
        if cache is not None:  # [AR] keys and values of all tokens so far (B, H, P+T, D): the past is computed once
            cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, (k, v), strict=True)] if cache else [k, v]
            k, v = cache
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

    def forward(self, x, cos, sin, cache=None, keep=None):
        x = x + self.drop(self.attn(self.norm1(x), cos, sin, cache))
        x = x if keep is None else x.flatten(0, 1)[keep]  # [DIFFUSION] the last block: what is not scored ends here
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Pre-norm transformer with RMSNorm, rotary positions, SwiGLU, tied embeddings, no biases and no time input."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)  # row V: [MASK] or the start symbol
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        head = config.n_embd // config.n_head
        frequency = config.rope_base ** (-torch.arange(0, head, 2) / head)  # (D/2,)
        angle = torch.outer(torch.arange(config.block_size + 1), frequency).repeat(1, 2)  # (T + 1, D)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the layers that write into the residual stream start smaller, as there are 2 n_layer
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def hidden(self, idx, position=None, cache=None, keep=None):
        """Token ids (B, T) in 0..V to final hidden states (B, T, C). position: (B, T), places if not 0..T-1.

        keep: (M,) positions in the flattened idx whose states (M, C) are all that is wanted.

        cache (AR): an empty list for each block. It keeps what attention needs of idx; in the calls that follow, idx is
        (B, 1), the one token that comes next.
        """
        P = cache[0][0].shape[2] if cache and cache[0] else 0  # tokens in the cache
        cos, sin = (t[P:P + idx.shape[1]] if position is None else t[position][:, None] for t in (self.cos, self.sin))
        x = self.drop(self.embed(idx))  # (B, T, C)
        for block, own_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, cos, sin, own_cache, keep if block is self.blocks[-1] else None)
        return self.norm(x)

    def head(self, h):
        """Hidden states (..., C) to float32 logits (..., V): the extra row is an input only, never an output."""
        return F.linear(h, self.embed.weight[: self.config.vocab_size]).float()

    def logits(self, idx):
        """Token ids (B, T) to logits (B, T, V): of the next token at each position for AR, of its own for diffusion."""
        return self.head(self.hidden(idx))

    def nll(self, h, target):
        """-log p in nats, (M,), of target (M,) from hidden states h (M, C).

        They are done in parts. Where there are more than MAX_LOGITS logits, these are computed again in the backward
        pass instead of kept: with a vocabulary of 50257 they, and not the network, would fill the memory.
        """
        def score(h, target):
            return F.cross_entropy(self.head(h), target, reduction="none")

        V = self.config.vocab_size
        rows = max(1, (CPU_LOGITS if h.device.type == "cpu" else MAX_LOGITS) // V)
        parts = zip(h.split(rows), target.split(rows), strict=True)
        if len(h) * V <= MAX_LOGITS:
            return torch.cat([score(*part) for part in parts])
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])

    def forward(self, x, mask=None, index=None, seen=None, position=None):
        """The objective: -log p of each block, (B,) in nats per token. Its mean is the training loss.

        x: (B, T) token ids in 0..V-1. mask (diffusion only): (B, T) bool, True where hidden, at least one a row; index:
        (M,) positions of its True values in the flattened mask, given so that a GPU need not wait for a count. seen:
        (B, T) what the network reads in place of x, ids in 0..V; position: see hidden.
        """
        B, T = x.shape
        V = self.config.vocab_size
        seen = x if seen is None else seen
        if self.config.objective == "ar":
            past = F.pad(seen[:, :-1], (1, 0), value=V)  # [AR] the start symbol, and all tokens but the last
            nll = self.nll(self.hidden(past, position).flatten(0, 1), x.flatten())  # (B T,)
            return nll.view(B, T).mean(1)  # [AR] every token is scored
        index = mask.flatten().nonzero().squeeze(1) if index is None else index  # (M,)
        h = self.hidden(seen.masked_fill(mask, V), keep=index)  # [DIFFUSION] (M, C): masked tokens only
        nll = self.nll(h, x.flatten()[index])  # (M,)
        row = index // T
        return nll.new_zeros(B).index_add(0, row, nll / mask.sum(1)[row])  # [DIFFUSION] mean over the k of each block

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


def make_model(config):
    """The GPT that a dict describes; keys that GPTConfig does not have are left alone."""
    return GPT(GPTConfig(**{field.name: config[field.name] for field in fields(GPTConfig)}))


def make_optimizers(model, optimizer, lr, weight_decay):
    """AdamW as in the paper, or Muon for the matrices of the blocks and AdamW for the embedding and the norms."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    muon = optimizer == "muon"
    groups = [{"params": [model.embed.weight] + ([] if muon else matrices), "weight_decay": weight_decay},
              {"params": norms, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if muon:  # updates are scaled to the size of AdamW's, so that one learning rate serves both
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def draw_mask(B, T, generator):  # [DIFFUSION]
    """Masks of B blocks, (B, T) bool: k positions chosen uniformly, where the k of each row is uniform on 1..T.

    The rows come in pairs of k and T+1-k, and the B values of k/T are stratified over (0, 1). Neither changes the
    distribution of a single row; together they make the loss far less noisy, and exactly B(T+1)/2 tokens of an even
    batch are masked, whatever is drawn, so that shapes stay fixed.
    """
    pairs = (B + 1) // 2
    stratum = torch.randperm(pairs, generator=generator).double()
    u = (stratum + torch.rand(pairs, generator=generator, dtype=torch.float64)) / (2 * pairs)  # (pairs,) in [0, 1/2)
    low = 1 + (u * T).long()
    k = torch.stack((low, T + 1 - low), dim=1)  # (pairs, 2)
    swap = torch.rand(pairs, generator=generator) < 0.5
    k = torch.where(swap[:, None], k.flip(1), k).flatten()[:B]
    rank = torch.rand(B, T, generator=generator).argsort(1).argsort(1)
    return rank < k[:, None]


@torch.no_grad()
def evaluate(model, blocks, passes=2, seed=0, batch_size=64):
    """Loss of blocks (N, T) in nats per token, and its standard error: the one evaluation everything here uses.

    AR: the exact -log p, error 0. Diffusion: an estimate of the bound from `passes` >= 2 masks a block. It draws from
    its own generator, so every checkpoint meets the same masks and training is not disturbed.
    """
    def score(*inputs):  # tensors (N, T) -> (N,) nats per token
        parts = zip(*(tensor.split(batch_size) for tensor in inputs), strict=True)
        return torch.cat([model(*(tensor.to(device) for tensor in part)).double().cpu() for part in parts])

    training, device, (N, T) = model.training, model.embed.weight.device, blocks.shape
    model.eval()
    if model.config.objective == "ar":
        result = score(blocks).mean().item(), 0.0  # [AR]
    else:
        if passes < 2:
            raise ValueError(f"{passes} evaluation pass: a diffusion bound needs at least 2 to know its own error")
        generator = torch.Generator().manual_seed(seed)
        masks = [draw_mask(N, T, generator) for _ in range(passes)]
        loss = torch.stack([score(blocks, mask) for mask in masks], dim=1)  # (N, passes)
        k = torch.stack([mask.sum(1) for mask in masks], dim=1)
        result = loss.mean().item(), standard_error(loss, k)  # [DIFFUSION]
    model.train(training)
    return result


def standard_error(loss, k):
    """Standard error of loss.mean() over the choice of masks; loss, k: (N, P), block by pass, with P >= 2.

    Every pass meets each block once and all mask sizes alike, so neither the difference between blocks nor that between
    sizes is noise. What is left after the mean of each block and of each size (in bins of similar k) is. With fewer
    than some 64 blocks the result is rough.
    """
    (N, P), bins = loss.shape, max(1, min(64, loss.numel() // 16))
    groups = k.flatten().argsort(stable=True).tensor_split(bins)
    residual = loss.clone()
    for _ in range(4):  # the two means overlap, so they are taken out in turns
        residual -= residual.mean(1, keepdim=True)
        for group in groups:
            residual.view(-1)[group] -= residual.view(-1)[group].mean()
    freedom = max(1, N * (P - 1) - bins)  # values less means
    return (residual.square().sum() / freedom / (N * P)).sqrt().item()


@torch.no_grad()
def conditional_nll(model, x, target, rank=None):
    """-log p(target tokens | the other tokens) in nats, (B,), by the chain rule from left to right over the targets.

    x: (B, T) token ids; target: (B, T) bool. Diffusion: any positions, one network pass per target token; rank (B, T),
    0 at the first target of a row, 1 at the second, ..., is another order to reveal them in. AR: only a suffix of the
    block, as it can not see what follows; ValueError otherwise.
    """
    if model.config.objective == "ar":
        if (target[:, :-1] & ~target[:, 1:]).any():
            raise ValueError("an AR model conditions on the past alone: the target must be the end of the block")
        past = F.pad(x[:, :-1], (1, 0), value=model.config.vocab_size)  # [AR]
        nll = F.cross_entropy(model.logits(past).transpose(1, 2), x, reduction="none")  # (B, T)
        return (nll.double() * target).sum(1)
    rank = target.long().cumsum(1) - 1 if rank is None else rank  # (B, T)
    total = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for j in range(int(target.sum(1).max())):  # [DIFFUSION] targets before the j-th are seen, it and later ones hidden
        now = (target & (rank == j)).flatten().nonzero().squeeze(1)  # (M,) of the rows that have a j-th target
        h = model.hidden(x.masked_fill(target & (rank >= j), model.config.vocab_size), keep=now)  # (M, C)
        total[now // x.shape[1]] += F.cross_entropy(model.head(h), x.flatten()[now], reduction="none").double()
    return total


def chain_rule_nll(model, x):
    """Exact left-to-right -log p of blocks x (B, T) in nats per token, (B,): T network passes for diffusion, 1 for AR.

    For diffusion it is a second honest number beside the bound: the likelihood when the tokens are revealed from left
    to right. It may lie on either side of the bound, which is a mean over all orders.
    """
    return conditional_nll(model, x, torch.ones_like(x, dtype=torch.bool)) / x.shape[1]


# ----- on a device and on disk


def choose_device(name="auto", dtype="auto"):
    """The device and dtype to run on, and a line that says why. Raises UserError if the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = "the GPU that PyTorch sees" if name == "cuda" else f"no GPU; {torch.get_num_threads()} threads"
    else:
        why = "as asked"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device={name}: {str(error).splitlines()[0]}; try --device=auto") from None
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        dtype, reason = ("bfloat16", "it computes in bf16") if fast else ("float32", "it has no fast bf16")
        why += f"; {reason}"
    return device, getattr(torch, dtype), f"device {device}, matrix products in {dtype} ({why})"


@contextmanager
def precision(device, dtype):
    """The context in which the network runs: autocast to bf16, or nothing.

    On a CPU in bf16 attention runs as two plain matrix products: the fused kernel's backward pass takes 3 times longer.
    """
    if dtype == torch.float32:
        yield
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with torch.autocast(device.type, dtype), sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
        yield


def digest(value):
    """SHA-256 of nested plain values and tensors: a checksum against damage, not a signature against malice."""
    h = hashlib.sha256()

    def add(v):
        if isinstance(v, dict):
            h.update(b"dict")
            add([(key, v[key]) for key in v])
        elif isinstance(v, (list, tuple)):
            h.update(b"[%d]" % len(v))
            for item in v:
                add(item)
        elif isinstance(v, torch.Tensor):
            h.update(f"{v.dtype}{tuple(v.shape)}".encode())
            h.update(v.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            h.update(f"{v!r};".encode())

    add(value)
    return h.hexdigest()


def write_atomic(path, write):
    """Call write(file) on a temporary sibling of path and put it in path's place: there is never half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path, state):
    """Write a checkpoint of tensors and plain values atomically, with its digest."""
    state = {"format": FORMAT} | state
    torch.save(state | {"digest": digest(state)}, buffer := io.BytesIO())  # on a full disk torch hides the OSError
    write_atomic(path, lambda f: f.write(buffer.getbuffer()))


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. Raises UserError if it is missing, damaged or not ours."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train one with python train.py --out={path.parent}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds on bytes that are not a checkpoint
        raise UserError(f"{path} can not be read as a checkpoint: it is damaged or foreign") from error
    if not isinstance(state, dict) or not str(state.get("format")).startswith("ambigpt-checkpoint-"):
        raise UserError(f"{path} is not a checkpoint of ambigpt")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has format {state['format']}, this version reads {FORMAT}: train it anew")
    if state.pop("digest", None) != digest(state):
        raise UserError(f"{path} is damaged: its content does not match its digest")
    return state


def model_from_checkpoint(state):
    """The network of a checkpoint, ready to evaluate or sample."""
    model = make_model(state["config"])
    model.load_state_dict(state["model"])
    return model.eval()
