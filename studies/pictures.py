"""Pictures in folders, and the views of them that training and tests see.

Pictures lie in DATA/train/CLASS/* and DATA/val/CLASS/*. All random draws are keyed: an image's crop
and flip depend on the seed, the epoch and the image's number alone. So neither the number of
workers or ranks nor an interruption changes what a network sees.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from lab.data import list_some
from lab.errors import UserError, first_lines

#### Pictures ######################################################################################

# What Pillow raises for damaged files; the last if they claim to be huge.
DAMAGES = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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
        except DAMAGES:
            return path
        return v2.functional.pil_to_tensor(transform(picture)), label

    def report(self, paths):
        """Name damaged pictures. Raises UserError if they are more than one in a thousand."""
        for path in set(paths) - self.damaged:
            tqdm.write(f'{path}: is damaged, so we leave it out')
        self.damaged.update(paths)
        if 1000 * len(self.damaged) > len(self):
            found = f'{len(self.damaged)} of {len(self)} pictures are damaged: '
            way_out = 'more than one in a thousand; repair them'
            raise UserError(f'{self.root}: {found}{list_some(self.damaged)}; {way_out}')


def stack(views):
    """((uint8 images (n, 3, H, W), int64 labels (n,)), paths of the damaged ones, left out).

    The first is None if all are damaged.
    """
    damaged = [view for view in views if isinstance(view, str)]
    whole = [view for view in views if not isinstance(view, str)]
    if not whole:
        return None, damaged
    images, labels = zip(*whole)
    return (torch.stack(images), torch.tensor(labels)), damaged


def open_data(folder):
    """(training pictures, validation pictures). Raises UserError if their classes differ."""
    train, val = Pictures(folder / 'train'), Pictures(folder / 'val')
    odd = set(train.classes) ^ set(val.classes)
    if odd:
        raise UserError(f'--data {folder}: only one of train and val has {list_some(odd)}')
    return train, val


#### Schedules #####################################################################################


def segment(epochs, pixels, least_area, shards, batch, rates):
    """A part of a schedule, which is a list of segments that follow each other.

    Args:
        epochs: the first, from 0, and the first of the next segment.
        pixels: height and width of the crops.
        least_area: smallest share of the picture that a Heavy crop takes; None for the Light crop.
        shards: how many parts a step's images are cut into, one or more for each rank.
        batch: images in a shard.
        rates: learning rates at both of `epochs`, linear between them.
    """
    return {
        'epochs': epochs,
        'pixels': pixels,
        'least_area': least_area,
        'shards': shards,
        'batch': batch,
        'rates': rates,
    }


def segment_of(schedule, epoch):
    return next(part for part in schedule if epoch < part['epochs'][1])


def rate_at(segment, epoch):
    """The learning rate of a segment, at a fraction of an epoch."""
    return float(np.interp(epoch, segment['epochs'], segment['rates']))


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
        part = segment_of(self.schedule, epoch)
        crop = random_crop(part['pixels'], part['least_area'])
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

    def check(self, ranks):
        """Raise UserError if these ranks cannot train on this schedule."""
        for part in self.schedule:
            if part['shards'] % ranks.size:
                found = f"{ranks.size} ranks cannot share a step's shards ({part['shards']}) evenly"
                raise UserError(f'{found}; start fewer processes')
            needed = part['shards'] * part['batch']
            if needed > len(self.pictures):
                found = f'has {len(self.pictures)} pictures, and a step needs {needed}'
                raise UserError(f'{self.pictures.root}: {found}; add more')

    def steps(self, epoch):
        """How many steps an epoch has. Images that fill no step are left out."""
        part = segment_of(self.schedule, epoch)
        return len(self.pictures) // (part['shards'] * part['batch'])

    def keys(self, epochs, ranks):
        """Yield the keys of each shard that this rank has."""
        for epoch in epochs:
            part = segment_of(self.schedule, epoch)
            shape = self.steps(epoch), part['shards'], part['batch']
            order = np.random.default_rng((self.seed, epoch, 0, 1)).permutation(len(self.pictures))
            shards = order[: math.prod(shape)].reshape(shape)[:, ranks.rank :: ranks.size]
            for indices in shards.reshape(-1, part['batch']).tolist():
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
