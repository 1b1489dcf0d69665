"""What the studies of ImageNet share: pictures, schedules, networks, and how they are trained.

Pictures lie in DATA/train/CLASS/* and DATA/val/CLASS/*. All random draws are keyed: an image's crop
and flip depend on the seed, the epoch and the image's number alone. So neither the number of
workers or ranks nor an interruption changes what a network sees.

A schedule is a list of segments, which follow each other:

    epochs      first and last, from 0
    pixels      height and width of the crops
    least_area  smallest share of the picture that a Heavy crop takes, or None for the Light crop
    shards      how many parts a step's images are cut into, one or more for each rank
    batch       images in a shard
    rates       learning rates at the first and the last epoch, linear between them

BatchNorm normalizes each shard by itself. So a step is the same on any number of ranks, to
rounding; a rank that has several shards adds their gradients up. Only the running statistics depend
on the ranks: DistributedDataParallel keeps those of the first rank's shards, and after the last
step of an epoch we take the mean over the ranks.
"""

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

import swap94
from lab.data import list_some, progress
from lab.errors import Parser, UserError, first_lines
from lab.machine import DTYPES, is_first_process, number_from, pick_device, pick_dtype
from lab.runs import open_log
from studies.common import cell_file, train_missing

#### Pictures ######################################################################################

MEAN = [123.675, 116.28, 103.53]  # of ImageNet's red, green and blue pixels, from 0 to 255
STD = [58.395, 57.12, 57.375]


class Pictures(ImageFolder):
    """The pictures of a folder that has a folder for each class. Raises UserError if it has none.

    damaged: the paths of damaged pictures that we have met.
    """

    def __init__(self, root):
        try:
            super().__init__(root)
        except OSError as error:
            layout = f'{root.parent} needs pictures in {root.name}/CLASS'
            raise UserError(f'--data: {layout}: {first_lines(error)}') from error
        self.damaged = set()

    def view(self, index, transform):
        """(uint8 image (3, H, W), label), or the path of a picture that is damaged."""
        path, label = self.samples[index]
        try:
            picture = self.loader(path)
        except (OSError, SyntaxError, ValueError):  # Pillow has all three for damaged files
            return path
        return v2.functional.pil_to_tensor(transform(picture)), label

    def report(self, paths):
        """Name damaged pictures. Raises UserError if they are more than one in a thousand."""
        for path in set(paths) - self.damaged:
            tqdm.write(f'{path}: is damaged, so we leave it out')
        self.damaged.update(paths)
        if 1000 * len(self.damaged) > len(self):
            found = f'{len(self.damaged)} of {len(self)} pictures are damaged: '
            way_out = 'more than one in a thousand; repair or delete them'
            raise UserError(f'{self.root}: {found}{list_some(self.damaged)}; {way_out}')


def stack(views):
    """(uint8 (n, 3, H, W), int64 labels (n,), paths of damaged pictures), which are left out."""
    damaged = [view for view in views if isinstance(view, str)]
    whole = [view for view in views if not isinstance(view, str)]
    images, labels = zip(*whole)
    return torch.stack(images), torch.tensor(labels), damaged


def open_data(folder):
    """(training pictures, validation pictures). Raises UserError if their classes differ."""
    train, val = Pictures(folder / 'train'), Pictures(folder / 'val')
    odd = set(train.classes) ^ set(val.classes)
    if odd:
        raise UserError(f'--data {folder}: only one of train and val has {list_some(odd)}')
    return train, val


#### Training images ###############################################################################

# Keys of random streams: (seed, image, 0) for what an image keeps through all epochs,
# (seed, image, 1 + epoch) for its draws in an epoch, and (seed, epoch, 0, 1) for an epoch's order.

FLIPS = ['none', 'random', 'alternating']


def random_crop(pixels, least_area):
    """The Heavy crop, a part of random area and aspect; or the Light one, if least_area is None."""
    if least_area is not None:
        return v2.RandomResizedCrop(pixels, scale=(least_area, 1))
    return v2.Compose([v2.Resize(pixels), v2.RandomCrop(pixels)])


def toss(*key):
    """A coin that always falls the same way for the same whole numbers."""
    return bool(np.random.default_rng(key).integers(2))


def is_mirrored(flip, seed, epoch, index):
    """Whether an image is mirrored in an epoch.

    Alternating flip tosses one coin per image, and turns it over after each epoch (Jordan 2024,
    section 3.6).
    """
    if flip == 'random':
        return toss(seed, index, 1 + epoch)
    if flip == 'alternating':
        return toss(seed, index, 0) != bool(epoch % 2)
    return False


def segment_of(schedule, epoch):
    return next(segment for segment in schedule if epoch < segment['epochs'][1])


def rate_at(segment, epoch):
    """The learning rate of a segment, at a fraction of an epoch."""
    return float(np.interp(epoch, segment['epochs'], segment['rates']))


@dataclass
class TrainingImages(Dataset):
    """Random views of pictures, as a schedule wants them. A view's key is (its number, epoch)."""

    pictures: Pictures
    schedule: list
    seed: int
    flip: str  # one of FLIPS

    def __getitem__(self, key):
        """(uint8 image (3, pixels, pixels), label), or the path of a damaged picture."""
        index, epoch = key
        segment = segment_of(self.schedule, epoch)
        crop = random_crop(segment['pixels'], segment['least_area'])
        probability = float(is_mirrored(self.flip, self.seed, epoch, index))  # 0 or 1
        transform = v2.Compose([crop, v2.RandomHorizontalFlip(probability)])
        stream = np.random.SeedSequence((self.seed, index, 1 + epoch))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
            torch.manual_seed(int(stream.generate_state(1, np.uint64)[0]))
            return self.pictures.view(index, transform)

    @property
    def epochs(self):
        """All that the schedule has, as a range."""
        return range(self.schedule[0]['epochs'][0], self.schedule[-1]['epochs'][1])

    def steps(self, epoch):
        """How many steps an epoch has. Images that fill no step are left out. Raises UserError."""
        segment = segment_of(self.schedule, epoch)
        needed = segment['shards'] * segment['batch']
        if needed > len(self.pictures):
            found = f'has {len(self.pictures)} pictures, and a step needs {needed}'
            raise UserError(f'{self.pictures.root}: {found}; choose another --scale')
        return len(self.pictures) // needed

    def keys(self, epochs, ranks):
        """Yield the keys of each shard that this rank has. Raises UserError if they can't share."""
        for epoch in epochs:
            segment = segment_of(self.schedule, epoch)
            if segment['shards'] % ranks.size:
                found = f'{ranks.size} ranks cannot share {segment["shards"]} shards evenly'
                raise UserError(f'{found}; start another number of processes')
            shape = self.steps(epoch), segment['shards'], segment['batch']
            order = np.random.default_rng((self.seed, epoch, 0, 1)).permutation(len(self.pictures))
            shards = order[: math.prod(shape)].reshape(shape)[:, ranks.rank :: ranks.size]
            for indices in shards.reshape(-1, segment['batch']).tolist():
                yield [(index, epoch) for index in indices]


#### Test images ###################################################################################


@dataclass
class TestImages(Dataset):
    """The centres of pictures: CC(pixels, share) of the paper. A view's key is its number."""

    pictures: Pictures
    pixels: int
    share: float  # of the resized picture's shorter side

    def __getitem__(self, index):
        """(uint8 image (3, pixels, pixels), label), or the path of a damaged picture."""
        resize = v2.Resize(round(self.pixels / self.share))
        return self.pictures.view(index, v2.Compose([resize, v2.CenterCrop(self.pixels)]))


#### Place #########################################################################################


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
        """
        options = {'num_workers': self.workers, 'pin_memory': self.device.type == 'cuda'}
        loader = DataLoader(images, batch_sampler=keys, collate_fn=stack, **options)
        for pixels, labels, damaged in loader:
            images.pictures.report(damaged)
            pixels = pixels.to(self.device, non_blocking=True)
            inputs = v2.functional.normalize(pixels.float(), MEAN, STD)
            inputs = inputs.contiguous(memory_format=self.memory_format)
            yield inputs, labels.to(self.device, non_blocking=True)

    def checkpoint(self, cell, seed, part='network'):
        """The file for a part of a training that may be interrupted."""
        return self.folder / 'checkpoints' / f'{cell_file(self.folder, cell, seed).stem}-{part}.pt'

    def remove_checkpoints(self, cell, seed):
        for file in self.checkpoint(cell, seed).parent.glob(self.checkpoint(cell, seed, '*').name):
            file.unlink(missing_ok=True)


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

    Raises UserError if the network diverges, or the ranks cannot share the shards.
    """
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
            raise UserError(f'the network of seed {images.seed} diverges in epoch {epoch + 1}')
        mean_statistics(net, ranks)
        seconds = swap94.clock(place.device) - start
        record['losses'].append(loss)
        record['training_seconds'] += seconds
        states = {name: part.state_dict() for name, part in parts.items()}
        swap94.save_result(checkpoint, ranks, states | {'record': record})
        if is_first_process():
            about = f'epoch {epoch + 1} of {images.epochs.stop}'
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
    own = np.arange(ranks.rank, len(place.val), ranks.size)
    keys = np.array_split(own, math.ceil(len(own) / TEST_BATCH))
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


def make_parser(study):
    parser = Parser(f'python -m studies.{study.name}', study.about)
    add = parser.add_argument
    nets = list(study.scales)
    if len(nets) > 1:
        add('--net', choices=nets, default=nets[0])
    add('--scale', choices=study.scales[nets[0]], default='small')
    add('--data', type=Path, help='folder with train/CLASS/* and val/CLASS/*')
    add('--out', type=Path, help='folder for the records; the same command again goes on')
    add('--device', help='cuda, cuda:1, mps or cpu (default: the best available)')
    about = 'of mixed precision (default: bfloat16, if the device computes it)'
    add('--dtype', choices=DTYPES, help=about)
    workers = min(16, os.cpu_count() // number_from('LOCAL_WORLD_SIZE', 1))
    about = 'processes that read pictures (default: as many as cores, up to 16 for each rank)'
    add('--workers', type=int, default=workers, help=about)
    add('--show', action='store_true', help='train nothing; make table and pictures again')
    parser.set_defaults(net=nets[0])
    return parser


def pick_autocast(name, device):
    """The dtype for mixed precision: bfloat16 where the device computes it. Raises UserError."""
    if device.type == 'cuda':
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()
    if name is None and has_bfloat16:
        name = 'bfloat16'
    return pick_dtype(name, device)


def open_place(study, args, folder):
    """The place that the command line asks for. Raises UserError."""
    if args.data is None:
        raise UserError('give --data a folder with train/CLASS/* and val/CLASS/*')
    if args.workers < 0:
        raise UserError(f'--workers {args.workers}: must be 0 or more')
    settings = study.scales[args.net][args.scale] | {'net': args.net}
    device = pick_device(args.device)
    dtype = pick_autocast(args.dtype, device)
    torch.backends.cudnn.benchmark = True
    return Place(settings, folder, *open_data(args.data), device, dtype, args.workers)


def train_all(study, args, place):
    """Train all that the study plans, together with other commands that have the same --out."""
    sizes = {'classes': len(place.train.classes), 'train': len(place.train), 'val': len(place.val)}
    config = {'study': study.name, 'scale': args.scale, 'settings': place.settings}
    config |= {'data': {'path': str(args.data)} | sizes, 'dtype': str(place.dtype)}
    open_log(place.folder, config)
    for name in ('cells', 'checkpoints'):
        (place.folder / name).mkdir(exist_ok=True)
    about = f'{study.name}, {args.net}, {args.scale} scale, on {place.device}'
    print(f'{about}; records in {place.folder}', flush=True)
    train_missing(study, place)


def train_cells(study, args, folder):
    """Train all that the study plans, each network in one process."""
    train_all(study, args, open_place(study, args, folder))
