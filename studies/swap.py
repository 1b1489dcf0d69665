"""What the studies of SWAP share: settings of both networks, and swap94's phases one by one."""

from contextlib import nullcontext
from unittest.mock import patch

import torch

import swap94
from studies.common import UserError, first_images
from studies.networks import make_resnet9

#### Settings ######################################################################################


def phase(name, batch_size, shards, lr, epochs, *, warm_up=0, end=0, tau=1.0):
    """A phase's settings, as assignments to hyp.

    The rate rises from 0 in the epochs of warm_up, and falls to the share `end` of `lr`.
    """
    values = {
        'batch_size': batch_size,
        'shards': shards,
        'lr': lr,
        'train_epochs': epochs,
        'tau': tau,
        'schedule.start': 0 if warm_up else 1,
        'schedule.peak_at': warm_up / epochs,
        'schedule.end': end,
        'average.decay': 0,
        'growth.until': 0,
        'selection.from': 1,
    }
    return [f'{name}.{key}={value}' for key, value in values.items()]


# Appendix A. It does not say how large cutout's squares and the translations are.
SGD = ['opt.momentum=0.9', 'opt.weight_decay=5e-4', 'opt.label_smoothing=0']
SGD += ['aug.translate=4', 'aug.cutout=8', 'net.widths.block1=64', 'net.tta_level=0']
SGD += ['statistics.images=50000']
TABLE_5 = {
    'small-batch': [*SGD, *phase('phase1', 512, 2, 0.3, 100, warm_up=30)],
    'large-batch': [*SGD, *phase('phase1', 4096, 8, 1.2, 150, warm_up=30)],
    'swap': [
        *SGD,
        *phase('phase1', 4096, 8, 1.2, 150, warm_up=30, tau=0.98),
        *phase('phase2', 512, 1, 0.12, 30),
    ],
}
TABLE_6 = {
    'small-batch': [*SGD, *phase('phase1', 128, 1, 0.2, 150, warm_up=60)],
    'large-batch': [*SGD, *phase('phase1', 2048, 8, 1.2, 150, warm_up=45)],
    'swap': [
        *SGD,
        *phase('phase1', 2048, 8, 1.2, 150, warm_up=45, tau=0.9),
        *phase('phase2', 128, 1, 0.05, 10),  # as in section 5.1; Table 6 says 30 epochs
    ],
}

# Small networks, and batches that go with a tenth of the images and less.
NARROW = ['net.widths.block1=8', 'net.widths.block2=32', 'net.widths.block3=64', 'net.tta_level=0']
ALONE = [*swap94.METHODS['small-batch'], *NARROW]
AIRBENCH_SMALL = {
    'small-batch': [*ALONE, *phase('phase1', 125, 1, 0.24, 8)],
    'large-batch': [*NARROW, *phase('phase1', 1000, 8, 0.27, 8)],
    'swap': [
        *NARROW,
        *phase('phase1', 1000, 8, 0.27, 8, end=0.3),
        *phase('phase2', 125, 1, 0.06, 3),
    ],
}
AIRBENCH_SMOKE = {
    'small-batch': [*ALONE, *phase('phase1', 40, 1, 0.24, 2)],
    'large-batch': [*NARROW, *phase('phase1', 80, 8, 0.27, 2)],
    'swap': [
        *NARROW,
        *phase('phase1', 80, 8, 0.27, 2, end=0.3),
        *phase('phase2', 40, 1, 0.06, 1),
        'phase2.workers=3',
    ],
}
NARROW_RESNET9 = [*SGD, 'net.widths.block1=8']
RESNET9_SMALL = {
    'small-batch': [*NARROW_RESNET9, *phase('phase1', 125, 1, 0.1, 8, warm_up=2)],
    'large-batch': [*NARROW_RESNET9, *phase('phase1', 1000, 8, 0.4, 8, warm_up=2)],
    'swap': [
        *NARROW_RESNET9,
        *phase('phase1', 1000, 8, 0.4, 8, warm_up=2, end=0.3),
        *phase('phase2', 125, 1, 0.04, 3),
    ],
}
RESNET9_SMOKE = {
    'small-batch': [*NARROW_RESNET9, *phase('phase1', 40, 1, 0.1, 2)],
    'large-batch': [*NARROW_RESNET9, *phase('phase1', 80, 8, 0.2, 2)],
    'swap': [
        *NARROW_RESNET9,
        *phase('phase1', 80, 8, 0.2, 2, end=0.3),
        *phase('phase2', 40, 1, 0.04, 1),
        'phase2.workers=3',
    ],
}

SETTINGS = {
    'airbench': {
        'paper': {'hyp': swap94.METHODS, 'images': None},
        'small': {'hyp': AIRBENCH_SMALL, 'images': 5000},
        'smoke': {'hyp': AIRBENCH_SMOKE, 'images': 160},
    },
    'resnet9': {
        'paper': {'hyp': TABLE_5, 'hyp of 100 classes': TABLE_6, 'images': None},
        'small': {'hyp': RESNET9_SMALL, 'images': 5000},
        'smoke': {'hyp': RESNET9_SMOKE, 'images': 160},
    },
}


def scales(of_study):
    """A study's scales, of both networks. of_study: {scale: its own settings}."""
    found = {}
    for net, of_net in SETTINGS.items():
        found[net] = {scale: of_net[scale] | own for scale, own in of_study.items()}
    return found


def hyp_of(settings, method, num_classes):
    """swap94's hyp for one of its methods."""
    methods = settings['hyp']
    if num_classes == 100:
        methods = settings.get('hyp of 100 classes', methods)
    return swap94.override(swap94.hyp, methods[method])


#### Network #######################################################################################


def make_resnet9_of(hyp=swap94.hyp, num_classes=10, **options):
    """Instead of swap94.make_net."""
    return make_resnet9(hyp['net']['widths']['block1'], num_classes, **options)


def leave_layer(layer, images, eps):
    """Instead of swap94.init_whitening_conv: ResNet-9's first layer learns like the others."""


def make_sgd(net, hyp, total_steps, fused=None):
    """Instead of swap94.make_optimizer: (SGD with Nesterov's momentum, its schedule)."""
    opt = hyp['opt']
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad],
        lr=opt['lr'] / opt['batch_size'],  # the loss is summed over the batch
        weight_decay=opt['weight_decay'] * opt['batch_size'],
        momentum=opt['momentum'],
        nesterov=True,
        fused=fused,
    )

    def share(step):
        return swap94.learning_rate_share(step, total_steps, opt['schedule'])

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def network(net):
    """A context in which swap94 trains a kind of network: 'airbench', its own, or 'resnet9'."""
    if net == 'airbench':
        return nullcontext()
    return patch.multiple(
        swap94, make_net=make_resnet9_of, init_whitening_conv=leave_layer, make_optimizer=make_sgd
    )


#### Phases ########################################################################################


def loader_of(place, hyp):
    """The training images that the scale has, augmented as `hyp` says."""
    loader = first_images(place.train_loader, place.settings['images'])
    loader.aug = hyp['aug']
    return loader


def make_run(place, hyp, seed):
    """swap94's Run, in which this process makes every phase alone."""
    loader = loader_of(place, hyp)
    net = swap94.make_net(hyp, len(loader.classes), device=loader.device, dtype=loader.dtype)
    return swap94.Run(
        train_loader=loader,
        test_loader=place.test_loader,
        hyp=hyp,
        seed=seed,
        on_row=None,
        curve=False,
        everyone=swap94.Team(),
        team=swap94.Team(),
        checkpoints=None,
        net=net,
        forward=swap94.forward,
        running_mean=swap94.running_mean,
        functions={},
    )


def train_swap(place, hyp, seed):
    """(the Run, whose network has the average's weights; phase 1's model; the workers' models).

    Raises UserError if one of them diverges.
    """
    run = make_run(place, hyp, seed)
    joint = run.phase1()
    workers, _ = run.phase2(joint)
    if len(workers) < hyp['phase2']['workers']:
        raise UserError(f'the networks of seed {seed} diverge')
    swap94.average([model['weights'] for model in workers], run.net, swap94.Team())
    return run, joint, workers
