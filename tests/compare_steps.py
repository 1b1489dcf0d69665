"""A training step on the CPU with and without keep_freed_memory.

    python tests/compare_steps.py [airbench95.py]

The script's network and batch size, fp32, on made-up images; the whitening bias trains, as in the
first epochs. A B A B A B in this process: A is glibc's own way, with its thresholds as they are
once they have adapted to large blocks; B is keep_freed_memory's. After each change a step is made
that is not counted. logs/README.md has the figures.
"""

import ctypes
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
    """(seconds, of them in the kernel and summed over threads, page faults) of one step."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    step()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt


def describe(mode, seconds, kernel, faults):
    return f'{mode.__name__}: {seconds:.2f} s, {kernel:.2f} s in the kernel, {faults:.0f} faults'


def main():
    script = __import__(Path(*sys.argv[1:2] or ['airbench94.py']).stem)
    net = script.make_net(device='cpu', dtype=torch.float32)
    optimizer, _ = script.make_optimizer(net, script.hyp, total_steps=100)
    batch = script.hyp['opt']['batch_size']
    inputs = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))

    def step():
        script.train_step(net, optimizer, inputs, labels, script.hyp['opt']['label_smoothing'])

    step()
    figures = {return_freed_memory: [], script.keep_freed_memory: []}
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
    print(f'ratio {medians[script.keep_freed_memory][0] / medians[return_freed_memory][0]:.3f}')


if __name__ == '__main__':
    main()
