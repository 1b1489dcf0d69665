"""The time of a run of records/94.py as a share of airbench94.py's, from steps of both in turns.

    python tests/compare_records.py

Made-up images, fp32 on the CPU, each script's own loader, network, step and batch size. There are
two kinds of steps of airbench94, with and without the whitening bias, two of the record, of small
and of full images, the same two with torch's convolutions only, and batches of tests. ROUNDS times,
one of each kind, in turns; the medians are then multiplied by how often a run makes each. A quarter
of the test images are taken to be in doubt. records/README.md has the figures.
"""

import functools
import math
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROUNDS = 7
TESTS, IN_DOUBT = 10_000, 2_500  # images


def made_up_loader(script, train):
    """A loader of two batches of noise, which serves like one of CIFAR-10."""
    batch_size = script.hyp['opt']['batch_size'] if train else 2000
    aug = script.hyp['aug'] if train else None
    options = {'device': 'cpu', 'dtype': torch.float32}
    loader = script.CifarLoader('digits', train, 1, aug, **options)
    loader.batch_size = batch_size
    loader.images = torch.randint(0, 256, (2 * batch_size, 32, 32, 3), dtype=torch.uint8)
    loader.labels = torch.randint(0, 10, (2 * batch_size,))
    loader.set_statistics(script.CIFAR_MEAN, script.CIFAR_STD)
    return loader


def make_net(script, torchs):
    """The script's network; if `torchs`, with no convolutions but torch's own."""
    net = script.make_net(device='cpu', dtype=torch.float32)
    for module in net.modules():
        if torchs and isinstance(module, nn.Conv2d):
            module.forward = functools.partial(nn.Conv2d.forward, module)
    return net


def step_of(script, trains_bias, size, torchs=False):
    """A function that makes a training step, with what the loader does for it."""
    loader = made_up_loader(script, train=True)
    net = make_net(script, torchs)
    net[0].bias.requires_grad = trains_bias
    optimizer, _ = script.make_optimizer(net, script.hyp, total_steps=1000)
    smoothing = script.hyp['opt']['label_smoothing']

    def step():
        inputs, labels = next(iter(loader))
        if size < 32:
            inputs = script.resize(inputs, size)
        script.train_step(net, optimizer, inputs, labels, smoothing)

    return step


def tests_of(script, torchs=False):
    """A function that predicts a batch of 2000 test images, by one view."""
    loader = made_up_loader(script, train=False)
    loader.images = loader.images[:2000]
    net = make_net(script, torchs)

    def predict():
        script.infer(net, loader)

    return predict


def main():
    airbench94 = import_module('airbench94')
    record94 = import_module('records.94')
    airbench94.keep_freed_memory()

    opt = airbench94.hyp['opt']
    epoch = 50_000 // opt['batch_size']  # steps
    steps = math.ceil(epoch * opt['train_epochs'])
    with_bias = opt['whiten_bias_epochs'] * epoch
    growth = record94.hyp['growth']
    record_steps = sum(count for _, count in record94.plan_epochs(50_000, record94.hyp))
    sizes = [record94.image_size(step, record_steps, growth) for step in range(record_steps)]
    small = sizes.count(growth['size'])
    views = TESTS + 6 * IN_DOUBT
    # Of each kind: its script, its name, what it does, and how often a run does it.
    kinds = [
        ('airbench94', 'with the whitening bias', step_of(airbench94, True, 32), with_bias),
        ('airbench94', 'without', step_of(airbench94, False, 32), steps - with_bias),
        ('airbench94', '2000 tests', tests_of(airbench94), 6 * TESTS / 2000),
    ]
    for name, torchs in (('record', False), ("record, torch's convolutions", True)):
        kinds += [
            (name, 'small images', step_of(record94, True, growth['size'], torchs), small),
            (name, '32 pixels', step_of(record94, False, 32, torchs), record_steps - small),
            (name, '2000 tests', tests_of(record94, torchs), views / 2000),
        ]
    seconds = [[] for _ in kinds]
    for turn in range(1 + ROUNDS):
        for (_, _, act, _), values in zip(kinds, seconds):
            start = time.perf_counter()
            act()
            values.append(time.perf_counter() - start)
        print(f'turn {turn} of {ROUNDS}', [f'{values[-1]:.2f}' for values in seconds], flush=True)

    totals = {name: 0.0 for name, *_ in kinds}
    for (script, kind, _, times), values in zip(kinds, seconds):
        median = statistics.median(values[1:])  # the first call readies things
        totals[script] += times * median
        print(f'{script}, {kind}: {times:.0f} times {median:.3f} s')
    for script, total in totals.items():
        print(f'{script}: {total:.0f} s, {total / totals["airbench94"]:.3f} of airbench94')


if __name__ == '__main__':
    main()
