"""Curves between networks, and the barriers on them (Garipov et al. 2018, arXiv:1802.10026).

A curve joins two trained networks by way of a bend, which we train for the smallest expected loss
of a point on the curve. Gotmare et al. 2019 use it (section 2.1).

As in the authors' code (github.com/timgaripov/dnn-mode-connectivity), weight decay pulls at the
point of a step, not at the bend, for which it would be 3 times as strong on a chain, and 7.5 times
on a Bezier curve. Gotmare et al. don't give the curves' learning rate: we begin with that of the
networks, 0.05; the command in that code, for 600 epochs of VGG-16, has 0.015.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

import airbench94
import swap94
from studies import networks, sgd

STATISTICS = {'images': 10_000, 'batch_size': 500}  # for BatchNorm's, at a point of a curve


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


def train_curve(curve, net, loader, lr, epochs, on_epoch=None):
    """Lower the curve's expected loss, over t ~ U(0, 1), with SGD on its bend.

    The learning rate is constant for half of the epochs, and then falls to a hundredth within 0.4
    of them, as in Garipov et al. `net` is any network of the curve's kind.
    """
    rng = np.random.default_rng(loader.seed)
    bend = [p for p in curve.bend.values() if p.requires_grad]
    steps = epochs * len(loader)

    def loss(net, inputs, labels):
        weights = curve.weights(rng.random())
        outputs = functional_call(net, weights, (inputs,))
        return F.cross_entropy(outputs.float(), labels) + decay(weights)

    def share(step):
        return float(np.interp(step / steps, [0.5, 0.9], [1, 0.01]))

    optimizer = torch.optim.SGD(bend, lr, momentum=sgd.MOMENTUM)
    scheduler = LambdaLR(optimizer, share)
    sgd.train(net, loader, optimizer, scheduler, epochs, loss=loss, on_epoch=on_epoch)


def decay(weights):
    """The loss whose gradient is the weight decay of {name: parameter}."""
    return sgd.WEIGHT_DECAY / 2 * sum(p.square().sum() for p in weights.values())


def parameters_of(net):
    """{name: a copy of the parameter}."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def vector_of(weights):
    """{name: parameter} as one vector."""
    return torch.cat([p.flatten() for p in weights.values()])


def named_like(vector, net):
    """A vector as {name: parameter}, with the shapes and dtypes of a network's parameters."""
    sizes = [p.numel() for p in net.parameters()]
    parts = zip(net.named_parameters(), vector.split(sizes))
    return {name: part.view(p.shape).to(p.dtype) for (name, p), part in parts}


def measure(net, weights, train_loader, test_loader):
    """Mean losses and accuracies, in [0, 1], of the network with these parameters.

    They are measured without augmentation, after recomputing BatchNorm's statistics from full
    batches of training images.
    """
    net.load_state_dict(weights, strict=False)  # there are no buffers among them
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


def print_about(settings):
    """Print which networks and curves the records are of."""
    at = 'points' if 'dropout' in settings else 'bends, by an older version'
    print(f'{networks.describe(settings)}; curves with weight decay at their {at}')
