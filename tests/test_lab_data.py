"""Where images come from: CIFAR-10's sources and their failures, your own sets, and pictures."""

import functools
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import TRAIN_SET, call, random_set, refuse, save_set
from PIL import Image

import airbench94
from lab import data
from lab.data import CIFAR_CLASSES, load_set
from lab.errors import UserError

UNPACKED = 'cifar-10-batches-py'
ARCHIVE = 'cifar-10-python.tar.gz'

#### CIFAR-10 ######################################################################################

PLANES = TRAIN_SET[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


@pytest.fixture
def asked(monkeypatch):
    """A load_cifar10 of the recipe's that serves TRAIN_SET: a list of what it was asked for.

    The images lie in memory as in CIFAR-10's files, channels first.
    """
    asked = []

    def load_cifar10(folder, train):
        asked.append((str(folder), train))
        return PLANES, TRAIN_SET[1]

    monkeypatch.setattr(airbench94, 'load_cifar10', load_cifar10)
    return asked


def test_cifar10_comes_from_the_recipe(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('unpacked', UNPACKED).mkdir(parents=True)
    Path('packed').mkdir()
    Path('packed', ARCHIVE).touch()
    Path('from-npm').mkdir()
    Path('from-npm', 'cifar10.pt').touch()
    for given, folder in ((None, 'cifar10'), *[(name, name) for name in os.listdir()]):
        found = load_set(given, airbench94)
        assert found.path == folder and asked == [(folder, True), (folder, False)]
        assert found.classes == CIFAR_CLASSES and found.mean == airbench94.CIFAR_MEAN
        assert torch.equal(found.train[0], PLANES) and found.train[0].is_contiguous()
        asked.clear()


def test_the_command_downloads_cifar10(asked, tmp_path, monkeypatch, capsys):
    assert call('data', 'cifar10', tmp_path / 'here') == 0
    assert call('data', 'cifar10') == 0
    assert [folder for folder, _ in asked] == [str(tmp_path / 'here')] * 2 + ['cifar10'] * 2
    assert f'{tmp_path}/here: CIFAR-10, 200 + 200 images\n' in capsys.readouterr().out


def test_a_failed_download_of_cifar10_gets_one_line(tmp_path, monkeypatch):
    def load_cifar10(folder, train):
        raise OSError('CIFAR-10 could not be downloaded')

    monkeypatch.setattr(airbench94, 'load_cifar10', load_cifar10)
    assert refuse('data', 'cifar10', tmp_path) == 'CIFAR-10 could not be downloaded'


def test_cifar10_is_known_by_its_digest(folder, tmp_path, monkeypatch):
    sha256 = load_set(folder, airbench94).sha256
    monkeypatch.setattr(airbench94, 'CIFAR_SHA256', sha256)
    assert load_set(folder, airbench94).is_cifar10
    images, labels = TRAIN_SET
    g = torch.Generator().manual_seed(0)
    shuffled = save_set(tmp_path, (images, labels[torch.randperm(200, generator=g)]), TRAIN_SET)
    assert not load_set(shuffled, airbench94).is_cifar10


def test_the_default_folder_may_hold_a_set_of_your_own(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('CIFAR10_URL', 'nonsense')
    shutil.copytree(folder, tmp_path / 'cifar10')
    monkeypatch.chdir(tmp_path)
    found = load_set(None, airbench94)
    assert found.path == 'cifar10' and torch.equal(found.train[0], TRAIN_SET[0])


#### Sets of your own ##############################################################################


def one_line(folder):
    """What load_set has to say against a folder."""
    with pytest.raises(UserError) as error:
        load_set(folder, airbench94)
    line = str(error.value)
    assert '\n' not in line and str(folder) in line
    assert 'weights_only' not in line  # torch's advice would let files run code
    return line


FORMAT = "expected {'images': uint8 (N, 32, 32, 3), 'labels': int64 (N,), 'classes': "


def without_classes(content):
    del content['classes']
    return content


def as_list(content):
    return list(content.values())


def of_images(change):
    @functools.wraps(change)
    def changed(content):
        return content | {'images': change(content['images'])}

    return changed


def of_labels(change):
    @functools.wraps(change)
    def changed(content):
        return content | {'labels': change(content['labels'])}

    return changed


@of_images
def small_images(images):
    return images[:, 2:-2, 2:-2]


@of_images
def grey_images(images):
    return images[..., 0]


@of_images
def float_images(images):
    return images / 255


@of_images
def channels_first(images):
    return images.permute(0, 3, 1, 2)


@of_images
def fewer_images(images):
    return images[:-1]


@of_images
def nested_lists(images):
    return images[:2].tolist()


@of_images
def numpy_images(images):
    return images.numpy()


@of_labels
def int_labels(labels):
    return labels.int()


@of_labels
def columns_of_labels(labels):
    return labels[:, None]


@of_labels
def one_label(labels):
    return labels[0]


@of_labels
def labels_from_1(labels):
    return labels + 1


@of_labels
def labels_from_minus_1(labels):
    return labels - 1


def no_images(content):
    return content | {'images': content['images'][:0], 'labels': content['labels'][:0]}


def number_of_classes(content):
    return content | {'classes': 10}


def a_single_class(content):
    return content | {'classes': ['cat'], 'labels': 0 * content['labels']}


def other_classes(content):
    return content | {'classes': list('0123456789')}


@pytest.mark.parametrize(
    ('change', 'found'),
    [
        (as_list, 'holds list; '),
        (without_classes, 'holds dict; '),
        (number_of_classes, 'for classes 10; '),
        (small_images, 'images is uint8 (200, 28, 28, 3); '),
        (grey_images, 'images is uint8 (200, 32, 32); '),
        (float_images, 'images is float32 (200, 32, 32, 3); '),
        (channels_first, 'images is uint8 (200, 3, 32, 32); '),
        (nested_lists, 'images is list; '),
        (int_labels, 'labels is int32 (200,); '),
        (columns_of_labels, 'labels is int64 (200, 1); '),
        (one_label, 'labels is int64 (); '),
        (labels_from_1, 'has labels from 1 to 10, '),
        (labels_from_minus_1, 'has labels from -1 to 8, '),
        (numpy_images, 'is damaged, or holds other things than tensors; '),
        (fewer_images, 'there are 199 images and 200 labels'),
        (no_images, 'there are 0 images and 0 labels'),
        (a_single_class, 'has a single class, cat; '),
        (other_classes, 'training and test set have different classes'),
    ],
)
def test_a_wrong_set_gets_one_line(change, found, tmp_path):
    split = random_set(200)[0], torch.arange(200) % 10
    save_set(tmp_path, split, split)
    content = torch.load(tmp_path / 'test.pt', weights_only=True)
    torch.save(change(content), tmp_path / 'test.pt')
    line = one_line(tmp_path)
    assert found in line
    if change is not other_classes:
        assert line.startswith(f'{tmp_path / "test.pt"}: ')
    if change is not a_single_class and found.endswith(
        ('; ', ', ')
    ):  # then it says what is expected
        assert FORMAT in line


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_damaged_file_gets_one_line_and_stays(tmp_path):
    split = random_set(20)
    file = save_set(tmp_path, split, split) / 'train.pt'
    whole = file.read_bytes()
    pickled = pickle.dumps([1, 2])
    for content in (b'', b'not a tensor', b'<html>404</html>', pickled, whole[:-1], whole[:5000]):
        file.write_bytes(content)
        assert 'train.pt: is damaged' in one_line(tmp_path)
        assert file.read_bytes() == content


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_no_damage_ends_in_a_traceback(tmp_path):
    """torch.load raises errors of many kinds, depending on where a file is damaged."""
    split = random_set(20)
    file = save_set(tmp_path, split, split) / 'train.pt'
    whole = file.read_bytes()
    choose = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[choose.randrange(300)] = choose.randrange(256)
        file.write_bytes(damaged)
        try:
            load_set(tmp_path, airbench94)
        except UserError:
            refused += 1
    assert refused > 40


def test_a_damaged_cifar10_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('CIFAR10_URL', 'nonsense')
    (tmp_path / 'cifar10.pt').write_bytes(b'damaged')
    line = f'{tmp_path}: a file of CIFAR-10 is damaged; delete it, or choose another folder with '
    assert one_line(tmp_path) == f'{line}--data'


def test_half_a_set_is_no_set(folder, tmp_path):
    shutil.copy(folder / 'train.pt', tmp_path)
    line = one_line(tmp_path)
    assert line == f'no data in {tmp_path}: expected train.pt and test.pt, or {UNPACKED}'


def test_a_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'ran',)

    save_set(tmp_path, (Evil(), Evil()), (Evil(), Evil()))
    one_line(tmp_path)
    assert not (tmp_path / 'ran').exists()


def test_digits():
    found = load_set('digits', airbench94)
    assert (len(found.train[1]), len(found.test[1])) == (1437, 360)
    assert found.train[0].shape == (1437, 32, 32, 3) and found.train[0].max() == 255
    assert found.mean != airbench94.CIFAR_MEAN and not found.is_cifar10
    assert sorted(set(found.test[1].tolist())) == list(range(10))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UserError, match=r'^--data digits needs scikit-learn: '):
        load_set('digits', airbench94)


#### Making sets ###################################################################################


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures in different sizes, two in each class."""
    for split in ('train', 'test'):
        for number, name in enumerate(('cat', 'dog')):
            folder = tmp_path / 'pictures' / split / name
            folder.mkdir(parents=True)
            for width in (32, 90):
                colour = (200 * number, 10, 20)
                Image.new('RGB', (width, 48), colour).save(folder / f'{width}.png')
    return tmp_path / 'pictures'


def test_pictures_become_a_set(pictures, tmp_path, capsys):
    dest = tmp_path / 'new' / 'set'
    assert call('data', pictures, dest) == 0
    assert f'{dest}/train.pt: 4 images of 2 classes\n' in capsys.readouterr().out
    found = load_set(dest, airbench94)
    assert found.classes == ['cat', 'dog']
    assert found.test[1].tolist() == [1, 0, 0, 1]  # shuffled, so that the first images have both
    assert found.train[0].shape == (4, 32, 32, 3)
    colours = torch.tensor([[0, 10, 20], [200, 10, 20]], dtype=torch.uint8)
    assert torch.equal(found.train[0], colours[found.train[1], None, None].expand(4, 32, 32, 3))


def test_nothing_of_a_picture_is_cut_off(tmp_path):
    """The outermost columns of a wide picture reach the training set, and `lab predict`."""
    pixels = np.zeros((32, 320, 3), np.uint8)
    pixels[:, :10] = 250
    pixels[:, -10:] = 120
    Image.fromarray(pixels).save(tmp_path / 'wide.png')
    picture = data.read_picture(tmp_path / 'wide.png')
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert picture[:, 0].min() > 200 and 80 < picture[16, -1].max() < 140
    assert picture[:, 8:24].max() == 0


def test_what_is_no_folder_of_pictures_gets_one_line(pictures, tmp_path):
    broken = pictures / 'train' / 'cat' / '32.png'
    whole = broken.read_bytes()
    dest = tmp_path / 'set'
    for content in (b'', b'GIF89a', whole[: len(whole) // 2]):
        broken.write_bytes(content)
        assert refuse('data', pictures, dest).startswith(f'{broken}: cannot be read as a picture: ')
    broken.write_bytes(whole)
    shutil.move(pictures / 'test' / 'dog', tmp_path / 'dog')
    assert refuse('data', pictures, dest) == f'{pictures}: test lacks the class dog'
    shutil.move(pictures / 'train' / 'dog', tmp_path / 'train-dog')
    assert refuse('data', pictures, dest).startswith(f'{pictures}: has a single class, cat; ')
    shutil.move(tmp_path / 'train-dog', pictures / 'train' / 'dog')
    (pictures / 'test' / 'dog').mkdir()
    assert refuse('data', pictures, dest).startswith(f'{pictures}: cannot be read: ')
    shutil.rmtree(pictures / 'test')
    assert refuse('data', pictures, dest).startswith(f'{pictures}: cannot be read: ')
    assert not dest.exists()


class Downloaded:
    """As torchvision's CIFAR100 and SVHN are, with two images."""

    classes = ('apple', 'zebra')
    targets = (1, 0)
    labels = (1, 0)

    def __init__(self, folder, part, download):
        self.folder = folder
        self.data = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
        if part in ('train', 'test'):
            self.data = self.data.transpose(0, 3, 1, 2)  # SVHN's


@pytest.mark.parametrize('name', ['cifar100', 'svhn'])
def test_other_sets_are_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, name.upper(), Downloaded)
    monkeypatch.chdir(tmp_path)
    assert call('data', name) == 0
    found = load_set(name, airbench94)
    assert found.classes == (['apple', 'zebra'] if name == 'cifar100' else list('0123456789'))
    assert found.train[1].tolist() == [1, 0]
    assert found.test[0].flatten()[:5].tolist() == [0, 1, 2, 3, 4]


def test_a_failed_download_gets_one_line(tmp_path, monkeypatch):
    def download(*args, **options):
        raise RuntimeError('File not found or corrupted.\nmuch more')

    monkeypatch.setattr(torchvision.datasets, 'SVHN', download)
    line = refuse('data', 'svhn', tmp_path / 'set')
    assert line == 'svhn: cannot be read: File not found or corrupted. much more'
