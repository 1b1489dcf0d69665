"""A training step on the CPU, eager and with --compile, and where the time goes.

    python tests/compare_compiled.py [airbench95.py]

It takes the recipe's network and batch size, in fp32, on random images. The whitening bias is
frozen, as in most epochs. The steps alternate in this process, A B A B, so that a machine that
becomes slower slows down both. The ratio is the median over the pairs. For scale, it also times a
large matrix product. At the end comes a profile of a step of each. logs/README.md has the figures.
"""

import importlib
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import compiled

PAIRS = 15


def make_steps(recipe):
    """{'eager': a step, 'compiled': a step}."""
    batch_size = recipe.hyp['opt']['batch_size']
    smoothing = recipe.hyp['opt']['label_smoothing']
    inputs = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch_size,))

    def make_step(compute_loss, fused=None):
        net = recipe.make_net(device='cpu', dtype=torch.float32)
        net[0].bias.requires_grad = False
        optimizer, _ = recipe.make_optimizer(net, recipe.hyp, 100, fused)

        def step():
            recipe.train_step(net, optimizer, inputs, labels, smoothing, compute_loss)

        return step

    return {
        'eager': make_step(recipe.compute_loss),
        'compiled': make_step(compiled(recipe.compute_loss), fused=True),
    }


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    recipe = importlib.import_module(Path(*sys.argv[1:2] or ['airbench94.py']).stem)
    recipe.keep_freed_memory()
    steps = make_steps(recipe)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    times = {name: [] for name in steps}
    for i in range(1 + PAIRS):
        for name, step in steps.items():
            times[name].append(seconds(step))
            note = ' (compiles, not counted)' if i == 0 else ''
            print(f'{name}: {times[name][-1]:.2f} s{note}', flush=True)
    eager, fast = times['eager'][1:], times['compiled'][1:]
    ratios = [b / a for a, b in zip(eager, fast)]
    low, _, _, high = statistics.quantiles(ratios, n=5)
    eager, fast = statistics.median(eager), statistics.median(fast)
    print(f'medians: eager {eager:.2f} s, compiled {fast:.2f} s')
    ratio = f'{statistics.median(ratios):.3f} (20% to 80%: {low:.3f} to {high:.3f})'
    print(f'compiled / eager: median {ratio}')

    with FlopCounterMode(display=False) as counter:
        steps['eager']()
    matrix = torch.randn(4096, 4096)
    product = statistics.median(seconds(partial(torch.mm, matrix, matrix)) for _ in range(7))
    print(
        f'eager step: {counter.get_total_flops() / eager / 1e9:.0f} GFLOP/s; '
        f'a product of 4096 x 4096 matrices: {2 * 4096**3 / product / 1e9:.0f} GFLOP/s'
    )
    for step in steps.values():
        with profile() as profiler:
            step()
        print(
            profiler.key_averages().table(
                sort_by='self_cpu_time_total', row_limit=12, max_name_column_width=60
            )
        )


if __name__ == '__main__':
    main()
