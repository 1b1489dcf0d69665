"""Plain training, and curves between networks (Gotmare et al. 2019, section 2.1)."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

import airbench94
import swap94
from lab.data import progress
from lab.errors import UserError
from lab.options import override
from lab.runs import write_tensors
from studies.common import first_images, read_networks
from studies.networks import make_resnet, make_vgg

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # section 7.1
STATISTICS = {'images': 10_000, 'batch_size': 500}  # for BatchNorm's, at a point of a curve

NETS = ('vgg16-bn', 'vgg16', 'airbench')  # that most studies of heuristics offer with --net

#### Networks ######################################################################################


def make_airbench(num_classes, *, share, seed, device, dtype):
    """airbench94's network, untrained. Its first layer still needs whitening."""
    widths = airbench94.hyp['net']['widths']
    own = [f'net.widths.{name}={max(1, round(share * w))}' for name, w in widths.items()]
    hyp = override(airbench94.hyp, own)
    compute_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return airbench94.make_net(hyp, num_classes, seed=seed, device=device, dtype=compute_dtype)


def make_network(name, loader, share, seed, variance=2.0):
    """An untrained network for a loader's images.

    Args:
        name: as for `--net`.
        share: of the network's full widths.
        variance: of the initial weights; see networks.finish.
    """
    options = {'share': share, 'seed': seed, 'device': loader.device, 'dtype': loader.dtype}
    classes = loader.num_classes
    if name == 'airbench':
        net = make_airbench(classes, **options)
        images = loader.normalize(loader.images[:5000])
        airbench94.init_whitening_conv(net[0], images, airbench94.hyp['net']['whiten_eps'])
        return net
    options['variance'] = variance
    if name.startswith('resnet'):
        return make_resnet(int(name.removeprefix('resnet')), classes, **options)
    depth, _, norm = name.removeprefix('vgg').partition('-')
    return make_vgg(int(depth), classes, batchnorm=norm == 'bn', **options)


def vector_of(weights):
    """{name: parameter} as one vector."""
    return torch.cat([p.flatten() for p in weights.values()])


def parameters_of(net):
    """{name: a copy of the parameter}."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


#### Training ######################################################################################


def cross_entropy(net, inputs, labels):
    return F.cross_entropy(net(inputs).float(), labels)


def make_sgd(net, lr, weight_decay=WEIGHT_DECAY):
    """SGD with momentum, for the parameters that learn."""
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr, momentum=MOMENTUM, weight_decay=weight_decay)


def train(net, loader, optimizer, scheduler, epochs, *, loss=cross_entropy, on_epoch=None):
    """Train for some epochs. The scheduler advances with every step.

    Raises UserError if the loss is not finite after an epoch.

    Args:
        loss: a function of (net, inputs, labels) that returns the mean over the batch.
        on_epoch: a function that we call after each epoch with its number, from 1.
    """
    for epoch in range(1, epochs + 1):
        net.train()
        for inputs, labels in progress(loader, f'epoch {epoch}'):
            optimizer.zero_grad(set_to_none=True)
            value = loss(net, inputs, labels)
            value.backward()
            optimizer.step()
            scheduler.step()
        if not torch.isfinite(value):
            raise UserError(f'the training diverges: the loss is {value} after epoch {epoch}')
        if on_epoch:
            on_epoch(epoch)


def linear_decay(steps):
    """A function: the learning rate at a step, as a share of the first one. It ends at 0."""

    def share(step):
        return 1 - step / steps

    return share


def dropping(drops, factor=0.2):
    """The same, where the rate is multiplied by `factor` at each of the steps `drops`."""

    def share(step):
        return factor ** sum(step >= drop for drop in drops)

    return share


def step_decay(steps_per_epoch, epochs):
    """The same, with drops at the paper's shares of the training (section 7.1)."""
    return dropping([place * epochs * steps_per_epoch for place in (0.3, 0.6, 0.8)])


def train_by_steps(net, loader, lr, epochs, loss=cross_entropy):
    """Train with SGD and step decay."""
    optimizer = make_sgd(net, lr)
    scheduler = LambdaLR(optimizer, step_decay(len(loader), epochs))
    train(net, loader, optimizer, scheduler, epochs, loss=loss)


def loaders_of(place, batch_size, augmented=True):
    """Loaders with as many training images as the scale has, and with as many test images.

    Digits are not mirrored.
    """
    aug = {'flip': augmented and not place.has_digits, 'translate': 4 if augmented else 0}
    loader = place.training_loader(batch_size, aug)
    return loader, first_images(place.test_loader, place.settings['images'])


def weights_file(place, name, seed):
    """The file for a network's {name: parameter}."""
    folder = place.folder / 'networks'
    folder.mkdir(exist_ok=True)
    return folder / f'{name}-{seed}.pt'


def save_weights(place, name, seed, weights):
    detached = {key: p.detach() for key, p in weights.items()}
    write_tensors(weights_file(place, name, seed), detached)


def read_weights(place, name, seed):
    file = weights_file(place, name, seed)
    way_out = f'delete the records of seed {seed}, and they will be made again'
    return {key: p.to(place.device) for key, p in read_networks(file, way_out).items()}


#### Curves ########################################################################################


def chain(t):
    """The shares of (one end, the bend, the other end) at t in [0, 1] on a polygonal chain."""
    if t <= 0.5:
        return 1 - 2 * t, 2 * t, 0
    return 0, 2 - 2 * t, 2 * t - 1


def bezier(t):
    """The same for a quadratic Bezier curve."""
    return (1 - t) ** 2, 2 * t * (1 - t), t**2


KINDS = {'chain': chain, 'bezier': bezier}


@dataclass
class Curve:
    """A curve from one network to another, with a bend, which learns.

    All three are {name: parameter}, and kind is one of KINDS. If the bend is in the middle of the
    ends, the curve is a segment.
    """

    first: dict
    last: dict
    bend: dict
    kind: str = 'chain'

    def weights(self, t):
        """The parameters at t in [0, 1]."""
        of_first, of_bend, of_last = KINDS[self.kind](t)
        weights = {}
        for name, bend in self.bend.items():
            ends = of_first * self.first[name] + of_last * self.last[name]
            weights[name] = ends + of_bend * bend
        return weights


def new_curve(first, last, net, kind='chain'):
    """A curve between two networks, {name: parameter}, with its bend in the middle.

    The parameters of the bend that learn are those that learn in `net`.
    """
    bend = {}
    for name, p in net.named_parameters():
        middle = torch.lerp(first[name], last[name], 0.5)
        bend[name] = middle.requires_grad_(p.requires_grad)
    return Curve(first, last, bend, kind)


def train_curve(curve, net, loader, lr, epochs, seed, on_epoch=None):
    """Lower the curve's expected loss, over t ~ U(0, 1), with SGD on its bend.

    The learning rate is constant for half of the epochs, and then falls to a hundredth within 0.4
    of them, as in Garipov et al. 2018 (arXiv:1802.10026). `net` is any network of the curve's kind.
    """
    rng = np.random.default_rng(seed)
    bend = [p for p in curve.bend.values() if p.requires_grad]
    steps = epochs * len(loader)

    def loss(net, inputs, labels):
        outputs = functional_call(net, curve.weights(rng.random()), (inputs,))
        return F.cross_entropy(outputs.float(), labels)

    def share(step):
        return float(np.interp(step / steps, [0.5, 0.9], [1, 0.01]))

    optimizer = torch.optim.SGD(bend, lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    scheduler = LambdaLR(optimizer, share)
    train(net, loader, optimizer, scheduler, epochs, loss=loss, on_epoch=on_epoch)


@torch.no_grad()
def load_parameters(net, weights):
    """Write {name: parameter} into a network."""
    for name, p in net.named_parameters():
        p.copy_(weights[name])


def measure(net, weights, train_loader, test_loader):
    """Mean losses and accuracies, in [0, 1], of the network with these parameters.

    They are measured without augmentation, after recomputing BatchNorm's statistics.
    """
    load_parameters(net, weights)
    if any('running' in name for name, _ in net.named_buffers()):
        swap94.recompute_statistics(net, train_loader, STATISTICS, swap94.Ranks())
    found = {}
    for name, loader in (('train', train_loader), ('val', test_loader)):
        logits = airbench94.infer(net, loader).float()
        found[f'{name}_loss'] = F.cross_entropy(logits, loader.labels).item()
        found[f'{name}_acc'] = (logits.argmax(1) == loader.labels).double().mean().item()
    return found


def measure_curve(curve, net, loaders, points):
    """A list with what `measure` finds at so many points, evenly spaced from t = 0 to 1."""
    with torch.no_grad():
        return [measure(net, curve.weights(t), *loaders) for t in np.linspace(0, 1, points)]


def values_of(points, key):
    """An array of the points' losses, or of their errors in percent if `key` is an accuracy."""
    values = np.array([point[key] for point in points])
    return values if key.endswith('loss') else 100 * (1 - values)


def barrier(values):
    """The largest value on a path minus the larger of the values at its ends."""
    return max(values) - max(values[0], values[-1])
