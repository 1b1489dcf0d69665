"""Averages of whole networks' weights in one launch, for any number of tensors and mix of precisions.

    lookahead(averages, weights, decay)     # averages <- lerp(averages, weights, 1 - decay); weights <- averages
    mean(averages, networks)                # averages <- the mean of the networks (SWAP, phase 3)
    running_mean(averages, weights, n)      # averages += (weights - averages) / (n + 1) (SWA), after n others
    python kernels/weight_average.py        # the benchmark: on a GPU if there is one

Why: airbench94's weights and running statistics are 33 tensors of 4 MB in all. Averaging them one by one, as the
published Lookahead does, is 66 launches of microseconds each. Here it is one: it reads averages and weights and writes
both, 16 MB. SWAP's mean of W networks reads W networks and writes one; torch.stack and mean write W networks more.

How: a table on the device, made once for the same tensors, has a row for each block of 4,096 elements: the block's
addresses in all lists, its length, and its precision. A program takes a row, computes in float32, and rounds once.
Where all addresses are multiples of 16 bytes and all lengths of 8, loads and stores are 16 bytes wide; one tensor that
is otherwise makes all of them narrow. Compiled for an A100 (see tests/machine_code.py): 32 registers (mean: 40), 416
instructions a thread for 16 elements, of which a block's precision takes a third; no spills.

A bound, not a measurement: airbench94's 16 MB take 11 microseconds at 1.5 TB/s. No GPU has run this yet. Measured, on
a core of an AMD EPYC: checks, table look-up and operator take 0.2 ms of the CPU's time a call, before any launch.
"""
from __future__ import annotations

import statistics
import time
from functools import lru_cache, partial

import torch

try:
    import triton
    import triton.language as tl
except ImportError:     # then the torch path is all there is
    triton = None

jit = triton.jit if triton else lambda function: function
KINDS = (torch.float32, torch.float16, torch.bfloat16)      # as the kernels number them
BLOCK, WARPS = 4096, 8     # elements and warps of a program


def lookahead_ref(averages, weights, decay):
    """lookahead in plain torch."""
    torch._foreach_lerp_(averages, weights, 1 - decay)
    torch._foreach_copy_(weights, averages)


def mean_ref(averages, networks):
    """mean in plain torch."""
    total = [v.to(torch.float32, copy=True) for v in networks[0]]
    for n, weights in enumerate(networks[1:], start=1):
        torch._foreach_lerp_(total, [v.float() for v in weights], 1 / (n + 1))
    torch._foreach_copy_(averages, total)


def running_mean_ref(averages, weights, n):
    """running_mean in plain torch."""
    torch._foreach_lerp_(averages, weights, 1 / (n + 1))


@jit
def _lerp(start, end, share):
    """torch.lerp's formula, which gives both ends exactly."""
    return tl.where(share < 0.5, start + share * (end - start), end - (end - start) * (1 - share))


@jit
def _load(address, place, mask, kind: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(kind))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + place, mask=mask).to(tl.float32)


@jit
def _store(address, place, mask, value, kind: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(kind))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + place, value.to(kind), mask=mask)


@jit
def _lerp_block(row, count, share, kind: tl.constexpr, COPY_BACK: tl.constexpr, ALIGNED: tl.constexpr,
                BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    mask = place < count
    average, weight = tl.load(row), tl.load(row + 1)
    value = _lerp(_load(average, place, mask, kind, ALIGNED), _load(weight, place, mask, kind, ALIGNED), share)
    _store(average, place, mask, value, kind, ALIGNED)
    if COPY_BACK:
        _store(weight, place, mask, value, kind, ALIGNED)


@jit
def _lerp_kernel(table, share, COPY_BACK: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * 4
    count, kind = tl.load(row + 2), tl.load(row + 3)
    if ALIGNED:
        count = tl.multiple_of(count, 8)
    if kind == 0:
        _lerp_block(row, count, share, tl.float32, COPY_BACK, ALIGNED, BLOCK)
    elif kind == 1:
        _lerp_block(row, count, share, tl.float16, COPY_BACK, ALIGNED, BLOCK)
    else:
        _lerp_block(row, count, share, tl.bfloat16, COPY_BACK, ALIGNED, BLOCK)


@jit
def _mean_block(row, networks, count, kind: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    mask = place < count
    value = _load(tl.load(row + 1), place, mask, kind, ALIGNED)
    for n in range(1, networks):
        value = _lerp(value, _load(tl.load(row + 1 + n), place, mask, kind, ALIGNED), 1.0 / (n + 1))
    _store(tl.load(row), place, mask, value, kind, ALIGNED)


@jit
def _mean_kernel(table, networks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * (networks + 3)
    count, kind = tl.load(row + networks + 1), tl.load(row + networks + 2)
    if ALIGNED:
        count = tl.multiple_of(count, 8)
    if kind == 0:
        _mean_block(row, networks, count, tl.float32, ALIGNED, BLOCK)
    elif kind == 1:
        _mean_block(row, networks, count, tl.float16, ALIGNED, BLOCK)
    else:
        _mean_block(row, networks, count, tl.bfloat16, ALIGNED, BLOCK)


def check(averages, weights):
    """Raise ValueError, which names the tensor, unless the lists match: shapes, dtypes, device, dense equal layouts."""
    if triton is None or averages and averages[0].device.type != (
            'cuda' if isinstance(_lerp_kernel, triton.JITFunction) else 'cpu'):
        raise RuntimeError('averaging needs Triton and a GPU, or TRITON_INTERPRET=1 before it is imported')
    if len(averages) != len(weights):
        raise ValueError(f'lists of {len(averages)} and {len(weights)} tensors')
    for i, (average, weight) in enumerate(zip(averages, weights)):
        if average.shape != weight.shape:
            raise ValueError(f'tensor {i}: shapes {tuple(average.shape)} and {tuple(weight.shape)} differ')
        if average.dtype != weight.dtype or average.dtype not in KINDS:
            raise ValueError(f'tensor {i}: {average.dtype} and {weight.dtype}; must be equal, and one of {KINDS}')
        if not average.device == weight.device == averages[0].device:
            raise ValueError(f'tensor {i}: on {average.device} and {weight.device}, tensor 0 on {averages[0].device}')
        if not any(average.is_contiguous(memory_format=layout) and weight.is_contiguous(memory_format=layout)
                   for layout in (torch.contiguous_format, torch.channels_last)):
            raise ValueError(f'tensor {i}: both must be contiguous, or both channels_last')


@lru_cache(maxsize=16)
def make_table(rows, device):
    """int64 (blocks, columns) on the device. rows: of each tensor, its addresses in all lists, elements and kind. A row
    of the result is a block of BLOCK elements or less: the addresses of its first ones, how many they are, and kind."""
    table = [[*(address + first * KINDS[kind].itemsize for address in addresses), min(BLOCK, count - first), kind]
             for *addresses, count, kind in rows for first in range(0, count, BLOCK)]
    return torch.tensor(table).to(device, non_blocking=True)    # CUDA has copied the rows when this returns


def launch(kernel, lists, *args, **constants):
    """Run the kernel on every block of lists of tensors, which have been checked; the first list is written to."""
    rows = tuple((*(v.data_ptr() for v in tensors), tensors[0].numel(), KINDS.index(tensors[0].dtype))
                 for tensors in zip(*lists))
    aligned = all(address % 16 == 0 and count % 8 == 0 for *addresses, count, _ in rows for address in addresses)
    device = lists[0][0].device
    table = make_table(rows, device)
    if len(table):
        with torch.cuda.device_of(lists[0][0]):     # Triton launches on the current device
            kernel[(len(table),)](table, *args, **constants, ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS)


UNSAFE = torch.Tag.cudagraph_unsafe      # in a CUDA graph: the table belongs to the addresses of one call


@torch.library.custom_op('airbench::lerp', mutates_args=('averages', 'weights'), tags=(UNSAFE,))
def _lerp_lists(averages: list[torch.Tensor], weights: list[torch.Tensor], share: float, copy_back: bool) -> None:
    launch(_lerp_kernel, [averages, weights], share, COPY_BACK=copy_back)


@torch.library.custom_op('airbench::mean', mutates_args=('averages',), tags=(UNSAFE,))
def _mean_lists(averages: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    size = len(averages)
    networks = [weights[i:i + size] for i in range(0, len(weights), size)]
    launch(_mean_kernel, [averages, *networks], len(networks))


def lookahead(averages, weights, decay):
    """Let averages keep the share `decay` of themselves and take the rest from weights; copy them back. Two lists of
    tensors, float32, float16 and bfloat16 mixed, changed in place. Raises ValueError, which names the tensor, if they
    do not match in shape, dtype, device and memory layout (contiguous, or channels_last), and RuntimeError where Triton
    or a GPU is missing."""
    averages, weights = list(averages), list(weights)
    check(averages, weights)
    if averages:
        _lerp_lists(averages, weights, 1 - decay, True)


def running_mean(averages, weights, n):
    """Turn averages, the mean of n networks, into the mean of them and weights. Lists and errors as for lookahead."""
    averages, weights = list(averages), list(weights)
    check(averages, weights)
    if averages:
        _lerp_lists(averages, weights, 1 / (n + 1), False)


def mean(averages, networks):
    """Overwrite averages with the mean of the networks, a list of lists, summed in float32. Errors as for lookahead,
    and ValueError if there is no network."""
    averages, networks = list(averages), [list(weights) for weights in networks]
    if not networks:
        raise ValueError('there is no network to average')
    for weights in networks:
        check(averages, weights)
    if averages:
        _mean_lists(averages, [v for weights in networks for v in weights])


#### Benchmark #####################################################################################
ROUNDS = 50


def airbench94_tensors(device):
    """Tensors of the shapes and dtypes of airbench94's weights and running statistics, in half precision."""
    halves = [(24, 3, 2, 2), (24,), (10, 256)]
    singles = []
    for inputs, width in ((24, 64), (64, 256), (256, 256)):
        halves += [(width, inputs, 3, 3), (width, width, 3, 3)]
        singles += [(width,)] * 8       # scale, bias, mean and variance of two BatchNorms
    options = [(halves, torch.float16), (singles, torch.float32)]
    return [torch.randn(shape, device=device).to(dtype) for shapes, dtype in options for shape in shapes]


def lookahead_loop(averages, weights, decay):
    """The published method: a tensor after another."""
    for average, weight in zip(averages, weights):
        average.lerp_(weight, 1 - decay)
        weight.copy_(average)


def mean_loop(averages, networks):
    """The usual method: a tensor after another."""
    for average, *weights in zip(averages, *networks):
        average.copy_(torch.stack(weights).mean(0))


def seconds(function, device):
    """That a call of `function` takes."""
    start = time.perf_counter()
    function()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def benchmark(title, methods, moved, device):
    """Print a table of the methods' times, in turns, and beside them a copy of as many bytes as must be moved."""
    source, target = torch.ones(2, moved // 2, dtype=torch.uint8, device=device)
    methods = methods | {'copy': partial(target.copy_, source)}
    times = {name: [] for name in methods}
    for _ in range(1 + ROUNDS):     # the first one compiles and is not counted
        for name, method in methods.items():
            times[name].append(seconds(method, device))
    times = {name: later for name, (_, *later) in times.items()}
    copy = statistics.median(times['copy'])
    print(f'{title:16} {"median":>8} {"20%":>8} {"80%":>8} {"GB/s":>8} {"of copy":>8}')
    for name, all_times in times.items():
        low, _, _, high = statistics.quantiles(all_times, n=5)
        median = statistics.median(all_times)
        print(f'{name:16} {1e6 * median:8.0f} {1e6 * low:8.0f} {1e6 * high:8.0f} {moved / median / 1e9:8.1f} '
              f'{copy / median:8.1%}')


def main():
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    networks = [airbench94_tensors(device) for _ in range(8)]
    averages, weights = [v.clone() for v in networks[0]], networks[0]
    size = sum(v.numel() * v.element_size() for v in weights)
    print(f'{len(weights)} tensors, {size / 1e6:.1f} MB, torch {torch.__version__}, microseconds on',
          torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads')
    for title, moved, functions, args in (
            ('lookahead', 4 * size, (lookahead_loop, lookahead_ref, lookahead), (averages, weights, 0.5)),
            ('mean of 8', 9 * size, (mean_loop, mean_ref, mean), (averages, networks))):
        methods = dict(zip(('loop', 'torch path', 'kernel'), (partial(function, *args) for function in functions)))
        if device.type == 'cpu':
            del methods['kernel']
        benchmark(title, methods, moved, device)


if __name__ == '__main__':
    main()
