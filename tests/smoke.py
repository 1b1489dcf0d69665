"""Every study with settings so small that it takes seconds, to see it work.

python -m tests.smoke flip --data digits
python -m tests.smoke imagenet_flip --data PICTURES    # PICTURES/train/CLASS/*, val/CLASS/*
"""

import dataclasses
import importlib
import sys

from studies import common, swap
from studies.flip import NARROW
from studies.pictures import segment
from studies.swap import NARROW_RESNET9, NARROW_SMALL_BATCH, ONE_PHASE, phase

# {study: what differs from its small scale}
SETTINGS = {
    'flip': {'images': 200, 'epochs': [1, 2, 3], 'runs': 1},
    'variance': {
        'hyp': ['opt.batch_size=50', 'net.tta_level=1'],
        'images': 200,
        'epochs': 1,
        'runs': 2,
    },
    'ablation': {
        'hyp': [*NARROW, 'opt.batch_size=50'],
        'images': 100,
        'target': 0.2,
        'first': 2,
        'rounds': 2,
        'runs': 1,
    },
    'datasets': {
        'hyp': [*NARROW, 'opt.train_epochs=1', 'opt.batch_size=50', 'net.tta_level=1'],
        'images': 200,
        'runs': 1,
    },
    'swap_tables': {'runs': 2},
    'swa': {'runs': 2},
    'landscape': {'runs': 2, 'grid': 2, 'segment': 3},
    'cosine': {'runs': 2},
    'progress': {'runs': 2, 'points': 3},
    'connectivity': {
        'images': 100,
        'share': 0.0625,
        'epochs': 1,
        'batch_size': 20,
        'large_batch_size': 50,
        'lr': 0.02,
        'curve_epochs': [0, 1],
        'points': 3,
        'runs': 1,
    },
    'svcca': {
        'images': 100,
        'compared': 200,
        'share': 0.0625,
        'epochs': 1,
        'batch_size': 20,
        'lr': 0.02,
        'runs': 1,
    },
    'restarts': {
        'images': 100,
        'augmented': True,
        'compared': 200,
        'share': 0.0625,
        'batch_size': 50,
        'lr': 0.02,
        'first_period': 1,
        'drops': [1, 2],
        'pairs': {'sgdr': [[1, 2], [1, 3]], 'steps': [[1, 3]]},
        'alike': [[1, 3]],
        'iterates_every': 1,
        'curve_epochs': 1,
        'points': 3,
        'grid': 2,
        'runs': 1,
    },
    'warmup': {
        'images': 100,
        'compared': 200,
        'share': 0.0625,
        'batch_size': 20,
        'large_batch_size': 50,
        'large_lr': 0.05,
        'warm_up': 1,
        'drops': [2],
        'epochs': 2,
        'runs': 2,
    },
    'distill': {
        'images': 100,
        'compared': 200,
        'share': 0.0625,
        'student_share': 0.125,
        'batch_size': 20,
        'lr': 0.02,
        'teacher_epochs': 1,
        'epochs': 1,
        'runs': 2,
    },
    'imagenet_flip': {
        'cells': [['light', 3, [1, 1, 1]], ['heavy', 3, [0, 0, 1]]],
        'pixels': [32, 40],
        'batch': 8,
        'rate': 0.02,
        'warm_up': 1,
        'test_crops': [[48, 0.875], [40, 1.0]],
    },
    'imagenet_swap': {
        'schedule': [
            segment([0, 1], 32, 0.5, 2, 8, [0.01, 0.02]),
            segment([1, 2], 40, 0.5, 2, 8, [0.02, 0.002]),
            segment([2, 3], 40, 0.5, 2, 4, [0.002, 0.0002]),
        ],
        'switch': 2,
        'test_crop': [40, 0.875],
        'runs': 2,
    },
}
SWAP_STUDIES = ('swap_tables', 'swa', 'landscape', 'cosine', 'progress')


def swap_hyp(small_batch, others, lr, large_lr, worker_lr):
    """{method: changes of swap94.hyp}. small_batch and others: what they have besides phases."""
    phase1 = phase('phase1', 80, 8, large_lr, 2, end=0.3)
    phase2 = phase('phase2', 40, 1, worker_lr, 1)
    return {
        'small-batch': [*small_batch, *phase('phase1', 40, 1, lr, 2), ONE_PHASE],
        'large-batch': [*others, *phase('phase1', 80, 8, large_lr, 2), ONE_PHASE],
        'swap': [*others, *phase1, *phase2, 'phase2.workers=3'],
    }


SWAP_HYP = {
    'airbench': swap_hyp(NARROW_SMALL_BATCH, swap.NARROW, 0.24, 0.27, 0.06),
    'resnet9': swap_hyp(NARROW_RESNET9, NARROW_RESNET9, 0.1, 0.2, 0.04),
}


def settings_of(name, net=None):
    """The settings of a study's smoke scale, for its first kind of network, or another one."""
    scales = importlib.import_module(f'studies.{name}').STUDY.scales
    net = net or next(iter(scales))
    settings = scales[net]['small'] | SETTINGS[name]
    if name in SWAP_STUDIES:
        settings |= {'hyp': SWAP_HYP[net], 'images': 160}
    return settings | {'net': net, 'files': []}


def study_of(name):
    """A study that has a smoke scale, too."""
    study = importlib.import_module(f'studies.{name}').STUDY
    scales = {}
    for net, of_net in study.scales.items():
        smoke = settings_of(name, net)
        del smoke['net'], smoke['files']  # which the command line adds
        scales[net] = of_net | {'smoke': smoke}
    return dataclasses.replace(study, scales=scales)


def main(argv):
    name, *options = argv or ['']
    if name not in SETTINGS:
        print(f'give the name of a study: {", ".join(SETTINGS)}', file=sys.stderr)
        return 2
    return common.run_study(study_of(name), ['--scale', 'smoke', *options])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
