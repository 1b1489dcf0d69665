"""A training step on the CPU, three ways: the table in the README's section on the step.

    python tests/compare_steps.py [airbench95.py]

The script's network and batch size, fp32, on made-up images; the whitening bias is frozen, as in most epochs. A B C A B C A B C
in this process: A is glibc's own way with memory (its thresholds as they are once they have adapted to large blocks), B is
keep_freed_memory's, C is B with --compile. After each change a step is made that is not counted. Then, for scale, the
arithmetic speed of the largest matrix product that torch reaches here, and B's profile.
"""

import ctypes
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROUNDS, STEPS = 3, 4


def return_freed_memory():
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 65536)         # M_MMAP_MAX
    libc.mallopt(-3, 32 * 2**20)    # M_MMAP_THRESHOLD
    libc.mallopt(-1, 64 * 2**20)    # M_TRIM_THRESHOLD
    libc.malloc_trim(0)


def measured(step):
    """(seconds, of them in the kernel and summed over threads, page faults) of one step."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    step()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt


def make_steps(script):
    """{name: (what to do with memory, a step)}."""
    batch, smoothing = script.hyp['opt']['batch_size'], script.hyp['opt']['label_smoothing']
    inputs = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))

    def make_step(compute_loss, fused=None):
        net = script.make_net(device='cpu', dtype=torch.float32)
        net[0].bias.requires_grad = False
        optimizer, _ = script.make_optimizer(net, script.hyp, 100, fused)
        return lambda: script.train_step(net, optimizer, inputs, labels, smoothing, compute_loss)

    faster = script.compiled(script.hyp, device='cpu', dtype=torch.float32)
    eager, compiled = make_step(script.compute_loss), make_step(faster['compute_loss'], faster['fused'])
    return {'glibc': (return_freed_memory, eager), 'keep': (script.keep_freed_memory, eager),
            'compiled': (script.keep_freed_memory, compiled)}


def matmul_speed(size=4096):
    """Operations a second."""
    a, seconds = torch.randn(size, size), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def main():
    steps = make_steps(__import__(Path(*sys.argv[1:2] or ['airbench94.py']).stem))
    start = time.perf_counter()
    steps['compiled'][1]()
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads; compiled in {time.perf_counter() - start:.0f} s')
    figures = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, (set_memory, step) in steps.items():
            set_memory()
            step()
            for _ in range(STEPS):
                figures[name].append(measured(step))
                print('{}: {:.2f} s, {:.2f} s in the kernel, {} page faults'.format(name, *figures[name][-1]), flush=True)
    for i in range(0, ROUNDS * STEPS, STEPS):
        print('medians of a round:', ', '.join(f'{name} {statistics.median(row[0] for row in rows[i:i + STEPS]):.2f} s'
                                               for name, rows in figures.items()))
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in figures.items()}
    for name, row in medians.items():
        print('median, {}: {:.2f} s, {:.2f} s in the kernel, {:.0f} page faults'.format(name, *row))
    print(f"ratios: keep to glibc {medians['keep'][0] / medians['glibc'][0]:.3f}, "
          f"compiled to keep {medians['compiled'][0] / medians['keep'][0]:.3f}")

    with FlopCounterMode(display=False) as counter:
        steps['keep'][1]()
    speed = counter.get_total_flops() / medians['keep'][0]
    print(f'keep: {speed / 1e9:.0f} GFLOP/s; a matrix product of 4096 x 4096: {matmul_speed() / 1e9:.0f} GFLOP/s')
    for name in ('keep', 'compiled'):
        with profile() as profiler:
            steps[name][1]()
        print(profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=12, max_name_column_width=60))


if __name__ == '__main__':
    main()
