"""What the studies of SWAP share: their settings for two networks, and Algorithm 1 step by step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import swap94
from lab.errors import UserError
from studies.networks import make_resnet9

ALONE = swap94.Ranks()  # each network is trained by a single process

#### Settings ######################################################################################


# Small and large batches are phase 1 alone. On swap94's network, small batches are what
# records/record94.py does.
ONE_PHASE = 'phase2.workers=0'
METHODS = {
    'swap': [],
    'small-batch': [
        'phase1.train_epochs=16.9',
        'phase1.batch_size=1000',
        'phase1.shards=1',
        'phase1.lr=0.24',
        'phase1.lr_biases=0.038',
        'phase1.lr_head=0.67',
        'phase1.schedule.end=0.02',
        'phase1.average.decay=0.8',
        'phase1.growth.size=16',
        'phase1.growth.until=0.45',
        'phase1.selection.from=0.4',
        ONE_PHASE,
    ],
    'large-batch': ['phase1.schedule.end=0.02', 'phase1.average.decay=0.5', ONE_PHASE],
}


def phase(name, batch_size, shards, lr, epochs, *, warm_up=0, end=0, tau=1.0):
    """A phase's settings, as KEY=VALUE for swap94.hyp.

    The learning rate rises from 0 to `lr` in `warm_up` epochs, and falls to the share `end` of it.
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


# Appendix A, which does not say how large the squares of cutout and the shifts are.
SGD = ['opt.momentum=0.9', 'opt.weight_decay=5e-4', 'opt.label_smoothing=0']
SGD += ['aug.translate=4', 'aug.cutout=8', 'net.widths.block1=64', 'net.tta_level=0']
SGD += ['statistics.images=50000']
TABLE_5 = {
    'small-batch': [*SGD, *phase('phase1', 512, 2, 0.3, 100, warm_up=30), ONE_PHASE],
    'large-batch': [*SGD, *phase('phase1', 4096, 8, 1.2, 150, warm_up=30), ONE_PHASE],
    'swap': [
        *SGD,
        *phase('phase1', 4096, 8, 1.2, 150, warm_up=30, tau=0.98),
        *phase('phase2', 512, 1, 0.12, 30),
    ],
}
TABLE_6 = {
    'small-batch': [*SGD, *phase('phase1', 128, 1, 0.2, 150, warm_up=60), ONE_PHASE],
    'large-batch': [*SGD, *phase('phase1', 2048, 8, 1.2, 150, warm_up=45), ONE_PHASE],
    'swap': [
        *SGD,
        *phase('phase1', 2048, 8, 1.2, 150, warm_up=45, tau=0.9),
        *phase('phase2', 128, 1, 0.05, 10),  # as in section 5.1; Table 6 says 30 epochs
    ],
}

# Small networks, and batches that go with a tenth of the images and less.
NARROW = ['net.widths.block1=8', 'net.widths.block2=32', 'net.widths.block3=64', 'net.tta_level=0']
NARROW_SMALL_BATCH = [*METHODS['small-batch'], *NARROW]
AIRBENCH_SMALL = {
    'small-batch': [*NARROW_SMALL_BATCH, *phase('phase1', 125, 1, 0.24, 8)],
    'large-batch': [*NARROW, *phase('phase1', 1000, 8, 0.27, 8), ONE_PHASE],
    'swap': [
        *NARROW,
        *phase('phase1', 1000, 8, 0.27, 8, end=0.3),
        *phase('phase2', 125, 1, 0.06, 3),
    ],
}
NARROW_RESNET9 = [*SGD, 'net.widths.block1=8']
RESNET9_SMALL = {
    'small-batch': [*NARROW_RESNET9, *phase('phase1', 125, 1, 0.1, 8, warm_up=2), ONE_PHASE],
    'large-batch': [*NARROW_RESNET9, *phase('phase1', 1000, 8, 0.4, 8, warm_up=2), ONE_PHASE],
    'swap': [
        *NARROW_RESNET9,
        *phase('phase1', 1000, 8, 0.4, 8, warm_up=2, end=0.3),
        *phase('phase2', 125, 1, 0.04, 3),
    ],
}

SETTINGS = {
    'airbench': {
        'paper': {'hyp': METHODS, 'images': None},
        'full': {'hyp': METHODS, 'images': None},
        'small': {'hyp': AIRBENCH_SMALL, 'images': 5000},
    },
    'resnet9': {
        'paper': {'hyp': TABLE_5, 'hyp of 100 classes': TABLE_6, 'images': None},
        'full': {'hyp': TABLE_5, 'hyp of 100 classes': TABLE_6, 'images': None},
        'small': {'hyp': RESNET9_SMALL, 'images': 5000},
    },
}


def scales(of_study):
    """The scales of a study, for both networks. of_study: {scale: what only this study needs}."""
    found = {}
    for net, of_net in SETTINGS.items():
        found[net] = {scale: of_net[scale] | own for scale, own in of_study.items()}
    return found


def assignments_of(settings, method, num_classes):
    """What a method changes in swap94.hyp, as a list of KEY=VALUE."""
    methods = settings['hyp']
    if num_classes == 100:
        methods = settings.get('hyp of 100 classes', methods)
    return methods[method]


def hyp_of(place, method):
    """swap94's hyp for a method."""
    return place.hyp(swap94, assignments_of(place.settings, method, place.num_classes))


#### Networks ######################################################################################


def make_resnet9_of(hyp, num_classes, **options):
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


# For each --net, arguments of swap94.train.
FUNCTIONS = {
    'airbench': {
        'make_net': swap94.make_net,
        'init_whitening_conv': swap94.init_whitening_conv,
        'make_optimizer': swap94.make_optimizer,
    },
    'resnet9': {
        'make_net': make_resnet9_of,
        'init_whitening_conv': leave_layer,
        'make_optimizer': make_sgd,
    },
}


@dataclass(frozen=True)  # hashable: lab.flops counts the operations of each recipe once
class Recipe:
    """What lab.flops uses of a recipe. All but the network and its optimizer are swap94's."""

    make_net: Callable
    make_optimizer: Callable
    compute_loss: Callable = swap94.compute_loss
    phase_settings: Callable = swap94.phase_settings
    plan_epochs: Callable = swap94.plan_epochs
    image_size: Callable = swap94.image_size


def recipe_of(net):
    """swap94 with one of these networks, as a recipe for lab.flops."""
    functions = FUNCTIONS[net]
    return Recipe(functions['make_net'], functions['make_optimizer'])


#### Algorithm 1 ###################################################################################


def check_finished(record, seed):
    """Raise UserError if a training diverged."""
    if 'failed' in record:
        raise UserError(f'the network of seed {seed} diverges: {record["failed"]}')


def loader_of(place, hyp):
    """The training images of the scale, for both phases."""
    return place.training_loader(hyp['phase1']['batch_size'], hyp['aug'])


def train_phase1(place, hyp, seed, compute_loss=swap94.compute_loss):
    """(network, what swap94.fit returns). Raises UserError if the network diverges."""
    loader = loader_of(place, hyp)
    functions = FUNCTIONS[place.settings['net']]
    make_net, init_whitening_conv = functions['make_net'], functions['init_whitening_conv']
    net = swap94.start(loader, hyp, seed, ALONE, None, make_net, init_whitening_conv)
    losses = torch.full((len(loader.images),), math.inf, device=place.device)
    options = {'make_optimizer': functions['make_optimizer'], 'compute_loss': compute_loss}
    result = swap94.fit(net, loader, hyp, 'phase1', seed, ALONE, losses, **options)
    check_finished(result['record'], seed)
    return net, result


def train_worker(place, hyp, seed, worker, net, before, compute_loss=swap94.compute_loss):
    """Train `net` for phase 2, from where another training ended. Returns what swap94.fit does.

    Args:
        worker: its number. Each has a seed of its own.
        before: what swap94.fit returned for the other training.

    Raises UserError if the network diverges.
    """
    functions = {
        'make_optimizer': FUNCTIONS[place.settings['net']]['make_optimizer'],
        'compute_loss': compute_loss,
    }
    net.load_state_dict(before['weights'])
    loader, losses = loader_of(place, hyp), before['losses']
    of_worker = swap94.worker_seed(seed, worker)
    result = swap94.fit(net, loader, hyp, 'phase2', of_worker, ALONE, losses, **functions)
    check_finished(result['record'], seed)
    return result


def train_swap(place, hyp, seed):
    """Algorithm 1, or what `place` has of it. Raises UserError if a network diverges.

    Returns (network, record, phase 1's result, the workers' results). swap94.train returns the
    first two, and swap94.fit the others. They are in place.folder/networks, so that a study that
    was killed goes on from there, and others may use them.
    """
    folder = place.folder / 'networks' / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    loaders = loader_of(place, hyp), place.test_loader
    functions = FUNCTIONS[place.settings['net']]
    net, record = swap94.train(*loaders, hyp, seed, checkpoints=folder, **functions)
    for part in (record, *record['workers']):
        check_finished(part, seed)
    names = ['phase1', *(f'worker{i}' for i in range(hyp['phase2']['workers']))]
    files = [folder / f'{name}.pt' for name in names]
    results = [swap94.load_result(file, ALONE, place.device) for file in files]
    if None in results:
        raise UserError(f'{folder}: a network was not written; make room, and start again')
    phase1, *workers = results
    return net, record, phase1, workers


def measure(place, hyp, net, losses, phase='phase2'):
    """Test accuracy of a network in a phase, from 0 to 1, without test-time augmentation."""
    loaders = loader_of(place, hyp), place.test_loader
    return swap94.measure(net, loaders, losses, hyp, phase, ALONE)
