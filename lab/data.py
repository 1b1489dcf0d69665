"""Images and their labels: CIFAR-10, the digits, your own sets, and folders of pictures."""

import hashlib
import os
import random
import socket
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from tqdm import tqdm

from lab.errors import UserError, first_lines
from lab.machine import is_first_process
from lab.pictures import PREPARATION, find_pictures, read_picture
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
    pictures: str | None = None  # how `lab data` prepared the pictures, if it made this set of them

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


def list_some(names):
    """Up to five names, and how many more there are."""
    names = sorted(names)
    rest = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return ', '.join(map(str, names[:5])) + rest


#### Loading #######################################################################################


def check_whole(file):
    """Raise BadZipFile, or another error, unless a file that torch.save wrote is as it was then.

    torch.load doesn't look at the checksums in the file. This takes 0.1 seconds for 150 MB.
    """
    with zipfile.ZipFile(file) as parts:
        damaged = parts.testzip()
        # torch takes a part with this bit for a folder, and returns whatever is in the memory.
        damaged = damaged or any(part.external_attr & 16 for part in parts.infolist())
    if damaged:
        raise zipfile.BadZipFile('a checksum is wrong, or the list of the parts')


def read_tensors(file):
    """What torch.save wrote into a file: tensors, in lists and dicts. Fails if a byte has changed.

    The errors are of many kinds, depending on where a file is damaged.
    """
    check_whole(file)
    return torch.load(file, map_location='cpu', weights_only=True)


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
    """What train.pt or test.pt holds, as a dict. Raises UserError."""
    try:
        content = read_tensors(file)
    except PermissionError:  # which says it all
        raise
    except Exception as error:
        # We hide torch's own text, which suggests loading files that can run code.
        found = f'{file}: is damaged, or holds other things than tensors'
        raise UserError(f'{found}; {FORMAT}') from error
    check_split(file, content)
    return content | {'classes': [str(name) for name in content['classes']]}


def check_labels(folder, labels, test_labels, classes):
    """Raise UserError if all training images are of one class; name what one split only has."""
    train, test = (set(values.unique().tolist()) for values in (labels, test_labels))
    if len(train) == 1:
        raise UserError(f'{folder}: all training images are of one class, {classes[train.pop()]}')
    for split, missing in (('training', test - train), ('test', train - test)):
        if missing and is_first_process():
            print(f'{folder}: no {split} image shows {list_some(classes[i] for i in missing)}')


def load_own_set(folder):
    """What load_any returns, from a folder with train.pt and test.pt."""
    train, test = (read_split(Path(folder, name)) for name in OWN_FILES)
    classes, pictures = train['classes'], train.get('pictures')
    if classes != test['classes']:
        raise UserError(f'{folder}: training and test set have different classes')
    if pictures != test.get('pictures'):
        raise UserError(f'{folder}: training and test set were made of pictures in different ways')
    check_labels(folder, train['labels'], test['labels'], classes)
    splits = [(split['images'], split['labels']) for split in (train, test)]
    return *splits, classes, pictures


def load_digits(recipe):
    try:
        train, test = recipe.load_digits(True), recipe.load_digits(False)
    except ImportError as error:
        raise UserError(f'--data digits needs scikit-learn: {error}') from error
    return train, test, [str(digit) for digit in range(10)], None


def load_cifar10(folder, recipe):
    """What load_any returns, from a folder with CIFAR-10. Recipes check it, and download it."""
    try:
        train, test = recipe.load_cifar10(folder, True), recipe.load_cifar10(folder, False)
    except OSError as error:
        raise UserError(first_lines(error)) from error
    except Exception as error:  # damaged files fail in many ways
        way_out = 'delete it, or choose another folder with --data'
        raise UserError(f'{folder}: a file of CIFAR-10 is damaged; {way_out}') from error
    return train, test, CIFAR_CLASSES, None


def load_any(data, recipe):
    """(training set, test set, classes, how pictures were prepared or None) for the path `data`."""
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
    train, test, classes, pictures = load_any(data, recipe)
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
    is_cifar10 = sha256 == recipe.CIFAR_SHA256
    return ImageSet(path, train, test, classes, mean, std, sha256, is_cifar10, pictures)


#### Making sets ###################################################################################

# What you can put into DEST yourself, if a download fails.
DOWNLOADS = {'cifar100': 'cifar-100-python.tar.gz', 'svhn': 'train_32x32.mat and test_32x32.mat'}


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


def download(name, folder):
    """CIFAR-100 or SVHN as {'train': content, 'test': content}. Raises UserError."""
    read = {'cifar100': read_cifar100, 'svhn': read_svhn}[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # seconds without a byte; torchvision would wait for ever
    try:
        return {'train': read(folder, True), 'test': read(folder, False)}
    except Exception as error:  # from the network, archives, or a missing scipy
        way_out = f'or put {DOWNLOADS[name]} into {folder}'
        line = f'{name}: cannot be downloaded: {first_lines(error)}'
        raise UserError(f'{line}; try again, {way_out}') from error
    finally:
        socket.setdefaulttimeout(timeout)


def find_splits(source):
    """{'train': {class: paths}, 'test': {class: paths}} of a folder of pictures.

    Prints how many files are no pictures. Raises UserError if the folder is not as it must be.
    """
    splits = {}
    others = Counter()
    for split in ('train', 'test'):
        folder = Path(source, split)
        if not folder.is_dir():
            expected = f'expected {source}/train/CLASS/* and {source}/test/CLASS/*'
            raise UserError(f'{source}: has no folder {split}; {expected}')
        splits[split], more = find_pictures(folder)
        others += more
    if others:
        kinds = list_some(f'{count} {kind}' for kind, count in others.items())
        advice = 'save pictures as JPEG or PNG, in the folder of a class'
        print(f'{source}: skipped {others.total()} files: {kinds}; {advice}')
    check_classes(source, splits)
    return splits


def check_classes(source, splits):
    """Raise UserError unless training and test set have the same classes, each with pictures."""
    train, test = splits['train'], splits['test']
    missing = {'train': test.keys() - train, 'test': train.keys() - test}
    lacks = [
        f'{split} lacks the class {list_some(names)}' for split, names in missing.items() if names
    ]
    if lacks:
        raise UserError(f'{source}: {" and ".join(lacks)}')
    if not train:
        raise UserError(f'{source}: train has no folder with pictures of a class')
    for split, classes in splits.items():
        empty = [name for name, paths in classes.items() if not paths]
        if empty:
            raise UserError(f'{source}: {split} has no picture of the class {list_some(empty)}')
    check_class_count(source, list(train))


def stack_pictures(paths):
    """Picture files as uint8 (N, 32, 32, 3). Raises UserError, which names those it cannot read."""
    pictures = []
    errors = {}
    for path in progress(paths, 'pictures'):
        try:
            pictures.append(read_picture(path))
        except UserError as error:
            errors[path] = error
    if errors:
        first, *others = sorted(errors)
        also = f'; nor can {list_some(others)}' if others else ''
        raise UserError(f'{errors[first]}{also}') from errors[first]
    return np.stack(pictures)


def read_pictures(source):
    """The pictures in source/train/CLASS/* and source/test/CLASS/*, as `download` returns sets."""
    splits = find_splits(source)
    samples = {}  # of each split: (path, label)
    for split, classes in splits.items():
        numbered = enumerate(classes.values())
        samples[split] = [(path, label) for label, paths in numbered for path in paths]
        random.Random(0).shuffle(samples[split])  # recipes get the whitening from the first images
    paths = [path for split in samples.values() for path, _ in split]
    images = stack_pictures(paths)
    count = len(samples['train'])
    contents = {}
    for split, part in (('train', images[:count]), ('test', images[count:])):
        labels = [label for _, label in samples[split]]
        contents[split] = describe_split(part, labels, splits[split])
        contents[split]['pictures'] = PREPARATION
    return contents


def check_dest(dest, source):
    """Raise UserError if sets cannot be written into the folder `dest`, before the long work."""
    place = dest
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f'{dest}: {place} is not a folder')
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f'{dest}: cannot be written')
    for split in ('train', 'test'):
        if dest.resolve().is_relative_to(Path(source, split).resolve()):
            raise UserError(f'{dest}: is among the pictures; choose a folder outside {split}')


def write_set(dest, contents):
    """Write train.pt and test.pt. Whatever happens, a mixture of two sets is never there."""
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest, prefix='.') as scratch:
        for split, content in contents.items():
            write_tensors(Path(scratch, f'{split}.pt'), content)
        (dest / 'test.pt').unlink(missing_ok=True)
        for name in OWN_FILES:
            os.replace(Path(scratch, name), dest / name)


def make_cifar10(dest):
    """Download CIFAR-10 into the folder `dest`, unless it is there."""
    own = [name for name in OWN_FILES if (dest / name).exists()]
    if own:
        raise UserError(f'{dest}: holds {own[0]}, of another set; choose another folder')
    recipe = load_recipe(Path(__file__).parent.parent / 'airbench94.py')
    train, test, *_ = load_cifar10(dest, recipe)
    print(f'{dest}: CIFAR-10, {len(train[1])} + {len(test[1])} images')


def make_set(source, dest):
    """Write train.pt and test.pt into the folder `dest`, or CIFAR-10's files.

    Args:
        source: 'cifar10', 'cifar100' or 'svhn', which are downloaded, or a folder of pictures,
            source/train/CLASS/* and source/test/CLASS/*.

    Raises UserError if there is no such set, or a picture cannot be read. Then, and if it is
    interrupted, an older set stays as it was.
    """
    dest = Path(dest)
    if source == 'cifar10':
        make_cifar10(dest)
        return
    check_dest(dest, source)
    if source in DOWNLOADS:
        contents = download(source, dest)
    elif Path(source).is_dir():
        contents = read_pictures(source)
    else:
        names = ', '.join(['cifar10', *DOWNLOADS])
        raise UserError(f'{source}: is neither a folder of pictures nor one of {names}')
    for content in contents.values():
        check_split(source, content)
    write_set(dest, contents)
    for split, content in contents.items():
        found = f'{len(content["labels"])} images of {len(content["classes"])} classes'
        print(f'{dest / split}.pt: {found}')
