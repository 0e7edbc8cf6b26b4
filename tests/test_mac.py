"""On a Mac's GPU, of which a stand-in stands here: nothing has float64 on it, and what is written is what a CPU writes.

No machine of ours has one. The stand-in is a tensor that says of itself that its device is mps, and whose numbers a
CPU computes. It refuses what that device refuses: float64, an operation on tensors of two devices, a generator of
another device, and becoming a NumPy array.
"""

import contextlib
import json

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import prepare
import probe
import sample
import train
from conftest import tiny
from model import choose_device
from sample import sample_ar, sample_diffusion

MPS = torch.device("mps")
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"


class OnMac(torch.Tensor):
    """A tensor on the stand-in; inner: where its numbers are."""

    device = property(lambda self: MPS)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError(NO_FLOAT64)
        tensor = torch.Tensor._make_subclass(cls, inner)
        tensor.inner = inner
        return tensor

    def __reduce_ex__(self, protocol):  # into a checkpoint, which is read on a CPU
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of standing_in()")


class MacGenerator(torch.Generator):
    """A generator that knows whether it was made on the stand-in."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.on_mac = torch.device(device).type == "mps"
        return generator


class Moves(TorchFunctionMode):
    """Every call of PyTorch from Python: moves between the devices, and what is refused."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, x = kwargs or {}, args[0] if args else None
        if func is torch._has_compatible_shallow_copy_type:  # of a parameter that moves
            return False
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and (on_mac(x) or x.dim())]
        if len({on_mac(x) for x in tensors}) > 1 and func is not torch.Tensor.copy_:  # a number may be on the CPU
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device")
        if isinstance(source := kwargs.get("generator"), MacGenerator):
            if source.on_mac != (any(map(on_mac, tensors)) or kwargs.get("device") == MPS):
                raise RuntimeError(f"{func}: Expected a generator of the same device")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == MPS:
            return OnMac(func(*args, **kwargs | {"device": None}))
        if func is torch.Tensor.numpy and on_mac(x):
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if func is torch.Tensor.tolist:
            return func(inner(x))
        if func not in (torch.Tensor.cpu, torch.Tensor.to):
            return func(*args, **kwargs)
        device, dtype = torch.device("cpu"), None
        if func is torch.Tensor.to:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
        if device is not None and (device.type == "mps") != on_mac(x):
            x = x.inner.clone() if on_mac(x) else OnMac(x.detach().to(dtype or x.dtype).clone())
        return x if dtype is None else torch.Tensor.to(x, dtype)


class Mac(TorchDispatchMode):
    """Every operation that those calls, and the backward pass, consist of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, mac = dict(kwargs or {}), any(map(on_mac, tree_leaves((args, kwargs))))
        if kwargs.get("device") is not None:
            mac, kwargs["device"] = kwargs["device"].type == "mps", torch.device("cpu")
        out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
        if out is not None and func._schema.name.endswith("_") and args:
            return args[0]  # in place
        return tree_map(lambda x: OnMac(x) if isinstance(x, torch.Tensor) else x, out) if mac else out


def on_mac(x):
    return isinstance(x, OnMac)


def inner(x):
    return x.inner if on_mac(x) else x


@contextlib.contextmanager
def standing_in():
    """As if this computer was a Mac."""
    with pytest.MonkeyPatch.context() as patch, Moves(), Mac():
        patch.setattr(torch, "Generator", MacGenerator)
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of documents."""
    folder, rng = tmp_path_factory.mktemp("mac"), np.random.default_rng(0)
    for i in range(60):
        words = [f"w{i}{c}" for c in "abcdef"]
        (folder / f"{i}.txt").write_text("".join(" ".join(rng.choice(words, 6)) + ". " for _ in range(40)))
    prepare.prepare(inputs=sorted(folder.glob("*.txt")), tokenizer="char", out=folder / "data")
    return folder


def run(folder, name, *flags):
    """train.py with a small network; its log without what only tells of the machine."""
    small = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 8, "unique_tokens": 256,
             "eval_blocks": 16, "epochs": 1.5, "dtype": "float32", "lr": 0.01, "replace": 0.1}
    argv = [f"--{key}={value}" for key, value in small.items()]
    assert train.main([*argv, "--preset=laptop", f"--data={folder}/data", f"--out={folder}/{name}", *flags]) == 0
    log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in log[1:]]


def test_the_stand_in_refuses_what_the_device_refuses():
    with standing_in():
        x = torch.ones(3).to("mps")
        assert x.device == MPS and (x + 1).sum().item() == 6 and x.cpu().double().dtype == torch.float64
        for wrong in (lambda: x.double(), lambda: torch.zeros(3, dtype=torch.float64, device=MPS), x.numpy,
                      lambda: torch.ones(3).double().to("mps")):
            with pytest.raises(TypeError):
                wrong()
        for wrong in (lambda: x + torch.ones(3), lambda: torch.rand(3, device=MPS, generator=torch.Generator()),
                      lambda: torch.multinomial(torch.ones(3), 1, generator=torch.Generator(MPS))):
            with pytest.raises(RuntimeError):
                wrong()


def test_auto_takes_a_macs_gpu_and_says_so(monkeypatch):
    with standing_in():
        device, dtype, line = choose_device()
        assert (device, dtype) == (MPS, torch.float32) and line.startswith("device mps (PyTorch sees Apple's GPU)")
        assert choose_device("cpu")[0].type == "cpu"
        monkeypatch.setenv("WORLD_SIZE", "2")  # several processes, which it can not serve
        assert choose_device()[0].type == "cpu"
    monkeypatch.delenv("WORLD_SIZE")
    assert choose_device()[0].type in ("cpu", "cuda")


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_is_trained_evaluated_and_resumed(folder, capsys, objective, optimizer):
    flags, name = (f"--objective={objective}", f"--optimizer={optimizer}"), f"{objective}-{optimizer}"
    plain = run(folder, f"{name}-cpu", *flags, "--device=cpu")
    with standing_in():
        capsys.readouterr()
        log = run(folder, name, *flags)
        assert "PyTorch sees Apple's GPU" in capsys.readouterr().out
        assert train.main([f"--resume={folder}/{name}"]) == 0
    for a, b in zip(log, plain, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8, "eot": 1}])
def test_the_text_of_a_seed_is_that_of_a_cpu(how):
    ways = [("ar", {"use_cache": use_cache}) for use_cache in (True, False)]
    ways += [("diffusion", {"order": order, "steps": steps}) for order in ("random", "confidence", "left")
             for steps in (0, 3)]
    for objective, way in ways:
        write = sample_ar if objective == "ar" else sample_diffusion
        model, texts = tiny(objective, V=9, T=8).float(), []
        for there in (contextlib.nullcontext(), standing_in()):
            with there:
                model = model if not texts else model.to(MPS)
                ids = torch.zeros(3, 2, dtype=torch.long)  # texts are drawn on the CPU on every device
                texts += write(model, ids, 20, generator=torch.Generator().manual_seed(5), **way, **how)
        assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])


def test_sample_and_probe(folder, capsys):
    for objective in ("ar", "diffusion"):
        name = f"{objective}-sampled"
        run(folder, name, f"--objective={objective}", "--device=cpu", "--dropout=0.1")
        found = []
        for there, device in ((contextlib.nullcontext(), "cpu"), (standing_in(), "mps")):
            capsys.readouterr()
            with there:
                assert sample.main([f"--run={folder}/{name}", f"--device={device}"]) == 0
                assert probe.main([f"{folder}/{name}", "--orders=2", f"--device={device}", "--checkpoint=best"]) == 0
            *text, line = capsys.readouterr().out.splitlines()
            measured = json.loads(line)
            averaged = measured.pop("averaged")  # over masks of dropout, which a device draws in its own way
            found.append((text, {key: value for key, value in measured.items() if key != "command"}))
            assert len(averaged) == (64 if objective == "ar" else 0)
        assert found[0] == found[1]
