"""A training step on the CPU, eager and by --compile, and where the time goes.

    python tests/compare_compiled.py [airbench95.py]

The script's network and batch size, fp32, on made-up images; the whitening bias is frozen, as in
most epochs. A B A B ... in this process, a step each, so that a machine that becomes slower does
so for both; the ratio is the median over the pairs. Then, for scale, the arithmetic speed of a
large matrix product, and the profile of a step of each. logs/README.md has the figures.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PAIRS = 15


def make_steps(script):
    """{'eager': a step, 'compiled': a step}."""
    batch, smoothing = script.hyp['opt']['batch_size'], script.hyp['opt']['label_smoothing']
    inputs = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))

    def make_step(compute_loss, fused=None):
        net = script.make_net(device='cpu', dtype=torch.float32)
        net[0].bias.requires_grad = False
        optimizer, _ = script.make_optimizer(net, script.hyp, 100, fused)

        def step():
            script.train_step(net, optimizer, inputs, labels, smoothing, compute_loss)

        return step

    faster = script.compiled(device='cpu', dtype=torch.float32)
    return {
        'eager': make_step(script.compute_loss),
        'compiled': make_step(faster['compute_loss'], faster['fused']),
    }


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    script = __import__(Path(*sys.argv[1:2] or ['airbench94.py']).stem)
    script.keep_freed_memory()
    steps = make_steps(script)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    times = {name: [] for name in steps}
    for i in range(1 + PAIRS):
        for name, step in steps.items():
            times[name].append(seconds(step))
            print(
                f'{name}: {times[name][-1]:.2f} s',
                '(compiles, not counted)' if i == 0 else '',
                flush=True,
            )
    times = {name: later for name, (_, *later) in times.items()}
    ratios = [compiled / eager for eager, compiled in zip(times['eager'], times['compiled'])]
    low, _, _, high = statistics.quantiles(ratios, n=5)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print('medians: eager {eager:.2f} s, compiled {compiled:.2f} s'.format(**medians))
    ratio = f'{statistics.median(ratios):.3f} (20% to 80%: {low:.3f} to {high:.3f})'
    print(f'compiled / eager: median {ratio}')

    with FlopCounterMode(display=False) as counter:
        steps['eager']()
    matrix = torch.randn(4096, 4096)
    product = statistics.median(seconds(lambda: matrix @ matrix) for _ in range(7))
    print(
        f'eager step: {counter.get_total_flops() / medians["eager"] / 1e9:.0f} GFLOP/s; '
        f'a matrix product of 4096 x 4096: {2 * 4096**3 / product / 1e9:.0f} GFLOP/s'
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
