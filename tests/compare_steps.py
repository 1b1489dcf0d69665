"""A training step on the CPU with and without keep_freed_memory.

    python tests/compare_steps.py [airbench95.py]

It takes the recipe's network and batch size, in fp32, on random images. The whitening bias trains,
as in the first epochs. The two alternate in this process, A B A B A B: A is what glibc does by
itself, with the thresholds that it reaches for large blocks, and B is keep_freed_memory. The first
step after each change does not count. logs/README.md has the figures.
"""

import ctypes
import importlib
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROUNDS, STEPS = 3, 4


def return_freed_memory():
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 65536)  # M_MMAP_MAX
    libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 64 * 2**20)  # M_TRIM_THRESHOLD


def measured(step):
    """(seconds, seconds in the kernel summed over threads, page faults) of one step."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt


def describe(mode, seconds, kernel, faults):
    return f'{mode.__name__}: {seconds:.2f} s, {kernel:.2f} s in the kernel, {faults:.0f} faults'


def main():
    recipe = importlib.import_module(Path(*sys.argv[1:2] or ['airbench94.py']).stem)
    net = recipe.make_net(device='cpu', dtype=torch.float32)
    optimizer, _ = recipe.make_optimizer(net, recipe.hyp, total_steps=100)
    batch = recipe.hyp['opt']['batch_size']
    inputs = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))

    def step():
        recipe.train_step(net, optimizer, inputs, labels, recipe.hyp['opt']['label_smoothing'])

    step()
    figures = {return_freed_memory: [], recipe.keep_freed_memory: []}
    for _ in range(ROUNDS):
        for mode, seconds in figures.items():
            mode()
            step()
            for _ in range(STEPS):
                seconds.append(measured(step))
                print(describe(mode, *seconds[-1]), flush=True)
    medians = {
        mode: [statistics.median(column) for column in zip(*rows)] for mode, rows in figures.items()
    }
    for mode, (seconds, kernel, faults) in medians.items():
        print('median,', describe(mode, seconds, kernel, faults))
    print(f'ratio {medians[recipe.keep_freed_memory][0] / medians[return_freed_memory][0]:.3f}')


if __name__ == '__main__':
    main()
