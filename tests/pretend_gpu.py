"""A GPU that is not there: runs code for device "cuda" on the CPU, refuses what CUDA refuses, and counts.

    with pretend_gpu(allowed={"log"}) as gpu:              # elsewhere a wait for the device raises Refused
        with gpu.phase("forward"):
            y = model.to("cuda")(x.to("cuda", non_blocking=True))
    gpu.launches, gpu.copies, gpu.waits, gpu.collectives   # Counters of (phase, what, "file.py:line")

A Pretend tensor holds a CPU tensor, says that it is on cuda:0, and runs every operation of ATen on what it
holds. C++ sees CPU tensors, so autograd, foreach, autocast (as the CPU's), DataLoader, torch.save and gloo
work. DistributedDataParallel, NCCL, streams, kernels' own limits, times and memory do not exist here. A
launch is one operation of ATen that is no view; of operations over lists one for every 48 tensors.
"""

import contextlib
import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from common import multicrop

ROOT = str(Path(__file__).parents[1])
# the host waits: it needs a value, or the size of the result
WAITS = """_local_scalar_dense nonzero masked_select _unique2 equal bincount linalg_eigh _linalg_eigh
    repeat_interleave""".split()
# take no scalar on the CPU beside a tensor on the GPU
STRICT = """cat stack mm addmm bmm baddbmm convolution gather scatter scatter_add scatter_reduce index_select
    index_add""".split()
FREE = """detach alias view _unsafe_view _reshape_alias empty empty_like new_empty empty_strided lift_fresh
    _local_scalar_dense""".split()
HERE = None  # the Gpu in whose context we are


class Refused(RuntimeError):
    """Real CUDA raises here, too; or the host would wait for the device where that is not allowed."""


class Pretend(torch.Tensor):
    """A CPU tensor, `inner`, that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", 0))
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, inner):
        how = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        with torch.inference_mode(False):  # the shell is no inference tensor: those count no versions
            self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="cpu", **how)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, func._schema
        HERE.check(func, args, kwargs)
        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if func.namespace == "aten" and any(r.alias_info and r.alias_info.is_write for r in schema.returns):
            given = {a.name: value for a, value in zip(schema.arguments, args)} | kwargs
            written = [given[a.name] for a in schema.arguments
                       if a.name in given and a.alias_info and a.alias_info.is_write]
            if any(isinstance(w, Pretend) and w.shape != w.inner.shape for w in written):
                with torch._C._DisableTorchDispatch():  # unsqueeze_ and its like: the shell's shape, too
                    func(*args, **kwargs)
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(lambda t: Pretend(t) if type(t) is torch.Tensor else t, out)

    def numpy(self, *unused, **also):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def to(self, *args, **kwargs):
        return HERE.move(self, *args, **kwargs)

    def cpu(self):
        return HERE.move(self, "cpu")

    def tolist(self):
        HERE.wait("tolist")
        return self.inner.tolist()

    def __reduce_ex__(self, protocol):  # as torch.load(map_location="cpu") gives it
        return self.inner.detach().__reduce_ex__(protocol)


def unwrap(t):
    return t.inner if isinstance(t, Pretend) else t


class Gpu(TorchFunctionMode):
    """The counters, and what stands between Python and the device: factories, copies, generators."""

    def __init__(self, allowed=None):
        self.allowed, self.now, self.pinned = allowed, "elsewhere", {}
        self.launches, self.waits, self.copies, self.collectives = (Counter() for _ in range(4))

    def phase(self, name):
        return mock.patch.object(self, "now", name)

    def of(self, counter, phase):
        """Everything that was counted in a phase."""
        return sum(n for (name, *_), n in counter.items() if name == phase)

    def place(self):
        """The innermost line of the project's."""
        frame = sys._getframe(2)
        while frame:
            name = frame.f_code.co_filename
            if name.startswith(ROOT) and name != __file__ and "site-packages" not in name:
                return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
            frame = frame.f_back
        return "?"

    def wait(self, what):
        place = self.place()
        self.waits[self.now, what, place] += 1
        if self.allowed is not None and self.now not in self.allowed:
            raise Refused(f"the host waits for the GPU: {what} at {place} in {self.now}")

    def launch(self, name, number=1):
        self.launches[self.now, name, self.place()] += number

    def copied(self, to_device, source, non_blocking, dtype=None):
        pinned = source.untyped_storage().data_ptr() in self.pinned and dtype in (None, source.dtype)
        what = ("to the device" if to_device else "to the host") + " pageable" * (to_device and not pinned)
        self.copies[self.now, what, self.place()] += 1
        self.launch("copy")
        if not non_blocking:
            self.wait(f"copy {what}")

    def check(self, func, args, kwargs):
        """Raises what CUDA raises for mixed devices; counts launches, and the wait if there is one."""
        name, flat = func._schema.name.partition("::")[2].rstrip("_"), tree_flatten((args, kwargs))[0]
        host = [t for t in flat if type(t) is torch.Tensor]
        if func.namespace != "aten":
            self.collectives[self.now, name, self.place()] += 1
        if any(isinstance(a, torch.Generator) for a in flat):
            raise Refused(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
        if name == "copy" and isinstance(args[0], Pretend) != isinstance(args[1], Pretend):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return self.copied(isinstance(args[0], Pretend), unwrap(args[1]), non_blocking, args[0].dtype)
        if name in ("index", "index_put", "_index_put_impl"):  # ATen moves indices that are on the CPU
            indices = [i for i in args[1] if i is not None]
            values = args[2] if name != "index" else None
            if not isinstance(args[0], Pretend) or (type(values) is torch.Tensor and values.dim()):
                raise Refused(f"{func}: expected indices, self and values on one device")
            for index in indices:
                if not isinstance(index, Pretend):
                    self.copied(True, index, False)
                elif index.dtype == torch.bool and (values is None or values.numel() > 1 or len(indices) > 1):
                    self.wait("boolean mask")  # else it is masked_fill
        elif any(t.dim() or name in STRICT or (t is args[0] and func._schema.is_mutable) for t in host):
            raise Refused(f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        if name in WAITS:
            self.wait(name.strip("_"))
        if name.startswith("_foreach"):
            self.launch(*foreach_launches(name, args))
        elif not (func.is_view or name in FREE):
            self.launch(name)

    def move(self, x, *args, copy=False, **kwargs):
        """Tensor.to"""
        other = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.pop("other", None)
        args = args if other is None else (other.device, other.dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        here = isinstance(x, Pretend)
        there = here if device is None else device.type == "cuda"
        how = {} if layout is None else {"memory_format": layout}
        if here == there:
            return torch.Tensor.to(x, dtype or x.dtype, copy=copy, **how)
        assert not (x.requires_grad and torch.is_grad_enabled()), "gradients do not cross devices here"
        self.copied(there, unwrap(x), non_blocking, dtype)
        moved = unwrap(x).detach().to(dtype or x.dtype, copy=True, **how)
        return Pretend(moved) if there else moved

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return self.move(*args, **kwargs)
        if func is torch.Tensor.backward:  # its own calls, and those of autograd.Functions, are to come here
            with self, self.phase("backward"):
                return torch.autograd.backward(args[0], kwargs.pop("gradient", None), **kwargs)
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            self.pinned[pinned.untyped_storage().data_ptr()] = pinned
            return pinned
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        wanted = torch.device(kwargs["device"]).type == "cuda"
        if wanted and kwargs.get("generator") is not None:
            raise Refused(f"{func.__name__}: Expected a 'cuda' device type for generator but found 'cpu'")
        out = func(*args, **{**kwargs, "device": "cpu"})
        if not wanted or isinstance(out, Pretend):
            return out if wanted else unwrap(out)
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):  # made on the host
            self.copied(True, out, False)
        elif "empty" not in func.__name__:
            self.launch(func.__name__)
        return Pretend(out)


def foreach_launches(name, args):
    """Name and launches of an operation over lists of tensors, which is one by one where layouts differ."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and isinstance(a[0], torch.Tensor)]
    layouts = ({(t.shape, t.dtype, *(n for s, n in zip(t.shape, t.stride()) if s > 1)) for t in tensors}
               for tensors in zip(*lists))
    if any(len(different) > 1 for different in layouts):
        return f"{name} one by one", len(lists[0])
    return name, math.ceil(len(lists[0]) / 48) * (3 if "norm" in name else 1)


@contextlib.contextmanager
def pretend_gpu(allowed=None):
    """See above. allowed: the phases in which the host may wait for the device; None: all."""
    gpu, to, autocast = Gpu(allowed), torch.nn.Module.to, torch.autocast.__init__

    def module_to(self, *args, **kwargs):  # its parameters become another class of tensors
        swap = mock.patch.object(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
        with swap:
            return to(self, *args, **kwargs)

    values = dict(is_available=True, device_count=1, current_device=0, is_bf16_supported=True,
                  is_current_stream_capturing=False, get_device_capability=(9, 0), set_device=None,
                  manual_seed_all=None, empty_cache=None, max_memory_allocated=0,
                  reset_peak_memory_stats=None)
    patches = [(torch.cuda, name, lambda *a, value=value, **k: value) for name, value in values.items()]
    patches += [(torch.cuda, "synchronize", lambda *a: gpu.wait("synchronize")),
                (torch.accelerator, "is_available", lambda: True), (torch.nn.Module, "to", module_to),
                (torch.autocast, "__init__", lambda self, _, *a, **k: autocast(self, "cpu", *a, **k)),
                (sys.modules[__name__], "HERE", gpu)]
    for module in map(sys.modules.get, ("torch.utils._foreach_utils", "torch.optim.optimizer")):
        kinds = [*module._foreach_supported_types, Pretend]
        patches.append((module, "_foreach_supported_types", kinds))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        multicrop._constant.cache_clear()
        stack.callback(multicrop._constant.cache_clear)
        yield stack.enter_context(gpu)
