"""The time of a run of a record as a share of its airbench's, from steps of both in turns.

    python tests/compare_records.py              # record94 and airbench94
    python tests/compare_records.py record95     # and airbench95

It takes each recipe's own loader, network, step and batch size, in fp32 on the CPU, with random
images. The kinds of work are: steps of airbench with and without the whitening bias; steps of the
record on small and on full images; the same two with only torch's convolutions; and batches of
tests. One of each in turns, ROUNDS times. It then multiplies the medians by how often a run does
each kind. records/README.md has the figures.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import airbench94
import airbench95
from records import record94, record95

ROUNDS = 7
TESTS = 10_000  # images
# By the record's name: the airbench, the record, and how many test images were uncertain.
PAIRS = {'record94': (airbench94, record94, 2_500), 'record95': (airbench95, record95, 1_500)}
ON_CPU = {'device': 'cpu', 'dtype': torch.float32}


def noise(n):
    """n random images and labels."""
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
    return images, torch.randint(0, 10, (n,))


def make_net(recipe, torchs):
    """The recipe's network; with `torchs`, only torch's own convolutions."""
    net = recipe.make_net(**ON_CPU)
    for module in net.modules():
        if torchs and isinstance(module, nn.Conv2d):
            module.forward = functools.partial(nn.Conv2d.forward, module)
    return net


def step_of(recipe, trains_bias, size, torchs=False):
    """A function that takes a training step, with what the loader does for it."""
    batch_size = recipe.hyp['opt']['batch_size']
    loader, _ = recipe.make_loaders(noise(2 * batch_size), noise(1), recipe.hyp, **ON_CPU)
    net = make_net(recipe, torchs)
    net[0].bias.requires_grad = trains_bias
    optimizer, _ = recipe.make_optimizer(net, recipe.hyp, total_steps=1000)
    smoothing = recipe.hyp['opt']['label_smoothing']

    def step():
        inputs, labels = next(iter(loader))
        sizes = [size] if hasattr(recipe, 'resize') else []
        recipe.train_step(net, optimizer, inputs, labels, *sizes, smoothing)

    return step


def tests_of(recipe, torchs=False):
    """A function that predicts a batch of 2000 test images, with one view."""
    return functools.partial(
        recipe.infer, make_net(recipe, torchs), recipe.CifarLoader(*noise(2000), **ON_CPU)
    )


def main():
    parser = argparse.ArgumentParser(description="A record's time as a share of its airbench's.")
    parser.add_argument('record', nargs='?', choices=PAIRS, default='record94')
    airbench, record, uncertain = PAIRS[parser.parse_args().record]
    airbench.keep_freed_memory()

    opt = airbench.hyp['opt']
    epoch = 50_000 // opt['batch_size']  # steps
    steps = math.ceil(epoch * opt['train_epochs'])
    with_bias = opt['whiten_bias_epochs'] * epoch
    growth = record.hyp['growth']
    record_steps = sum(count for _, count in record.plan_epochs(50_000, record.hyp))
    sizes = [record.image_size(step, record_steps, growth) for step in range(record_steps)]
    small = sizes.count(growth['size'])
    views = TESTS + 6 * uncertain
    # For each kind: its recipe, its name, what to call, and how often a run does it.
    kinds = [
        (airbench.__name__, 'with the whitening bias', step_of(airbench, True, 32), with_bias),
        (airbench.__name__, 'without', step_of(airbench, False, 32), steps - with_bias),
        (airbench.__name__, '2000 tests', tests_of(airbench), 6 * TESTS / 2000),
    ]
    for name, torchs in (('record', False), ("record, torch's convolutions", True)):
        kinds += [
            (name, 'small images', step_of(record, True, growth['size'], torchs), small),
            (name, '32 pixels', step_of(record, False, 32, torchs), record_steps - small),
            (name, '2000 tests', tests_of(record, torchs), views / 2000),
        ]
    seconds = [[] for _ in kinds]
    for turn in range(1 + ROUNDS):
        for (_, _, act, _), values in zip(kinds, seconds):
            start = time.perf_counter()
            act()
            values.append(time.perf_counter() - start)
        print(f'turn {turn} of {ROUNDS}', [f'{values[-1]:.2f}' for values in seconds], flush=True)

    totals = {name: 0.0 for name, *_ in kinds}
    for (recipe, kind, _, times), values in zip(kinds, seconds):
        median = statistics.median(values[1:])  # the first call does more
        totals[recipe] += times * median
        print(f'{recipe}, {kind}: {times:.0f} times {median:.3f} s')
    for recipe, total in totals.items():
        ratio = total / totals[airbench.__name__]
        print(f'{recipe}: {total:.0f} s, {ratio:.3f} of {airbench.__name__}')


if __name__ == '__main__':
    main()
