"""Where images come from: CIFAR-10's sources and their failures, your own sets, and pictures."""

import functools
import hashlib
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from conftest import NARROW, NOBODY, TRAIN_SET, call, random_set, refuse, save_set
from PIL import Image
from test_cifar10 import make_archive

import airbench94
from lab import data, networks
from lab.data import CIFAR_CLASSES, load_set
from lab.errors import UserError
from lab.networks import save_network
from lab.options import override
from lab.pictures import PREPARATION

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


def test_cifar10_is_not_put_where_another_set_would_hide_it(asked, folder):
    line = refuse('data', 'cifar10', folder)
    assert line == f'{folder}: holds train.pt, of another set; choose another folder'


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


def other_pictures(content):
    return content | {'pictures': 'cropped'}


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
        (other_pictures, 'training and test set were made of pictures in different ways'),
    ],
)
def test_a_wrong_set_gets_one_line(change, found, tmp_path):
    split = random_set(200)[0], torch.arange(200) % 10
    save_set(tmp_path, split, split)
    content = torch.load(tmp_path / 'test.pt', weights_only=True)
    torch.save(change(content), tmp_path / 'test.pt')
    line = one_line(tmp_path)
    assert found in line
    if change not in (other_classes, other_pictures):
        assert line.startswith(f'{tmp_path / "test.pt"}: ')
    if change is not a_single_class and found.endswith(
        ('; ', ', ')
    ):  # then it says what is expected
        assert FORMAT in line


def test_training_images_of_one_class_get_one_line(tmp_path):
    images, labels = random_set(20)
    split = images, torch.full_like(labels, 3)
    line = one_line(save_set(tmp_path, split, random_set(20)))
    assert line == f'{tmp_path}: all training images are of one class, cat'


def test_classes_of_one_split_only_are_named(tmp_path, capsys):
    images = random_set(4)[0]
    train, test = torch.tensor([0, 1, 2, 2]), torch.tensor([2, 3, 3, 4])
    load_set(save_set(tmp_path, (images, train), (images, test)), airbench94)
    assert capsys.readouterr().out.splitlines() == [
        f'{tmp_path}: no training image shows cat, deer',
        f'{tmp_path}: no test image shows airplane, automobile',
    ]


def test_a_file_of_somebody_else_is_not_called_damaged(folder, monkeypatch):
    def deny(file):
        raise PermissionError(13, 'Permission denied', str(file))

    monkeypatch.setattr(data, 'read_tensors', deny)
    with pytest.raises(PermissionError):
        load_set(folder, airbench94)


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


def test_a_damaged_cifar10_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('CIFAR10_URL', 'nonsense')
    (tmp_path / 'cifar10.pt').write_bytes(b'damaged')
    way_out = f'put {ARCHIVE} into {tmp_path}, or use --data digits'
    assert one_line(tmp_path) == f'CIFAR-10 could not be downloaded; {way_out}'


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


def test_the_set_remembers_how_pictures_were_prepared(pictures, tmp_path):
    call('data', pictures, tmp_path / 'set')
    assert load_set(tmp_path / 'set', airbench94).pictures == PREPARATION


def test_predict_gets_the_same_pixels_as_training(pictures, tmp_path, monkeypatch, capsys):
    """Whatever it is that is in the file."""
    for split in ('train', 'test'):
        grey = np.full((20, 50), 100 * 257, np.uint16)
        Image.fromarray(grey).save(pictures / split / 'cat' / 'grey.png')
        Image.new('RGBA', (30, 70), (255, 0, 0, 64)).save(pictures / split / 'dog' / 'red.png')
    call('data', pictures, tmp_path / 'set')
    found = load_set(tmp_path / 'set', airbench94)
    net = airbench94.make_net(
        override(airbench94.hyp, NARROW), 2, device='cpu', dtype=torch.float32
    )
    save_network(tmp_path / 'net.pt', net, airbench94, override(airbench94.hyp, NARROW), found)
    files = sorted(pictures.glob('train/*/*.png'))
    capsys.readouterr()
    seen = []

    def infer(net, loader, tta_level=0):
        seen.append(loader.images)
        return torch.zeros(len(loader.images), 2)

    monkeypatch.setattr(airbench94, 'infer', infer)
    assert call('predict', tmp_path / 'net.pt', *files) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(files) == 6
    [images] = seen
    assert sorted(images.flatten(1).tolist()) == sorted(found.train[0].flatten(1).tolist())
    assert [100, 100, 100] in images[:, 0, 0].tolist()
    assert [255, 191, 191] in images[:, 0, 0].tolist()

    monkeypatch.setattr(networks, 'PREPARATION', 'cropped')
    call('predict', tmp_path / 'net.pt', files[0])
    note = f'its training images were {PREPARATION}; now pictures are cropped'
    assert capsys.readouterr().out.startswith(f'{tmp_path / "net.pt"}: {note}\n')


def test_outputs_that_are_not_finite_are_refused(pictures, folder, tmp_path):
    hyp = override(airbench94.hyp, NARROW)
    net = airbench94.make_net(hyp, 10, device='cpu', dtype=torch.float32)
    torch.nn.init.constant_(net[-2].weight, torch.nan)
    save_network(tmp_path / 'net.pt', net, airbench94, hyp, load_set(folder, airbench94))
    line = refuse('predict', tmp_path / 'net.pt', pictures / 'train' / 'cat' / '32.png')
    assert line.startswith(f'{tmp_path / "net.pt"}: its outputs are not finite')


def test_pictures_that_cannot_be_read_get_one_line(pictures, tmp_path):
    broken = pictures / 'train' / 'cat' / '32.png'
    whole = broken.read_bytes()
    dest = tmp_path / 'set'
    for content in (b'', b'GIF89a', whole[: len(whole) // 2]):
        broken.write_bytes(content)
        assert refuse('data', pictures, dest).startswith(f'{broken}: cannot be read as a picture: ')
    for name in ('test/dog/90.png', 'train/cat/90.png'):
        (pictures / name).write_bytes(b'')
    line = refuse('data', pictures, dest)  # all at once
    assert line.startswith(f'{pictures}/test/dog/90.png: cannot be read as a picture: ')
    assert line.endswith(f'; nor can {pictures}/train/cat/32.png, {pictures}/train/cat/90.png')
    assert not dest.exists()


def test_what_is_no_folder_of_pictures_gets_one_line(pictures, tmp_path):
    dest = tmp_path / 'set'
    expected = f'expected {pictures}/train/CLASS/* and {pictures}/test/CLASS/*'
    shutil.move(pictures / 'test' / 'dog', tmp_path / 'dog')
    assert refuse('data', pictures, dest) == f'{pictures}: test lacks the class dog'
    shutil.copytree(tmp_path / 'dog', pictures / 'test' / 'Dog')
    both = f'{pictures}: train lacks the class Dog and test lacks the class dog'
    assert refuse('data', pictures, dest) == both
    shutil.rmtree(pictures / 'test' / 'Dog')
    shutil.move(pictures / 'train' / 'dog', tmp_path / 'train-dog')
    assert refuse('data', pictures, dest).startswith(f'{pictures}: has a single class, cat; ')
    shutil.move(tmp_path / 'train-dog', pictures / 'train' / 'dog')
    (pictures / 'test' / 'dog').mkdir()
    assert refuse('data', pictures, dest) == f'{pictures}: test has no picture of the class dog'
    for split in ('train', 'test'):
        shutil.rmtree(pictures / split)
        line = refuse('data', pictures, dest)
        assert line == f'{pictures}: has no folder {split}; {expected}'
        (pictures / split).mkdir()
    line = refuse('data', pictures, dest)
    assert line == f'{pictures}: train has no folder with pictures of a class'
    assert not dest.exists()


def test_what_is_no_picture_is_counted(pictures, tmp_path, capsys):
    for name in ('train/cat/.DS_Store', 'train/cat/a.HEIC', 'test/dog/b.heic', 'test/list.txt'):
        (pictures / name).touch()
    (pictures / 'train' / '.ipynb_checkpoints').mkdir()
    assert call('data', pictures, tmp_path / 'set') == 0
    first = capsys.readouterr().out.splitlines()[0]
    advice = 'save pictures as JPEG or PNG, in the folder of a class'
    assert first == f'{pictures}: skipped 3 files: 1 outside the classes, 2 .heic; {advice}'
    assert load_set(tmp_path / 'set', airbench94).classes == ['cat', 'dog']


def test_a_folder_that_cannot_take_a_set_is_refused_before_the_work(
    pictures, tmp_path, monkeypatch
):
    def deny(path, mode):
        return False

    monkeypatch.setattr(data, 'read_pictures', None)
    (tmp_path / 'file').touch()
    line = refuse('data', pictures, tmp_path / 'file' / 'set')
    assert line == f'{tmp_path}/file/set: {tmp_path}/file is not a folder'
    for name in ('train', 'train/cat', 'test/new/set'):
        line = refuse('data', pictures, pictures / name)
        split = name.partition('/')[0]
        assert line == f'{pictures}/{name}: is among the pictures; choose a folder outside {split}'
    monkeypatch.setattr(os, 'access', deny)
    assert refuse('data', pictures, tmp_path / 'set') == f'{tmp_path}/set: cannot be written'


def test_a_set_may_lie_next_to_its_pictures(pictures):
    for _ in range(2):
        assert call('data', pictures, pictures) == 0
        assert len(load_set(pictures, airbench94).train[1]) == 4


def test_an_interrupted_command_leaves_the_old_set(pictures, folder, tmp_path, monkeypatch):
    dest = tmp_path / 'set'
    shutil.copytree(folder, dest)
    old = load_set(dest, airbench94).sha256

    def read_picture(path):
        if path.endswith('90.png'):
            raise KeyboardInterrupt
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr(data, 'read_picture', read_picture)
    with pytest.raises(KeyboardInterrupt):
        call('data', pictures, dest)
    assert load_set(dest, airbench94).sha256 == old
    assert sorted(path.name for path in dest.iterdir()) == ['test.pt', 'train.pt']


@pytest.mark.parametrize('moved', [0, 1])
def test_two_sets_are_never_mixed(moved, pictures, folder, tmp_path, monkeypatch):
    """An old test.pt next to a new train.pt would look like a set."""
    dest = tmp_path / 'set'
    shutil.copytree(folder, dest)
    real = os.replace
    moves = []

    def replace(source, target):
        if Path(target).parent == dest:
            if len(moves) == moved:
                raise KeyboardInterrupt
            moves.append(target)
        real(source, target)

    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
        call('data', pictures, dest)
    assert [path.name for path in dest.iterdir()] == ['train.pt']
    assert one_line(dest).startswith(f'no data in {dest}: ')


@pytest.mark.parametrize('name', ['train.pt', 'test.pt'])
def test_a_full_disk_leaves_the_old_set(name, pictures, folder, tmp_path, monkeypatch):
    dest = tmp_path / 'set'
    shutil.copytree(folder, dest)
    old = load_set(dest, airbench94).sha256
    real = data.write_tensors

    def write_tensors(path, content):
        if path.name == name:
            raise UserError(f'{path} cannot be written: No space left on device')
        real(path, content)

    monkeypatch.setattr(data, 'write_tensors', write_tensors)
    assert 'No space left' in refuse('data', pictures, dest)
    assert load_set(dest, airbench94).sha256 == old
    assert sorted(path.name for path in dest.iterdir()) == ['test.pt', 'train.pt']


#### CIFAR-100 and SVHN ############################################################################


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """A folder with small files of SVHN that torchvision takes for the real ones."""
    lists = {}
    for split, labels in (('train', [10, 1, 9, 10]), ('test', [2, 10])):
        images = np.zeros((32, 32, 3, len(labels)), np.uint8)
        images[:] = labels
        images[0] = 200  # the first row
        file = tmp_path / 'svhn' / f'{split}_32x32.mat'
        file.parent.mkdir(exist_ok=True)
        scipy.io.savemat(file, {'X': images, 'y': np.array(labels, np.uint8)[:, None]})
        lists[split] = [f'{NOBODY}/{file.name}', file.name, md5(file.read_bytes())]
    monkeypatch.setattr(torchvision.datasets.SVHN, 'split_list', lists)
    return tmp_path / 'svhn'


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A folder with a small archive of CIFAR-100 that torchvision takes for the real one."""
    folder = tmp_path / 'cifar100'
    folder.mkdir()
    rows = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    contents = {
        'train': {'data': rows, 'fine_labels': [1, 0], 'coarse_labels': [0, 0]},
        'test': {'data': rows[:1], 'fine_labels': [1], 'coarse_labels': [0]},
        'meta': {'fine_label_names': ['apple', 'zebra']},
    }
    files = {name: pickle.dumps(content) for name, content in contents.items()}
    packed = make_archive({f'cifar-100-python/{name}': data for name, data in files.items()})
    (folder / 'cifar-100-python.tar.gz').write_bytes(packed)
    kind = torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, 'url', f'{NOBODY}/cifar-100-python.tar.gz')
    monkeypatch.setattr(kind, 'tgz_md5', md5(packed))
    monkeypatch.setattr(kind, 'train_list', [['train', md5(files['train'])]])
    monkeypatch.setattr(kind, 'test_list', [['test', md5(files['test'])]])
    monkeypatch.setattr(kind, 'meta', kind.meta | {'md5': md5(files['meta'])})
    return folder


def test_a_0_of_svhn_is_a_0_although_the_files_say_10(svhn, capsys):
    assert call('data', 'svhn', svhn) == 0
    found = load_set(svhn, airbench94)
    assert found.classes == list('0123456789')
    assert found.train[1].tolist() == [0, 1, 9, 0] and found.test[1].tolist() == [2, 0]
    assert found.train[0][:, 1, 0, 0].tolist() == [10, 1, 9, 10]  # which image has which label
    assert found.train[0][:, 0].unique().tolist() == [200] and found.pictures is None


def test_cifar100_has_its_fine_classes(cifar100, capsys):
    assert call('data', 'cifar100', cifar100) == 0
    found = load_set(cifar100, airbench94)
    assert found.classes == ['apple', 'zebra'] and found.train[1].tolist() == [1, 0]
    assert found.test[0][0, 0, :3, 0].tolist() == [0, 1, 2]  # the first row of the red plane
    assert found.test[0][0, 0, 0].tolist() == [0, 1024 % 256, 2048 % 256]


@pytest.mark.parametrize('name', ['svhn', 'cifar100'])
def test_without_a_network_one_line_says_what_to_do(name, request, capsys):
    folder = request.getfixturevalue(name)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1])  # as after an interrupted download
    line = refuse('data', name, folder)
    files = 'train_32x32.mat and test_32x32.mat' if name == 'svhn' else 'cifar-100-python.tar.gz'
    assert line.startswith(f'{name}: cannot be downloaded: ')
    assert line.endswith(f'; try again, or put {files} into {folder}')
    assert socket.getdefaulttimeout() is None  # as before


def test_svhn_without_scipy_gets_one_line(svhn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    assert 'scipy' in refuse('data', 'svhn', svhn)


def test_a_set_that_could_not_be_loaded_is_not_written(tmp_path, monkeypatch):
    class SVHN:
        data = np.zeros((2, 3, 32, 32), np.uint8)
        labels = np.array([10, 1])

        def __init__(self, *args, **options):
            pass

    monkeypatch.setattr(torchvision.datasets, 'SVHN', SVHN)
    assert refuse('data', 'svhn', tmp_path).startswith('svhn: has labels from 1 to 10, ')
    assert not list(tmp_path.iterdir())
