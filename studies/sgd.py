"""Training with SGD, as in Gotmare et al. 2019 (section 7.1).

The paper has momentum 0.9 and weight decay 5e-4, and divides the rate by 5 after 30%, 60% and 80%
of the epochs.
"""

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from lab.data import progress
from lab.errors import UserError
from studies.common import first_images

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


def loaders_of(place, batch_size, seed=0, *, augmented=True):
    """Loaders with as many training images as the scale has, and with as many test images.

    Augmented images are shifted by up to 4 pixels and mirrored. Digits are not mirrored.
    """
    aug = {'flip': augmented and not place.has_digits, 'translate': 4 if augmented else 0}
    loader = place.training_loader(batch_size, aug, seed=seed)
    return loader, first_images(place.test_loader, place.settings['images'])


def cross_entropy(net, inputs, labels):
    return F.cross_entropy(net(inputs).float(), labels)


def make_sgd(net, lr, weight_decay=WEIGHT_DECAY):
    """SGD with momentum, for the parameters that learn."""
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr, momentum=MOMENTUM, weight_decay=weight_decay)


def train(
    net, loader, optimizer, scheduler, epochs, *, loss=cross_entropy, on_step=None, on_epoch=None
):
    """Train for some epochs. The scheduler advances with every step.

    Raises UserError if the loss is not finite after an epoch.

    Args:
        loss: a function of (net, inputs, labels) that returns the mean over the batch.
        on_step, on_epoch: functions that we call after each step and epoch with its number, from
            1. They may evaluate the network.
    """
    torch.manual_seed(loader.seed)  # for dropout
    step = 0
    for epoch in range(1, epochs + 1):
        for inputs, labels in progress(loader, f'epoch {epoch}'):
            net.train()
            optimizer.zero_grad(set_to_none=True)
            value = loss(net, inputs, labels)
            value.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if on_step:
                on_step(step)
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
    """The same, with drops at the paper's shares of the training."""
    return dropping([place * epochs * steps_per_epoch for place in (0.3, 0.6, 0.8)])


def train_by_steps(net, loader, lr, epochs, loss=cross_entropy):
    """Train with SGD and step decay."""
    optimizer = make_sgd(net, lr)
    scheduler = LambdaLR(optimizer, step_decay(len(loader), epochs))
    train(net, loader, optimizer, scheduler, epochs, loss=loss)
