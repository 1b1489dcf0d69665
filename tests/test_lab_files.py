"""Files with a changed byte, and halves of files: one line or the right content, nothing else."""

import shutil
from zipfile import BadZipFile

import pytest
import torch
from conftest import NARROW, random_set, refuse, save_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cifar10 import ARCHIVE, archive  # noqa: F401

import airbench94
from lab.data import load_set, read_tensors
from lab.errors import UserError
from lab.networks import read_network, save_network
from lab.options import override

UNPACKED = 'cifar-10-batches-py'
places = st.integers(0, 2**20)  # in a file, modulo its size
values = st.none() | st.integers(0, 255)  # of the byte there; None: the file ends before it
# The fixtures below are the same for all examples.
many = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def no_source(monkeypatch):
    """Nothing is downloaded."""
    monkeypatch.setenv('CIFAR10_URL', 'nonsense')


def is_same(found, expected):
    """Whether two contents are equal, tensors included."""
    if isinstance(expected, torch.Tensor):
        alike = isinstance(found, torch.Tensor) and found.dtype == expected.dtype
        return alike and torch.equal(found, expected)
    if isinstance(expected, dict):
        alike = isinstance(found, dict) and list(found) == list(expected)
        return alike and all(is_same(found[key], value) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        alike = type(found) is type(expected) and len(found) == len(expected)
        return alike and all(map(is_same, found, expected))
    return found == expected


def damage(file, place, value):
    """Change a byte of a file, or cut the file there."""
    content = bytearray(file.read_bytes())
    place %= len(content)
    if value is None:
        del content[place:]
    else:
        content[place] = value
    file.write_bytes(content)


def check(expected, read, *args):
    """What read(*args) returns is `expected`, or it raises UserError with one line."""
    try:
        found = read(*args)
    except UserError as error:
        assert '\n' not in str(error) and 'weights_only' not in str(error)
        return
    assert is_same(found, expected)


def load_splits(folder):
    found = load_set(folder, airbench94)
    return [found.train, found.test, found.classes, found.sha256]


#### What torch.save wrote #########################################################################


@pytest.fixture(scope='module')
def whole_set(tmp_path_factory):
    split = random_set(3)[0], torch.tensor([0, 1, 2])
    return save_set(tmp_path_factory.mktemp('set'), split, split, 'abc')


@pytest.fixture(scope='module')
def whole_network(tmp_path_factory, whole_set):
    """A file with a network of few weights, so that most of its bytes are something else."""
    hyp = override(airbench94.hyp, NARROW)
    image_set = load_set(whole_set, airbench94)
    file = tmp_path_factory.mktemp('network') / 'net.pt'
    save_network(file, torch.nn.Linear(2, 3), airbench94, hyp, image_set)
    return file


@many
@given(name=st.sampled_from(['train.pt', 'test.pt']), place=places, value=values)
def test_a_changed_byte_of_a_set(name, place, value, whole_set, tmp_path):
    shutil.copytree(whole_set, tmp_path, dirs_exist_ok=True)
    expected = load_splits(tmp_path)
    damage(tmp_path / name, place, value)
    check(expected, load_splits, tmp_path)


@many
@given(place=places, value=values)
def test_a_changed_byte_of_a_network(place, value, whole_network, tmp_path):
    shutil.copy(whole_network, tmp_path)
    expected = read_network(whole_network)
    damage(tmp_path / whole_network.name, place, value)
    check(expected, read_network, tmp_path / whole_network.name)


@many
@given(place=places, value=values)
def test_a_changed_byte_of_cifar10_from_npm(place, value, whole_set, tmp_path, monkeypatch):
    train, test, _, sha256 = load_splits(whole_set)
    monkeypatch.setattr(airbench94, 'CIFAR_SHA256', sha256)
    torch.save({'train': train, 'test': test}, tmp_path / 'cifar10.pt')
    expected = load_splits(tmp_path)
    damage(tmp_path / 'cifar10.pt', place, value)
    check(expected, load_splits, tmp_path)


def test_a_changed_pixel_is_noticed(whole_set, tmp_path):
    """torch.load would not: it doesn't look at the checksums."""
    shutil.copytree(whole_set, tmp_path, dirs_exist_ok=True)
    file = tmp_path / 'train.pt'
    content = file.read_bytes()
    pixels = torch.load(file, weights_only=True)['images'].numpy().tobytes()
    start = content.index(pixels)
    for place in (start, start + len(pixels) // 2, start + len(pixels) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert torch.load(file, weights_only=True)['images'].shape == (3, 32, 32, 3)
        with pytest.raises(UserError, match=r'train\.pt: is damaged'):
            load_set(tmp_path, airbench94)


def test_no_part_of_a_file_is_taken_for_a_folder(tmp_path):
    """With one bit changed, torch.load returns whatever is in the memory."""
    file = tmp_path / 'a.pt'
    torch.save(torch.arange(100), file)
    content = file.read_bytes()
    start = content.index(b'PK\1\2')  # where the list of the parts begins
    while start >= 0:
        changed = bytearray(content)
        changed[start + 38] = 16
        file.write_bytes(changed)
        with pytest.raises(BadZipFile, match='a checksum is wrong, or the list of the parts'):
            read_tensors(file)
        start = content.find(b'PK\1\2', start + 1)


@pytest.mark.parametrize('value', [None, 3, torch.zeros(2)])
@pytest.mark.parametrize('name', ['recipe', 'source', 'hyp', 'classes', 'mean', 'std', 'weights'])
def test_other_content_gets_one_line(name, value, whole_network, tmp_path):
    file = tmp_path / 'net.pt'
    torch.save(read_network(whole_network) | {name: value}, file)
    line = refuse('predict', file, 'a.png')
    assert line == f'{file}: is damaged, or not written by --save'


#### CIFAR-10's own files ##########################################################################


@pytest.fixture
def whole_cifar10(archive, tmp_path):  # noqa: F811
    """A folder with the archive and what is in it."""
    folder = tmp_path / 'whole'
    folder.mkdir()
    (folder / ARCHIVE).write_bytes(archive)
    load_set(folder, airbench94)
    return folder


@many
@given(
    name=st.sampled_from([ARCHIVE, f'{UNPACKED}/data_batch_3', f'{UNPACKED}/batches.meta']),
    has_both=st.booleans(),
    place=places,
    value=values,
)
def test_a_changed_byte_of_cifar10(name, has_both, place, value, whole_cifar10, tmp_path):
    """If the archive is whole, damaged files are replaced from there."""
    expected = load_splits(whole_cifar10)
    folder = tmp_path / 'changed'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole_cifar10, folder)
    if not has_both and name == ARCHIVE:
        shutil.rmtree(folder / UNPACKED)
    elif not has_both:
        (folder / ARCHIVE).unlink()
    damage(folder / name, place, value)
    check(expected, load_splits, folder)
