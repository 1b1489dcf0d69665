"""What the studies of ImageNet share: where they train, networks, training and tests.

BatchNorm normalizes each shard of a step by itself (see segment in pictures.py). So a step is the
same on any number of ranks, to rounding; a rank that has several shards adds their gradients up.
Only the running statistics depend on the ranks: DistributedDataParallel keeps those of the first
rank's shards, and after the last step of an epoch we take the mean over the ranks.
"""

import hashlib
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import swap94
from lab.data import list_some, progress
from lab.errors import UserError
from lab.machine import DTYPES, is_first_process, number_from, pick_device, pick_dtype
from studies.common import cell_file, settings_of, train_planned
from studies.pictures import Pictures, TestImages, open_data, rate_at, segment_of, stack

#### Place #########################################################################################

MEAN = [123.675, 116.28, 103.53]  # of ImageNet's red, green and blue pixels, from 0 to 255
STD = [58.395, 57.12, 57.375]


@dataclass
class Place:
    """Where a study trains: with the settings of a scale, on pictures, on a device."""

    settings: dict
    folder: Path  # of the records
    train: Pictures
    val: Pictures
    device: torch.device
    dtype: torch.dtype  # of autocast
    workers: int  # processes of each loader

    def describe_data(self):
        """What the records say about the pictures."""
        sizes = {'train': len(self.train), 'val': len(self.val)}
        about = {'path': str(self.train.root.parent), 'classes': len(self.train.classes)} | sizes
        return about | {'sha256_of_names': hash_names([self.train, self.val])}

    @property
    def memory_format(self):
        # On CPUs in fp32, channels_last takes three times as long.
        if self.device.type == 'cpu' and self.dtype == torch.float32:
            return torch.contiguous_format
        return torch.channels_last

    def autocast(self):
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def batches(self, images, keys):
        """Yield the inputs (n, 3, pixels, pixels) and labels (n,) of each list of keys.

        Args:
            images: TrainingImages or TestImages.

        Raises UserError if too many pictures are damaged.
        """
        options = {'num_workers': self.workers, 'pin_memory': self.device.type == 'cuda'}
        loader = DataLoader(images, batch_sampler=keys, collate_fn=stack, **options)
        for whole, damaged in loader:
            images.pictures.report(damaged)
            if whole is None:
                found = f'all pictures of a batch are damaged: {list_some(damaged)}'
                raise UserError(f'{images.pictures.root}: {found}; repair them')
            pixels, labels = whole
            pixels = pixels.to(self.device, non_blocking=True)
            inputs = v2.functional.normalize(pixels.float(), MEAN, STD)
            inputs = inputs.contiguous(memory_format=self.memory_format)
            yield inputs, labels.to(self.device, non_blocking=True)

    def checkpoint(self, cell, seed, part='network'):
        """The file for a part of a training that may be interrupted."""
        folder = self.folder / 'checkpoints'
        folder.mkdir(exist_ok=True)
        return folder / f'{cell_file(self.folder, cell, seed).stem}-{part}.pt'

    def remove_checkpoints(self, cell, seed):
        of_any_part = self.checkpoint(cell, seed, '*')
        for file in of_any_part.parent.glob(of_any_part.stem):  # also what was half written
            file.unlink(missing_ok=True)


def hash_names(sets):
    """The SHA-256 of the pictures' paths inside their folders, which start with their classes."""
    names = [os.path.relpath(path, part.root) for part in sets for path, _ in part.samples]
    return hashlib.sha256('\n'.join(names).encode(errors='surrogateescape')).hexdigest()


#### Network #######################################################################################


class BlurPool(nn.Module):
    """A strided convolution of blurred inputs, which aliases less (Zhang 2019)."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        line = torch.tensor([0.25, 0.5, 0.25])
        blur = torch.outer(line, line).expand(conv.in_channels, 1, 3, 3)
        self.register_buffer('blur', blur.clone())

    def forward(self, inputs):
        return self.conv(F.conv2d(inputs, self.blur, padding=1, groups=self.conv.in_channels))


def add_blurs(net):
    """Put a BlurPool in the place of each strided convolution, except the first layer."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.stride[0] > 1 and child.in_channels > 3:
                setattr(module, name, BlurPool(child))


def make_net(place, seed):
    """The torchvision network called settings['net'], whose residual blocks begin as identities."""
    make = getattr(torchvision.models, place.settings['net'])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make(num_classes=len(place.train.classes), zero_init_residual=True)
    if place.settings['blurs']:
        add_blurs(net)
    return net.to(place.device, memory_format=place.memory_format)


def batch_norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def mean_statistics(net, ranks):
    """Replace BatchNorm's statistics by their mean over the ranks."""
    for norm in batch_norms(net):
        for statistics in (norm.running_mean, norm.running_var):
            ranks.sum(statistics.div_(ranks.size))


#### Training ######################################################################################


def make_optimizer(net, momentum, weight_decay):
    """SGD, without weight decay for BatchNorm. The learning rate is set before each step."""
    free = [p for norm in batch_norms(net) for p in norm.parameters()]
    free_ids = {id(p) for p in free}
    decayed = [p for p in net.parameters() if id(p) not in free_ids]
    groups = [{'params': decayed, 'weight_decay': weight_decay}, {'params': free}]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum)


def train_step(model, shards, optimizer, scaler, place):
    """One step on this rank's shards, each (inputs, labels). Returns the sum of their losses."""
    smoothing = place.settings['label_smoothing']
    total = 0
    optimizer.zero_grad()
    for inputs, labels in shards:
        with place.autocast():
            loss = F.cross_entropy(model(inputs), labels, label_smoothing=smoothing)
        scaler.scale(loss / len(shards)).backward()
        total += loss.detach()
    scaler.step(optimizer)
    scaler.update()
    return total


def train_epoch(model, stream, optimizer, scaler, place, ranks, images, epoch):
    """Train for an epoch on a stream of this rank's shards. Returns the mean loss of all ranks."""
    segment = segment_of(images.schedule, epoch)
    steps = images.steps(epoch)
    total = torch.zeros((), device=place.device)
    for step in progress(range(steps), f'epoch {epoch + 1} of {images.epochs.stop}'):
        for group in optimizer.param_groups:
            group['lr'] = rate_at(segment, epoch + step / steps)
        shards = list(itertools.islice(stream, segment['shards'] // ranks.size))
        total += train_step(model, shards, optimizer, scaler, place)
    return ranks.sum(total).item() / (steps * segment['shards'])


def fit(net, images, place, ranks, checkpoint):
    """Train `net` on all epochs of a schedule, or on those that a checkpoint lacks.

    Args:
        net: with the same weights on all ranks.
        images: TrainingImages.
        ranks: those that train this network together.
        checkpoint: a file that is written after each epoch. The same call continues from it.

    Returns:
        {'training_seconds': without validation, 'losses': mean training loss of each epoch}.

    Raises UserError if the network diverges, too many pictures are damaged, or the ranks cannot
    train on this schedule.
    """
    images.check(ranks)
    optimizer = make_optimizer(net, place.settings['momentum'], place.settings['weight_decay'])
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
    parts = {'net': net, 'optimizer': optimizer, 'scaler': scaler}
    record = {'training_seconds': 0.0, 'losses': []}
    saved = swap94.load_result(checkpoint, ranks, place.device)
    if saved is not None:
        record = saved['record']
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    model = net.train()
    if ranks.size > 1:
        model = DistributedDataParallel(net, process_group=ranks.group)
    missing = images.epochs[len(record['losses']) :]
    stream = place.batches(images, images.keys(missing, ranks))
    for epoch in missing:
        start = swap94.clock(place.device)
        loss = train_epoch(model, stream, optimizer, scaler, place, ranks, images, epoch)
        if not math.isfinite(loss):
            raise UserError(f'{checkpoint.stem} diverges in epoch {epoch + 1}')
        mean_statistics(net, ranks)
        seconds = swap94.clock(place.device) - start
        record['losses'].append(loss)
        record['training_seconds'] += seconds
        states = {name: part.state_dict() for name, part in parts.items()}
        swap94.save_result(checkpoint, ranks, states | {'record': record})
        if is_first_process():
            about = f'{checkpoint.stem}, epoch {epoch + 1} of {images.epochs.stop}'
            tqdm.write(f'{about}: loss {loss:.3f}, {seconds:.0f} s')
    return record


#### Evaluation ####################################################################################

TEST_BATCH = 250  # images


def hits(outputs, labels):
    """How many labels are the likeliest class, and how many are one of the five likeliest: (2,)."""
    best = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
    return torch.stack([best[:, 0].sum(), best.sum()])


@torch.no_grad()
def evaluate(net, crop, place, ranks):
    """The accuracies of `net` on a test crop, (pixels, share), from 0 to 1.

    Returns:
        {'top1', 'top5': of the images; 'tta_top1', 'tta_top5': of the mean of the outputs for the
        image and its mirror image}.
    """
    images = TestImages(place.val, *crop)
    own = range(ranks.rank, len(place.val), ranks.size)
    keys = [own[i : i + TEST_BATCH] for i in range(0, len(own), TEST_BATCH)]
    net.eval()
    counts = torch.zeros(5, device=place.device)
    for inputs, labels in place.batches(images, progress(keys, 'test')):
        with place.autocast():
            outputs = net(inputs).float()
            both = outputs + net(inputs.flip(-1)).float()
        counts[0] += len(labels)
        counts[1:] += torch.cat([hits(outputs, labels), hits(both, labels)])
    total, *right = ranks.sum(counts).tolist()
    names = ['top1', 'top5', 'tta_top1', 'tta_top5']
    return {name: count / total for name, count in zip(names, right)}


#### Command line ##################################################################################


def add_options(parser):
    """The options for data and precision, instead of those of common.py."""
    add = parser.add_argument
    add('--data', type=Path, help='folder with train/CLASS/* and val/CLASS/*')
    about = 'of mixed precision (default: bfloat16, if the device computes it)'
    add('--dtype', choices=DTYPES, help=about)
    workers = min(16, os.cpu_count() // max(1, number_from('LOCAL_WORLD_SIZE', 1)))
    about = 'processes that read pictures (default: as many as cores, up to 16 for each rank)'
    add('--workers', type=int, default=workers, help=about)


def pick_autocast(name, device):
    """The dtype for mixed precision: bfloat16 where the device computes it. Raises UserError."""
    if device.type == 'cuda':
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()
    if name is None and has_bfloat16:
        name = 'bfloat16'
    return pick_dtype(name, device)


def open_place(settings, args, folder):
    """The place that the command line asks for. Raises UserError."""
    if args.data is None:
        raise UserError('give --data a folder with train/CLASS/* and val/CLASS/*')
    if args.workers < 0:
        raise UserError(f'--workers {args.workers}: must be 0 or more')
    device = pick_device(args.device)
    dtype = pick_autocast(args.dtype, device)
    torch.backends.cudnn.benchmark = True
    return Place(settings, folder, *open_data(args.data), device, dtype, args.workers)


def train_cells(study, args, folder):
    """Do all that the study plans, each network in one process."""
    place = open_place(settings_of(study, args), args, folder)
    train_planned(study, args.scale, place, place.describe_data())
