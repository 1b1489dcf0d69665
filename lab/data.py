"""Images and their labels: CIFAR-10, the digits, your own sets, and folders of pictures."""

import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from tqdm import tqdm

from lab.errors import UserError, first_lines
from lab.machine import is_first_process
from lab.recipes import load_recipe
from lab.runs import write_tensors

CIFAR_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
CIFAR_FILES = ('cifar-10-batches-py', 'cifar10.pt', 'cifar-10-python.tar.gz')
OWN_FILES = ('train.pt', 'test.pt')
FORMAT = (
    "expected {'images': uint8 (N, 32, 32, 3), 'labels': int64 (N,), 'classes': list of names}, "
    'written with torch.save'
)


@dataclass
class ImageSet:
    """A training and a test set, as (images uint8 (N, 32, 32, 3), labels int64 (N,))."""

    path: str
    train: tuple
    test: tuple
    classes: list  # of names
    mean: tuple  # of the channels, in units of pixel / 255
    std: tuple
    sha256: str
    is_cifar10: bool  # exactly these images, in this order

    def describe(self):
        """What config.json says about it."""
        return {
            'path': self.path,
            'train': len(self.train[1]),
            'test': len(self.test[1]),
            'classes': self.classes,
            'sha256': self.sha256,
            'is_cifar10': self.is_cifar10,
        }


def progress(items, what):
    """`items` with a progress bar, in a terminal, and only for the first of several processes."""
    hidden = None if is_first_process() else True  # None: unless in a terminal
    return tqdm(items, what, leave=False, disable=hidden)


#### Loading #######################################################################################


def describe_value(value):
    if isinstance(value, torch.Tensor):
        return f'{value.dtype} {tuple(value.shape)}'.removeprefix('torch.')
    return type(value).__name__


def check_split(file, content):
    """Raise UserError unless `content`, from `file`, is what a training or test set must be."""
    if not isinstance(content, dict) or not {'images', 'labels', 'classes'} <= content.keys():
        raise UserError(f'{file}: holds {describe_value(content)}; {FORMAT}')
    forms = {'images': (torch.uint8, (32, 32, 3)), 'labels': (torch.int64, ())}
    for name, (dtype, shape) in forms.items():
        value = content[name]
        is_tensor = isinstance(value, torch.Tensor) and value.ndim > 0
        if not is_tensor or value.dtype != dtype or value.shape[1:] != shape:
            raise UserError(f'{file}: {name} is {describe_value(value)}; {FORMAT}')
    images, labels, classes = content['images'], content['labels'], content['classes']
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(f'{file}: there are {len(images)} images and {len(labels)} labels')
    if not isinstance(classes, list) or labels.min() < 0 or labels.max() >= len(classes):
        found = f'labels from {labels.min()} to {labels.max()}, and for classes {classes}'
        raise UserError(f'{file}: has {found}; {FORMAT}')
    check_class_count(file, classes)


def check_class_count(source, classes):
    """Raise UserError if there is nothing to tell apart."""
    if len(classes) < 2:
        hint = 'perhaps there is a folder too many above the classes'
        raise UserError(f'{source}: has a single class, {classes[0]}; {hint}')


def read_split(file):
    """((images, labels), classes) from train.pt or test.pt. Raises UserError."""
    try:
        content = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        # We hide torch's own text, which suggests loading files that can run code.
        found = f'{file}: is damaged, or holds other things than tensors'
        raise UserError(f'{found}; {FORMAT}') from error
    check_split(file, content)
    classes = [str(name) for name in content['classes']]
    return (content['images'], content['labels']), classes


def load_own_set(folder):
    """(training set, test set, classes) from a folder with train.pt and test.pt."""
    train, classes = read_split(Path(folder, 'train.pt'))
    test, test_classes = read_split(Path(folder, 'test.pt'))
    if classes != test_classes:
        raise UserError(f'{folder}: training and test set have different classes')
    return train, test, classes


def load_digits(recipe):
    try:
        train, test = recipe.load_digits(True), recipe.load_digits(False)
    except ImportError as error:
        raise UserError(f'--data digits needs scikit-learn: {error}') from error
    return train, test, [str(digit) for digit in range(10)]


def load_cifar10(folder, recipe):
    try:
        train, test = recipe.load_cifar10(folder, True), recipe.load_cifar10(folder, False)
    except OSError as error:
        raise UserError(first_lines(error)) from error
    except Exception as error:  # damaged files fail in many ways
        way_out = 'delete it, or choose another folder with --data'
        raise UserError(f'{folder}: a file of CIFAR-10 is damaged; {way_out}') from error
    return train, test, CIFAR_CLASSES


def load_any(data, recipe):
    """(training set, test set, classes) for the path `data`."""
    if data == 'digits':
        return load_digits(recipe)
    if data is not None and not os.path.isdir(data):
        raise UserError(f'--data {data}: there is no such folder')
    folder = 'cifar10' if data is None else data
    if all(Path(folder, name).exists() for name in OWN_FILES):
        return load_own_set(folder)
    if data is None or any(Path(folder, name).exists() for name in CIFAR_FILES):
        return load_cifar10(folder, recipe)
    raise UserError(f'no data in {data}: expected {" and ".join(OWN_FILES)}, or {CIFAR_FILES[0]}')


def channel_statistics(images):
    """(mean, std) of each channel, in units of pixel / 255."""
    std, mean = torch.std_mean(images / 255, (0, 1, 2), correction=0)
    return tuple(mean.tolist()), tuple(std.clamp_min(1 / 255).tolist())  # a constant channel is 0


def load_set(data, recipe):
    """The ImageSet at a path. Raises UserError if it is not one.

    Args:
        data: None for CIFAR-10 in the folder cifar10, which is downloaded if it is not there;
            'digits'; or a folder with train.pt and test.pt, or with CIFAR-10.
        recipe: the module that loads CIFAR-10 and the digits.
    """
    train, test, classes = load_any(data, recipe)
    # Batches are taken out of contiguous images only. CIFAR-10's own files have channels first.
    train, test = [tuple(tensor.contiguous() for tensor in split) for split in (train, test)]
    mean, std = recipe.CIFAR_MEAN, recipe.CIFAR_STD
    if classes != CIFAR_CLASSES:
        mean, std = channel_statistics(train[0])
    digest = hashlib.sha256()
    for tensor in (*train, *test):
        digest.update(tensor.numpy())
    sha256 = digest.hexdigest()
    path = 'cifar10' if data is None else str(data)
    return ImageSet(path, train, test, classes, mean, std, sha256, sha256 == recipe.CIFAR_SHA256)


#### Making sets ###################################################################################


def read_picture(path):
    """A picture file as uint8 (32, 32, 3): squeezed into a square, so that nothing is cut off.

    Training sets and `lab predict` both use this. Raises UserError if it is not a picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert('RGB').resize((32, 32)))
    except Exception as error:  # broken pictures fail in many ways
        reason = first_lines(error)
        raise UserError(f'{path}: cannot be read as a picture: {reason}') from error


def describe_split(images, labels, classes):
    """What train.pt and test.pt hold; images: uint8 (N, 32, 32, 3)."""
    return {
        'images': torch.as_tensor(np.ascontiguousarray(images)),
        'labels': torch.as_tensor(np.array(labels), dtype=torch.int64),
        'classes': list(classes),
    }


def read_cifar100(folder, train):
    data = torchvision.datasets.CIFAR100(folder, train, download=True)
    return describe_split(data.data, data.targets, data.classes)


def read_svhn(folder, train):
    data = torchvision.datasets.SVHN(folder, 'train' if train else 'test', download=True)
    return describe_split(data.data.transpose(0, 2, 3, 1), data.labels, '0123456789')


def read_pictures(folder, train):
    """The pictures in folder/train or folder/test, which have a folder for each class."""
    data = torchvision.datasets.ImageFolder(Path(folder, 'train' if train else 'test'))
    samples = data.samples
    random.Random(0).shuffle(samples)  # recipes compute the whitening from the first images
    images = [read_picture(path) for path, _ in progress(samples, 'pictures')]
    return describe_split(np.stack(images), [label for _, label in samples], data.classes)


def check_classes(source, splits):
    """Raise UserError unless the training and the test set have the same classes."""
    train, test = (set(splits[name]['classes']) for name in ('train', 'test'))
    for name, missing in (('train', test - train), ('test', train - test)):
        if missing:
            raise UserError(f'{source}: {name} lacks the class {min(missing)}')
    check_class_count(source, splits['train']['classes'])


def make_set(source, dest):
    """Write train.pt and test.pt into the folder `dest`, or CIFAR-10's files.

    Args:
        source: 'cifar10', 'cifar100' or 'svhn', which are downloaded, or a folder of pictures,
            source/train/CLASS/* and source/test/CLASS/*.

    Raises UserError if there is no such set, or a picture cannot be read.
    """
    dest = Path(dest)
    if source == 'cifar10':
        recipe = load_recipe(Path(__file__).parent.parent / 'airbench94.py')
        train, test, _ = load_cifar10(dest, recipe)
        print(f'{dest}: CIFAR-10, {len(train[1])} + {len(test[1])} images')
        return
    readers = {'cifar100': read_cifar100, 'svhn': read_svhn}
    read = readers.get(source, read_pictures)
    folder = dest if source in readers else source
    if read is read_pictures and not Path(source).is_dir():
        names = ', '.join(['cifar10', *readers])
        raise UserError(f'{source}: is neither a folder of pictures nor one of {names}')
    try:
        splits = {'train': read(folder, True), 'test': read(folder, False)}
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for a bad download
        raise UserError(f'{source}: cannot be read: {first_lines(error)}') from error
    check_classes(source, splits)
    dest.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        write_tensors(dest / f'{name}.pt', split)
        print(f'{dest / name}.pt: {len(split["labels"])} images of {len(split["classes"])} classes')
