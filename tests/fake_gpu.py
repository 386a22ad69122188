"""A GPU that is not there: the numbers are the CPU's, the rules about devices a GPU's.

Of every storage it is noted whether it is claimed to lie on the GPU. What mixes devices as CUDA
would not allow raises, in the backward pass and the optimizer, too; what would wait for the GPU is
counted. Kernels that wait by themselves are seen only as far as WAITS names them.
"""

import os
from collections import Counter
from traceback import walk_stack

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CPU = torch.device("cpu")
GPU = torch.device("cuda:0")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
WAITS |= {aten._unique2.default, aten.bincount.default, aten.equal.default}


class WrongDeviceError(RuntimeError):
    """What CUDA would raise."""


class Claims:
    """Which storages are claimed to lie on the GPU."""

    def __init__(self) -> None:
        self.storages: dict[int, StorageWeakRef] = {}  # by address, which may be used again

    def __contains__(self, tensor: Tensor) -> bool:
        storage = self.storages.get(tensor.untyped_storage()._cdata)
        return storage is not None and not storage.expired()

    def put(self, tensor: Tensor, on_gpu: bool) -> Tensor:
        storage = tensor.untyped_storage()
        if on_gpu:
            self.storages[storage._cdata] = StorageWeakRef(storage)
        else:
            self.storages.pop(storage._cdata, None)
        return tensor


class Operations(TorchDispatchMode):
    """Check each operation's devices; what it returns lies where its tensors do."""

    def __init__(self) -> None:
        super().__init__()
        self.claims = Claims()
        self.waits: Counter[str] = Counter()  # by the functions of ours that wait, and for what

    def note_wait(self, what: object) -> None:
        codes = [frame.f_code for frame, _ in walk_stack(None)]
        ours = [code.co_name for code in codes if os.path.dirname(code.co_filename) == ROOT]
        self.waits[f"{' > '.join(reversed(ours))}: {what}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x in self.claims for x in tensors)
        if on_gpu:
            if func not in COPIES:
                self.check(func, args, tensors)
            masks = [x for x in tensors[1:] if func in INDEXING and x.dtype == torch.bool]
            if func in WAITS or masks:
                self.note_wait(func)
        storages = {x.untyped_storage()._cdata for x in tensors}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in storages:
                self.claims.put(x, on_gpu)
        return result

    def check(self, func: object, args: tuple, tensors: list[Tensor]) -> None:
        """Raise if a tensor is on the CPU, but for a lone number, or an index, which is copied."""
        strays = [x for x in tensors if x not in self.claims]
        if func in INDEXING:
            if strays:
                self.note_wait(f"{func}, an index copied")
            strays = [x for x in (args[0], *args[2:3]) if x not in self.claims]
        if any(x.dim() > 0 or "_fused_" in str(func) for x in strays):
            raise WrongDeviceError(f"{func}: on the CPU: {[tuple(x.shape) for x in strays]}")


class Placement(TorchFunctionMode):
    """Answer and obey Python's words about devices."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self.claims = operations.claims

    def __torch_function__(self, func, types, args=(), kwargs=None) -> object:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if args[0] in self.claims else CPU
        if func is Tensor.__deepcopy__:  # it copies the storage past the dispatcher
            on_gpu = args[0] in self.claims
            result = func(*args, **kwargs)
            self.claims.put(args[0], on_gpu)
            return self.claims.put(result, on_gpu)
        if func is Tensor.cpu:
            return self.move(args[0], CPU)
        if func is Tensor.to:
            return self.convert(*args, **kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = torch.device(kwargs.pop("device"))
        return self.claims.put(func(*args, **kwargs, device=CPU), device.type == "cuda")

    def convert(self, tensor: Tensor, *args: object, device: object = None, **kwargs: object):
        dtypes = [x for x in args if isinstance(x, torch.dtype)]
        for x in args:
            if isinstance(x, (str, torch.device)):
                device = x
        result = tensor.to(*dtypes, **kwargs) if dtypes or kwargs else tensor
        return result if device is None else self.move(result, torch.device(device))

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        to_gpu = device.type == "cuda"
        if (tensor in self.claims) == to_gpu:
            return tensor
        if not to_gpu:
            self.operations.note_wait("to the CPU")
        return self.claims.put(tensor.clone(), to_gpu)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Let there be one GPU, with bfloat16, on which torch.compile compiles nothing."""
    load = torch.load
    autocast = torch.autocast
    operations = Operations()

    def load_to(file, map_location="cpu", **how):
        content = load(file, map_location="cpu", **how)
        on_gpu = torch.device(map_location).type == "cuda"
        return tree_map_only(Tensor, lambda x: operations.claims.put(x, on_gpu), content)

    monkeypatch.setattr(torch, "load", load_to)
    monkeypatch.setattr(torch, "autocast", lambda _, *how, **more: autocast("cpu", *how, **more))
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
    optimizer = torch.optim.Optimizer  # asks the driver about CUDA graphs
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(optimizer, name, lambda self: None, raising=False)
    with operations, Placement(operations):
        yield operations
