"""Function calls that can be made again for the partners' targets, and what is known of functions by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "Expression",
    "RandomState",
    "is_by_row",
    "is_in_place",
    "is_independent",
    "is_linear",
    "is_network",
    "is_random",
    "keeps_rows",
    "memory_of",
]

_VIEWS = frozenset(
    """
    view reshape flatten unflatten squeeze unsqueeze permute transpose movedim expand ravel t chunk split unbind narrow
    select __getitem__ __get__ detach view_as swapaxes
    """.split()
)
# Layers of networks. Row i of the result depends on row i of the input, and on parameters.
_LAYERS = frozenset(
    """
    linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding embedding_bag
    batch_norm layer_norm group_norm instance_norm rms_norm multi_head_attention_forward scaled_dot_product_attention
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell
    """.split()
)
_PRODUCTS = frozenset(
    {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "__matmul__", "__rmatmul__", "mv"}
)
_NOISE = frozenset(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout rrelu gumbel_softmax
    """.split()
)
_RANDOM = _NOISE | frozenset(
    """
    bernoulli multinomial normal poisson binomial
    bernoulli_ normal_ uniform_ random_ exponential_ cauchy_ log_normal_ geometric_
    """.split()
)
_LINEAR = frozenset(
    """
    add sub neg sum mean __add__ __radd__ __sub__ __rsub__ __neg__ rsub negative positive __pos__
    view reshape flatten squeeze unsqueeze permute transpose movedim expand contiguous clone detach ravel to type
    float double half bfloat16 cpu cuda stack cat chunk split unbind select narrow index_select
    add_ sub_ copy_ __iadd__ __isub__ index_add_ fill_
    """.split()
)
_SCALING = frozenset(
    {"mul_", "div_", "mul", "div", "true_divide", "multiply", "divide", "__mul__", "__rmul__", "__truediv__"}
)
_REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "logsumexp", "norm", "prod", "argmax", "argmin", "any", "all"})
_ALONG = frozenset({"softmax", "log_softmax", "cumsum", "gather", "normalize"})
_ROW_BY_ROW = frozenset(
    """
    add sub mul div neg pow sqrt square abs exp log log1p clamp clamp_min clamp_max maximum minimum where lerp sign
    cosh sinh sin cos tan atan erf expm1 log2 log10 rsqrt elu gelu silu mish hardtanh softsign logit round floor ceil
    nan_to_num logaddexp hypot sigmoid logsigmoid tanh relu softplus leaky_relu xlogy rsub true_divide
    floor_divide remainder reciprocal
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __mod__ __pow__ __neg__
    eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ logical_not logical_and logical_or logical_xor
    __and__ __or__ __xor__ __invert__ masked_fill isnan isfinite
    view reshape flatten unflatten squeeze unsqueeze contiguous clone detach expand
    to type type_as long int short float double half bfloat16 bool cpu cuda one_hot dropout
    """.split()
)
_IN_PLACE_OPERATORS = frozenset(
    """
    __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    """.split()
)


class Expression:
    """A call whose operands may be pairs, kept to be made again with their other halves."""

    def __init__(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
    ) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = getattr(func, "__name__", str(func))
        self.tensors = tuple(tensors)
        self.versions = [_version(tensor) for tensor in tensors]
        self.has_grad = torch.is_grad_enabled()

    def evaluate(self, side: Callable[[Any], Tensor]) -> list[Tensor]:
        """The tensors that the call returns for one side of its pairs; ``side`` gives it for any tensor.

        Raises:
            RuntimeError: If an operand was changed in place meanwhile.
        """
        if [_version(tensor) for tensor in self.tensors] != self.versions and self.name not in _VIEWS:
            raise RuntimeError(
                f"An operand of '{self.name}', which was computed from the batch's targets, was changed in place "
                "before the loss was computed, so the partners' targets cannot be followed. Change a copy instead."
            )
        with torch.set_grad_enabled(self.has_grad), torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(Tensor, side, (self.args, self.kwargs))
            return [leaf for leaf in tree_leaves(self.func(*args, **kwargs)) if isinstance(leaf, Tensor)]

    def reads(self, tensor: Tensor) -> bool:
        """Whether an operand shares its memory with ``tensor``."""
        memory = memory_of(tensor)
        return any(memory_of(operand.__dict__.get("value", operand)) == memory for operand in self.tensors)


class RandomState:
    """The global random state before a call, to make the call again with the same noise and leave no trace."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers, and put the state back."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def is_independent(name: str) -> bool:
    """Whether the result has nothing of the operand but its shape, type and device."""
    return name.endswith("_like") or name.startswith("new_")


def is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether the function of this name changes its first argument, or ``out``."""
    return name in _IN_PLACE_OPERATORS or (name[-1] == "_" and name[-2:] != "__") or kwargs.get("out") is not None


def is_network(name: str, plain: Sequence[Tensor]) -> bool:
    """Whether the function is a layer of a network that is trained, where ``plain`` are the operands beside pairs."""
    if name in _LAYERS:
        return any(tensor.requires_grad for tensor in plain)
    return name in _PRODUCTS and any(tensor.is_leaf and tensor.requires_grad for tensor in plain)


def is_by_row(name: str) -> bool:
    """Whether the partners' result is best taken from the result's rows: frozen layers, and one draw of noise."""
    return name in _LAYERS or name in _NOISE


def is_random(name: str) -> bool:
    """Whether the function draws random numbers that would differ between two calls."""
    return name in _RANDOM


def is_linear(name: str, pairs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the function is affine in all pairs together."""
    if kwargs.get("rounding_mode") is not None:
        return False
    if name in ("__getitem__", "__setitem__"):
        return len(pairs) == 1 and (args[0] is pairs[0] or args[-1] is pairs[0])  # not where a pair is the index
    if name in _SCALING:
        return len(pairs) == 1 and (args[0] is pairs[0] or "mul" in name)
    return name in _LINEAR


def keeps_rows(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, batch_size: int) -> bool:
    """Whether row i of the result is row i of the operands. Only of functions that are known to."""
    if result.dim() == 0 or result.shape[0] != batch_size:
        return False
    if name == "__get__":  # .data, but not .T
        return result.stride() == args[0].__dict__.get("value", args[0]).stride()
    if name == "__getitem__":
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        if isinstance(index, Tensor):
            return index.dim() == 1 and torch.equal(index, torch.arange(batch_size, device=index.device))
        return index is Ellipsis or index in (slice(None), range(batch_size))
    if name in _REDUCTIONS or name in _ALONG:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = dim if isinstance(dim, (tuple, list)) else (dim,)
        # The last dimension of two or more is not the batch's; a result of one dimension may have been the rows of two.
        return all(isinstance(d, int) and d != 0 and d + max(result.dim(), 2) != 0 for d in dims)
    return name in _ROW_BY_ROW or name.endswith("_loss") or "cross_entropy" in name or name == "kl_div"


def memory_of(tensor: Tensor) -> int | None:
    """Where the tensor's memory begins; None where it has none."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a sharded tensor, or the compiler's
        return None


def _version(tensor: Tensor) -> int:
    plain = tensor.__dict__.get("value", tensor)
    return 0 if plain.is_inference() else plain._version
