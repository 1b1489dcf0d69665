"""Averages of whole networks' weights in one launch, for any number of tensors and mix of dtypes.

    lookahead(averages, weights, decay)  # averages <- lerp(averages, weights, 1 - decay), and back
    running_mean(averages, weights, n)   # averages += (weights - averages) / (n + 1), SWA's
    mean(averages, networks)             # averages <- the mean of the networks, SWAP's

Why: airbench94's weights and running statistics are 33 tensors, 4 MB in all. The published
Lookahead averages them one by one, in 66 launches. Here it is one launch, which reads averages and
weights and writes both: 16 MB. The mean of W networks reads W networks and writes one; torch.stack
and mean write W networks more, and read them again.

How: a table on the device, made once for the same tensors, has a row for each block of 4,096
elements: the addresses of the block in all lists, how many elements it has, and their dtype. A
program takes a row, computes in float32, and rounds once. Where all addresses are multiples of 16
bytes and all tensors have a multiple of 8 elements, loads and stores are 16 bytes wide. One tensor
that is otherwise makes all of them narrow. README.md beside this file has registers and
instructions.

A bound, not a measurement: airbench94's 16 MB take 11 microseconds at 1.5 TB/s. What a call takes
is the CPU's time, for the checks and for finding the table: 0.20 ms on an H200, where
torch._foreach takes 0.07 ms. Averaging eight networks takes 0.61 ms there, and 1.22 ms by torch.
"""
# ruff: noqa: N803 - the constants of a kernel are in capitals, as in Triton's own tutorials

from __future__ import annotations

from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the functions called _ref work without it
    triton = None

KINDS = (torch.float32, torch.float16, torch.bfloat16)  # as the kernels number them
BLOCK = 4096  # elements of a program
# torch's lerp is a fused multiply-add, on the CPU by its source and on CUDA by nvcc's default. It
# rounds once less, and both ends stay exact, as the product is then 0.
OPTIONS = {'num_warps': 8, 'enable_fp_fusion': True}


#### Plain torch ###################################################################################


def by_dtype(tensors):
    """Lists of tensors of one dtype: of a mixed list torch._foreach takes one after another."""
    groups = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups.values()


def lookahead_ref(averages, weights, decay):
    """lookahead in plain torch."""
    for some_averages, some_weights in zip(by_dtype(averages), by_dtype(weights)):
        torch._foreach_lerp_(some_averages, some_weights, 1 - decay)
        torch._foreach_copy_(some_weights, some_averages)


def running_mean_ref(averages, weights, n):
    """running_mean in plain torch."""
    for some_averages, some_weights in zip(by_dtype(averages), by_dtype(weights)):
        torch._foreach_lerp_(some_averages, some_weights, 1 / (n + 1))


def mean_ref(averages, networks):
    """mean in plain torch."""
    first, *others = networks
    total = [weight.to(torch.float32, copy=True) for weight in first]
    for n, weights in enumerate(others, start=1):
        running_mean_ref(total, [weight.float() for weight in weights], n)
    torch._foreach_copy_(averages, total)


#### Kernels #######################################################################################


def jit(function):
    """triton.jit; without Triton the function itself, which nothing calls then."""
    return triton.jit(function) if triton else function


@jit
def _lerp(start, end, share):
    """torch.lerp's formula, which gives both ends exactly."""
    step = end - start
    return tl.where(share < 0.5, start + share * step, end - step * (1 - share))


@jit
def _pointer(address, kind: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(kind))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _lerp_block(
    row,
    count,
    share,
    kind: tl.constexpr,
    COPY_BACK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    mask = place < count
    averages = _pointer(tl.load(row), kind, ALIGNED)
    weights = _pointer(tl.load(row + 1), kind, ALIGNED)
    average = tl.load(averages + place, mask=mask).to(tl.float32)
    weight = tl.load(weights + place, mask=mask).to(tl.float32)
    result = _lerp(average, weight, share).to(kind)
    tl.store(averages + place, result, mask=mask)
    if COPY_BACK:
        tl.store(weights + place, result, mask=mask)


@jit
def _lerp_kernel(table, share, COPY_BACK: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * 4
    count = tl.load(row + 2)
    kind = tl.load(row + 3)
    if ALIGNED:
        count = tl.multiple_of(count, 8)
    if kind == 0:
        _lerp_block(row, count, share, tl.float32, COPY_BACK, ALIGNED, BLOCK)
    elif kind == 1:
        _lerp_block(row, count, share, tl.float16, COPY_BACK, ALIGNED, BLOCK)
    else:
        _lerp_block(row, count, share, tl.bfloat16, COPY_BACK, ALIGNED, BLOCK)


@jit
def _mean_block(
    row, networks, count, kind: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.arange(0, BLOCK)
    mask = place < count
    weights = _pointer(tl.load(row + 1), kind, ALIGNED)
    result = tl.load(weights + place, mask=mask).to(tl.float32)
    for n in range(1, networks):
        weights = _pointer(tl.load(row + 1 + n), kind, ALIGNED)
        weight = tl.load(weights + place, mask=mask).to(tl.float32)
        result = _lerp(result, weight, 1.0 / (n + 1))
    averages = _pointer(tl.load(row), kind, ALIGNED)
    tl.store(averages + place, result.to(kind), mask=mask)


@jit
def _mean_kernel(table, networks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * (networks + 3)
    count = tl.load(row + networks + 1)
    kind = tl.load(row + networks + 2)
    if ALIGNED:
        count = tl.multiple_of(count, 8)
    if kind == 0:
        _mean_block(row, networks, count, tl.float32, ALIGNED, BLOCK)
    elif kind == 1:
        _mean_block(row, networks, count, tl.float16, ALIGNED, BLOCK)
    else:
        _mean_block(row, networks, count, tl.bfloat16, ALIGNED, BLOCK)


#### Launchers #####################################################################################


def runs_on(device):
    """Whether the kernels run there: on a GPU, or on the CPU by Triton's interpreter."""
    if triton is None:
        return False
    is_compiled = isinstance(_lerp_kernel, triton.JITFunction)
    return device.type == ('cuda' if is_compiled else 'cpu')


def have_one_layout(a, b):
    """Whether equal places in memory are equal places in the tensors, without gaps."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if a.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout):
            return True
    return False


def check(averages, weights):
    """Raise ValueError, which names the tensor, unless the two lists match.

    Raises RuntimeError where the kernels cannot run.
    """
    if triton is None or (averages and not runs_on(averages[0].device)):
        raise RuntimeError('averaging needs Triton and a GPU, or TRITON_INTERPRET=1 at its import')
    if len(averages) != len(weights):
        raise ValueError(f'lists of {len(averages)} and {len(weights)} tensors')
    for i, (a, b) in enumerate(zip(averages, weights)):
        if a.shape != b.shape:
            raise ValueError(f'tensor {i}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ')
        if a.dtype != b.dtype or a.dtype not in KINDS:
            raise ValueError(f'tensor {i}: {a.dtype} and {b.dtype}; must be equal, one of {KINDS}')
        device = averages[0].device
        if a.device != device or b.device != device:
            raise ValueError(f'tensor {i}: on {a.device} and {b.device}, tensor 0 is on {device}')
        if not have_one_layout(a, b):
            raise ValueError(f'tensor {i}: both must be contiguous, or both channels_last')


@lru_cache(maxsize=16)
def make_table(tensors, device):
    """Cut tensors into blocks of at most BLOCK elements.

    Args:
        tensors: for each, a tuple of its addresses in all lists, its elements and its kind.

    Returns:
        int64 (blocks, columns) on the device; a row has the same of a block.
    """
    table = []
    for *addresses, count, kind in tensors:
        for first in range(0, count, BLOCK):
            offset = first * KINDS[kind].itemsize
            block = [address + offset for address in addresses]
            table.append([*block, min(BLOCK, count - first), kind])
    # This copy waits, once for the same tensors. A kernel writes through the addresses, and torch
    # frees their source at once: with non_blocking=True, the driver alone would decide whether it
    # has been read by then.
    return torch.tensor(table, dtype=torch.int64, device=device)


def launch(kernel, lists, *args, **constants):
    """Run the kernel on every block of lists of tensors that match; it writes to the first list."""
    tensors = []
    is_aligned = True
    for same in zip(*lists):  # the tensor at one place of all lists
        addresses = [tensor.data_ptr() for tensor in same]
        count = same[0].numel()
        tensors.append((*addresses, count, KINDS.index(same[0].dtype)))
        if count % 8 != 0 or any(address % 16 != 0 for address in addresses):
            is_aligned = False
    first = lists[0][0]
    table = make_table(tuple(tensors), first.device)
    if len(table) == 0:
        return
    with torch.cuda.device_of(first):  # Triton launches on the current device
        kernel[(len(table),)](table, *args, **constants, ALIGNED=is_aligned, BLOCK=BLOCK, **OPTIONS)


# Not in a CUDA graph: the table belongs to the addresses of one call.
UNSAFE = torch.Tag.cudagraph_unsafe


@torch.library.custom_op('airbench::lerp', mutates_args=('averages', 'weights'), tags=(UNSAFE,))
def _lerp_lists(
    averages: list[torch.Tensor], weights: list[torch.Tensor], share: float, copy_back: bool
) -> None:
    launch(_lerp_kernel, [averages, weights], share, COPY_BACK=copy_back)


@torch.library.custom_op('airbench::mean', mutates_args=('averages',), tags=(UNSAFE,))
def _mean_lists(averages: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    size = len(averages)
    networks = [weights[i : i + size] for i in range(0, len(weights), size)]
    launch(_mean_kernel, [averages, *networks], len(networks))


def lookahead(averages, weights, decay):
    """Let averages keep the share `decay` of themselves and take the rest from weights.

    Then copy them to weights. Both are lists of tensors, float32, float16 and bfloat16 mixed, and
    are changed in place.

    Raises ValueError, which names the tensor, if they do not match in shape, dtype, device and
    memory layout (contiguous, or channels_last), and RuntimeError where Triton or a GPU is missing.
    """
    averages = list(averages)
    weights = list(weights)
    check(averages, weights)
    if averages:
        _lerp_lists(averages, weights, 1 - decay, True)


def running_mean(averages, weights, n):
    """Turn averages, the mean of n networks, into the mean of them and weights.

    Lists and errors are as for lookahead; weights are not changed.
    """
    averages = list(averages)
    weights = list(weights)
    check(averages, weights)
    if averages:
        _lerp_lists(averages, weights, 1 / (n + 1), False)


def mean(averages, networks):
    """Overwrite averages with the mean of the networks, a list of lists, summed in float32.

    Errors are as for lookahead, and ValueError if there is no network.
    """
    averages = list(averages)
    networks = [list(weights) for weights in networks]
    if not networks:
        raise ValueError('there is no network to average')
    for weights in networks:
        check(averages, weights)
    if averages:
        _mean_lists(averages, [weight for weights in networks for weight in weights])
