"""Average the weights of whole networks in one launch: any number of tensors, dtypes mixed.

    step = prepare_lookahead(averages, weights)
    step(decay)                          # averages <- lerp(averages, weights, 1 - decay), and back
    lookahead(averages, weights, decay)  # the same, if you need it only once
    mean(averages, networks)             # averages <- the mean of the networks, as in SWAP

Why: airbench94's weights and running statistics are 33 tensors, 4 MB in all. The published
Lookahead averages one tensor after another, in 66 launches. This takes one launch, which reads
averages and weights and writes both: 16 MB. The mean of W networks reads W networks and writes one.
torch.stack and mean also write W networks, and read them again.

How: a table on the device has a row for each block of 4,096 elements: the addresses of the block in
all lists, how many elements it has, and their dtype. We make the table once for the same tensors. A
program takes a row, computes in float32, and rounds once. If all addresses are multiples of 16
bytes and all tensors have a multiple of 8 elements, loads and stores are 16 bytes wide. A single
other tensor makes all of them narrow. The README.md in this folder has registers and instructions.

A bound, not a measurement: airbench94's 16 MB take 11 microseconds at 1.5 TB/s. The CPU takes
longer than that to check the tensors and to find the table, so prepare_lookahead does it once. We
have not timed a prepared step on a GPU.
"""
# ruff: noqa: N803 - a kernel's constants are in capitals, as in Triton's own tutorials

from __future__ import annotations

from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the _ref functions work without it
    triton = None

KINDS = (torch.float32, torch.float16, torch.bfloat16)  # the kernels use their numbers
BLOCK = 4096  # elements that a program averages
# torch's lerp is a fused multiply-add too: on a CPU by its source, on CUDA by nvcc's default. It
# rounds once less, and both ends stay exact, since the product is 0 there.
OPTIONS = {'num_warps': 8, 'enable_fp_fusion': True}


#### Plain torch ###################################################################################


def by_dtype(*lists):
    """Split lists of tensors into parts, such that the first list has one dtype in each part.

    torch._foreach is slow on mixed lists, and torch 2.9 and 2.10 copy into them wrongly.
    """
    parts = {}
    for tensors in zip(*lists):
        parts.setdefault(tensors[0].dtype, []).append(tensors)
    return [zip(*part) for part in parts.values()]


def lookahead_ref(averages, weights, decay):
    """lookahead in plain torch."""
    for some_averages, some_weights in by_dtype(averages, weights):
        torch._foreach_lerp_(some_averages, some_weights, 1 - decay)
        torch._foreach_copy_(some_weights, some_averages)


def mean_ref(averages, networks):
    """mean in plain torch."""
    first, *others = networks
    means = [weight.to(torch.float32, copy=True) for weight in first]
    for n, weights in enumerate(others, start=2):
        torch._foreach_lerp_(means, [weight.float() for weight in weights], 1 / n)
    for some_averages, some_means in by_dtype(averages, means):
        torch._foreach_copy_(some_averages, some_means)


#### Kernels #######################################################################################


def jit(function):
    """triton.jit, or without Triton the function itself, which nothing calls then."""
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
def _lerp_block(row, count, share, kind: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    mask = place < count
    averages = _pointer(tl.load(row), kind, ALIGNED)
    weights = _pointer(tl.load(row + 1), kind, ALIGNED)
    average = tl.load(averages + place, mask=mask).to(tl.float32)
    weight = tl.load(weights + place, mask=mask).to(tl.float32)
    result = _lerp(average, weight, share).to(kind)
    tl.store(averages + place, result, mask=mask)
    tl.store(weights + place, result, mask=mask)


@jit
def _lerp_kernel(table, share, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * 4
    count = tl.load(row + 2)
    kind = tl.load(row + 3)
    if ALIGNED:
        count = tl.multiple_of(count, 8)
    if kind == 0:
        _lerp_block(row, count, share, tl.float32, ALIGNED, BLOCK)
    elif kind == 1:
        _lerp_block(row, count, share, tl.float16, ALIGNED, BLOCK)
    else:
        _lerp_block(row, count, share, tl.bfloat16, ALIGNED, BLOCK)


@jit
def _mean_block(
    row,
    count,
    kind: tl.constexpr,
    NETWORKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    mask = place < count
    weights = _pointer(tl.load(row + 1), kind, ALIGNED)
    result = tl.load(weights + place, mask=mask).to(tl.float32)
    for n in range(1, NETWORKS):
        weights = _pointer(tl.load(row + 1 + n), kind, ALIGNED)
        weight = tl.load(weights + place, mask=mask).to(tl.float32)
        # On NVIDIA, Triton's plain division may be off by two units in the last place.
        share = tl.div_rn(1.0, tl.cast(n + 1, tl.float32))
        result = _lerp(result, weight, share)
    averages = _pointer(tl.load(row), kind, ALIGNED)
    tl.store(averages + place, result.to(kind), mask=mask)


@jit
def _mean_kernel(table, NETWORKS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * (NETWORKS + 3)
    count = tl.load(row + NETWORKS + 1)
    kind = tl.load(row + NETWORKS + 2)
    if ALIGNED:
        count = tl.multiple_of(count, 8)
    if kind == 0:
        _mean_block(row, count, tl.float32, NETWORKS, ALIGNED, BLOCK)
    elif kind == 1:
        _mean_block(row, count, tl.float16, NETWORKS, ALIGNED, BLOCK)
    else:
        _mean_block(row, count, tl.bfloat16, NETWORKS, ALIGNED, BLOCK)


#### Launchers #####################################################################################


if triton is None:
    DEVICE_TYPE = None
elif isinstance(_lerp_kernel, triton.JITFunction):
    DEVICE_TYPE = 'cuda'
else:  # Triton's interpreter
    DEVICE_TYPE = 'cpu'


def runs_on(device):
    """Whether the kernels run on `device`: a GPU, or the CPU with Triton's interpreter."""
    return device.type == DEVICE_TYPE


def have_one_layout(a, b):
    """Whether both tensors are dense, with their elements in the same order in memory."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if a.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout):
            return True
    return False


def check(averages, weights):
    """Raise ValueError, which names the tensor, unless the two lists match.

    Raise RuntimeError if the kernels cannot run on their device.
    """
    if len(averages) != len(weights):
        raise ValueError(f'lists of {len(averages)} and {len(weights)} tensors')
    if not averages:
        raise ValueError('there is no tensor to average')
    device = averages[0].device
    if not runs_on(device):
        raise RuntimeError('averaging needs Triton and a GPU, or TRITON_INTERPRET=1 at its import')
    for i, (a, b) in enumerate(zip(averages, weights)):
        if a.shape != b.shape:
            raise ValueError(f'tensor {i}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ')
        if a.dtype != b.dtype or a.dtype not in KINDS:
            raise ValueError(f'tensor {i}: {a.dtype} and {b.dtype}; must be equal, one of {KINDS}')
        if a.device != device or b.device != device:
            raise ValueError(f'tensor {i}: on {a.device} and {b.device}, tensor 0 is on {device}')
        if not have_one_layout(a, b):
            raise ValueError(f'tensor {i}: both must be contiguous, or both channels_last')


@lru_cache(maxsize=16)
def make_table(tensors, device):
    """Cut tensors into blocks of at most BLOCK elements.

    Args:
        tensors: a tuple for each: its addresses in all lists, its number of elements, its kind.

    Returns:
        int64 (blocks, columns) on the device; a row says the same about a block.
    """
    table = []
    for *addresses, count, kind in tensors:
        for first in range(0, count, BLOCK):
            offset = first * KINDS[kind].itemsize
            block = [address + offset for address in addresses]
            table.append([*block, min(BLOCK, count - first), kind])
    # We wait for this copy, once for the same tensors. A kernel writes through the addresses, and
    # torch frees their source right away: with non_blocking=True, only the driver would decide
    # whether it has been read by then.
    return torch.tensor(table, dtype=torch.int64, device=device)


class Launcher:
    """Runs a kernel on every block of matching lists of tensors; it writes to the first list.

    It does everything but the launch here, once. A call passes its arguments on to the kernel.
    """

    def __init__(self, kernel, lists, **constants):
        tensors = []
        is_aligned = True
        for same in zip(*lists):  # the tensors at one place in all lists
            addresses = [tensor.data_ptr() for tensor in same]
            count = same[0].numel()
            tensors.append((*addresses, count, KINDS.index(same[0].dtype)))
            if count % 8 != 0 or any(address % 16 != 0 for address in addresses):
                is_aligned = False
        self.table = make_table(tuple(tensors), lists[0][0].device)
        # The kernel writes to these addresses as long as this object is in use. detach() keeps the
        # memory there, even if a tensor moves, as the weights do in net.to(...).
        self.memory = [tensor.detach() for tensors in lists for tensor in tensors]
        self.blocks = len(self.table)
        self.kernel = kernel[(self.blocks,)]
        self.constants = {**constants, 'ALIGNED': is_aligned, 'BLOCK': BLOCK, **OPTIONS}

    @torch.compiler.disable  # it would not see what a kernel writes to by addresses
    def __call__(self, *args):
        if self.blocks == 0:  # all tensors are empty
            return
        with torch.cuda.device_of(self.table):  # Triton launches on the current device
            self.kernel(self.table, *args, **self.constants)


def prepare_lookahead(averages, weights):
    """Return step(decay), which does what lookahead(averages, weights, decay) does.

    We check the tensors here, once, so a step only launches the kernel. It works in the memory that
    the tensors have now. If they move, as the weights do in net.to(...), prepare it again.

    Raises the same errors as `lookahead`.
    """
    averages = list(averages)
    weights = list(weights)
    check(averages, weights)
    launch = Launcher(_lerp_kernel, [averages, weights])

    def step(decay):
        launch(float(1 - decay))

    return step


def lookahead(averages, weights, decay):
    """averages <- lerp(averages, weights, 1 - decay); then copy averages into weights.

    Both are lists of tensors that change in place. They may mix float32, float16 and bfloat16.

    Raises ValueError, which names the tensor, if they do not match in shape, dtype, device and
    memory layout (contiguous or channels_last), and RuntimeError without Triton or without a GPU.
    """
    step = prepare_lookahead(averages, weights)
    step(decay)


def mean(averages, networks):
    """averages <- the mean of the networks, a list of lists of tensors, computed in float32.

    Triton compiles it once for each number of networks.

    Raises the same errors as `lookahead`, and ValueError if there is no network.
    """
    averages = list(averages)
    networks = [list(weights) for weights in networks]
    if not networks:
        raise ValueError('there is no network to average')
    for weights in networks:
        check(averages, weights)
    launch = Launcher(_mean_kernel, [averages, *networks], NETWORKS=len(networks))
    launch()
