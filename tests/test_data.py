"""Where data comes from: CIFAR-10's sources and their failures, sets of one's own, and digits."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, made_up_split, save_set

import airbench94
from airbench94 import UserError, download_cifar10, load_data

UNPACKED = 'cifar-10-batches-py'
ARCHIVE = 'cifar-10-python.tar.gz'


def batch_bytes(split):
    pixels = split['images'].numpy().transpose(0, 3, 1, 2).reshape(len(split['images']), -1)
    labels = split['labels'].tolist()
    return pickle.dumps({'data': np.ascontiguousarray(pixels), 'labels': labels})


class Archive:
    """A small cifar-10-python.tar.gz.

    `splits` are its training and its test set, `attributes` what torchvision's CIFAR10 must have
    to take it for the real one.
    """

    def __init__(self):
        parts = [made_up_split(8, seed=seed) for seed in range(6)]
        files = {f'data_batch_{i + 1}': batch_bytes(part) for i, part in enumerate(parts[:5])}
        files['test_batch'] = batch_bytes(parts[5])
        files['batches.meta'] = pickle.dumps({'label_names': airbench94.CIFAR_CLASSES})
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(f'{UNPACKED}/{name}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        self.content = buffer.getvalue()
        train = {key: torch.cat([part[key] for part in parts[:5]]) for key in ('images', 'labels')}
        self.splits = {True: train, False: parts[5]}
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
        meta = {'filename': 'batches.meta', 'key': 'label_names', 'md5': md5['batches.meta']}
        self.attributes = {
            'tgz_md5': hashlib.md5(self.content).hexdigest(),
            'train_list': [[name, md5[name]] for name in list(files)[:5]],
            'test_list': [['test_batch', md5['test_batch']]],
            'meta': meta,
        }

    def check(self, folder):
        """See that the folder serves this set."""
        for is_train, split in self.splits.items():
            data = load_data(folder, is_train)
            assert torch.equal(data['images'], split['images'])
            assert torch.equal(data['labels'], split['labels'])
            assert data['classes'] == airbench94.CIFAR_CLASSES
            assert data['mean'] == airbench94.CIFAR_MEAN


def one_line(folder, train=True):
    """What load_data has to say against a folder."""
    with pytest.raises(UserError) as error:
        load_data(folder, train)
    line = str(error.value)
    assert '\n' not in line and str(folder) in line
    assert 'weights_only' not in line  # torch's advice would let files run code
    return line


@pytest.fixture(scope='module')
def whole():
    return Archive()


@pytest.fixture
def archive(whole, monkeypatch):
    """The small archive, which torchvision takes for CIFAR-10's."""
    for name, value in whole.attributes.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    return whole


@pytest.fixture
def server(whole):
    """A loopback server of /whole, /truncated, /wrong and /stalled: (URL, requested paths)."""
    content = whole.content
    half = content[: len(content) // 2]
    answers = {
        '/whole': content,
        '/truncated': half,
        '/wrong': content[:-1] + b'?',
        '/stalled': half,
    }
    asked = []
    closing = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in answers:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have gone
                self.wfile.write(answers[self.path])
                if self.path == '/stalled':
                    closing.wait(60)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}', asked
        closing.set()
        httpd.shutdown()


def test_a_download_is_made_once(archive, server, tmp_path, monkeypatch, capsys):
    url, asked = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    folder = tmp_path / 'new' / 'cifar10'
    download_cifar10(folder)
    archive.check(folder)
    assert f'CIFAR-10 from {url}/whole' in capsys.readouterr().out
    count = len(asked)
    download_cifar10(folder)
    assert len(asked) == count and capsys.readouterr().out == ''


@pytest.mark.parametrize('fault', ['truncated', 'wrong', 'stalled', 'missing'])
def test_where_a_source_fails_the_next_one_serves(
    fault, archive, server, tmp_path, monkeypatch, capsys
):
    url, _ = server
    monkeypatch.setattr(airbench94, 'PATIENCE', 0.5 if fault == 'stalled' else 15)
    monkeypatch.setattr(airbench94, 'CIFAR_URLS', [f'{url}/{fault}', f'{url}/whole'])
    start = time.monotonic()
    download_cifar10(tmp_path)
    assert time.monotonic() - start < 30  # a stalled server waits for 60
    archive.check(tmp_path)
    out = capsys.readouterr().out
    assert f'{url}/{fault}\n  failed: ' in out and f'{url}/whole' in out


@pytest.mark.parametrize('fault', ['truncated', 'missing', 'no-url'])
def test_where_all_sources_fail_there_is_no_set(fault, archive, server, tmp_path, monkeypatch):
    url = 'nonsense' if fault == 'no-url' else f'{server[0]}/{fault}'
    monkeypatch.setenv('CIFAR10_URL', url)
    with pytest.raises(UserError, match=f'could not be downloaded .{url}: '):
        download_cifar10(tmp_path)
    with pytest.raises(UserError, match='no data'):
        load_data(tmp_path)
    monkeypatch.setenv('CIFAR10_URL', f'{server[0]}/whole')
    download_cifar10(tmp_path)
    archive.check(tmp_path)


def test_an_archive_in_the_folder_needs_no_source(archive, server, tmp_path, monkeypatch):
    url, asked = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    (tmp_path / ARCHIVE).write_bytes(archive.content)
    download_cifar10(tmp_path)
    archive.check(tmp_path)
    assert asked == []


def test_a_damaged_archive_in_the_folder_is_replaced(archive, server, tmp_path, monkeypatch):
    url, asked = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    (tmp_path / ARCHIVE).write_bytes(archive.content[:-9])
    download_cifar10(tmp_path)
    archive.check(tmp_path)
    assert asked


def test_a_set_of_ones_own_in_the_folder_needs_no_source(folder, monkeypatch):
    monkeypatch.setenv('CIFAR10_URL', 'nonsense')
    download_cifar10(folder)


DOWNLOAD = """
import json, sys, torchvision
sys.path.insert(0, sys.argv[1])
import airbench94
for name, value in json.loads(sys.argv[2]).items():
    setattr(torchvision.datasets.CIFAR10, name, value)
airbench94.download_cifar10(sys.argv[3])
images = airbench94.load_data(sys.argv[3])['images']
print(len(images))
"""


def start_download(folder, archive, url):
    command = [sys.executable, '-c', DOWNLOAD, ROOT, json.dumps(archive.attributes), folder]
    environment = os.environ | {'CIFAR10_URL': url}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_downloads(archive, server, tmp_path):
    url, asked = server
    processes = [start_download(tmp_path, archive, f'{url}/whole') for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [output.splitlines()[-1] for output in outputs] == ['40', '40']
    assert asked == ['/whole'] * 2  # torchvision asks for redirections, and then for the file
    archive.check(tmp_path)


@pytest.mark.parametrize('moment', ['downloading', 'unpacking'])
def test_what_was_killed_is_taken_up_again(moment, archive, server, tmp_path, monkeypatch):
    """A process that starts while another one unpacks finds the same, and waits for it."""

    class Killed(BaseException):
        pass

    def leave_a_part(self):
        content = archive.content
        if moment == 'downloading':
            (tmp_path / ARCHIVE).write_bytes(content[: len(content) // 2])
        else:
            (tmp_path / ARCHIVE).write_bytes(content)
            (tmp_path / UNPACKED).mkdir()
            (tmp_path / UNPACKED / 'data_batch_1').write_bytes(b'a part')
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, 'download', leave_a_part)
        with pytest.raises(Killed):
            download_cifar10(tmp_path)
    one_line(tmp_path)  # it is no set yet
    url, asked = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    download_cifar10(tmp_path)
    archive.check(tmp_path)
    assert bool(asked) == (moment == 'downloading')  # the archive was whole otherwise


def test_a_damaged_file_of_cifar10_gets_one_line(archive, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(archive.content)
    torchvision.datasets.utils.extract_archive(tmp_path / ARCHIVE)
    archive.check(tmp_path)  # it serves as it is, from a read-only folder as well
    (tmp_path / UNPACKED / 'data_batch_3').write_bytes(b'damaged')
    line = one_line(tmp_path)
    assert f'{tmp_path}, training set: a file is damaged' in line
    assert f'a fresh {UNPACKED}' in line


FORMAT = "needed is {'images': uint8 (N, 32, 32, 3), 'labels': int64 (N,), 'classes': "


def numpy_arrays(split):
    return {**split, 'images': split['images'].numpy(), 'labels': split['labels'].numpy()}


def without_classes(split):
    del split['classes']
    return split


def as_list(split):
    return list(split.values())


def of_images(change):
    @functools.wraps(change)
    def changed(split):
        return split | {'images': change(split['images'])}

    return changed


def of_labels(change):
    @functools.wraps(change)
    def changed(split):
        return split | {'labels': change(split['labels'])}

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


def no_images(split):
    return split | {'images': split['images'][:0], 'labels': split['labels'][:0]}


def number_of_classes(split):
    return split | {'classes': 10}


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
        (fewer_images, 'there are 199 images and 200 labels'),
        (no_images, 'there are 0 images and 0 labels'),
    ],
)
def test_a_fault_of_ones_own_set_gets_one_line(change, found, tmp_path):
    split = made_up_split(200) | {'labels': torch.arange(200) % 10}
    save_set(tmp_path, split, change(dict(split)))
    line = one_line(tmp_path, train=False)
    assert str(tmp_path / 'test.pt') in line and found in line
    if not found.startswith('there are'):  # then it is plain what is needed
        assert FORMAT in line


def test_numpy_arrays_in_a_file_get_one_line(tmp_path):
    save_set(tmp_path, numpy_arrays(made_up_split(20)), made_up_split(20))
    line = one_line(tmp_path)
    assert f'{tmp_path}, training set: ' in line and 'other things than tensors' in line
    assert FORMAT in line


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_damaged_file_gets_one_line_and_stays(tmp_path):
    split = made_up_split(20)
    save_set(tmp_path, split, split)
    file = tmp_path / 'train.pt'
    whole = file.read_bytes()
    pickled = pickle.dumps([1, 2])
    for content in (b'', b'not a tensor', b'<html>404</html>', pickled, whole[:-1], whole[:5000]):
        file.write_bytes(content)
        assert 'a file is damaged' in one_line(tmp_path)
        assert file.read_bytes() == content


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_no_damage_ends_in_a_traceback(tmp_path):
    """torch.load has errors of many kinds, by where a file is damaged."""
    split = made_up_split(20)
    save_set(tmp_path, split, split)
    file = tmp_path / 'train.pt'
    whole = file.read_bytes()
    choose = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[choose.randrange(300)] = choose.randrange(256)
        file.write_bytes(damaged)
        try:
            load_data(tmp_path)
        except UserError:
            refused += 1
    assert refused > 40


def test_half_a_set_is_no_set(folder, tmp_path):
    shutil.copy(folder / 'train.pt', tmp_path)
    line = one_line(tmp_path)
    assert f'no data in {tmp_path}: needed are train.pt and test.pt, or {UNPACKED}' in line


def test_a_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'ran',)

    save_set(tmp_path, {'images': Evil()}, {'images': Evil()})
    one_line(tmp_path)
    assert not (tmp_path / 'ran').exists()


def test_digits():
    train, test = load_data('digits', True), load_data('digits', False)
    assert (len(train['labels']), len(test['labels'])) == (1437, 360)
    assert train['images'].shape == (1437, 32, 32, 3) and train['images'].max() == 255
    assert train['mean'].tolist() == test['mean'].tolist()
    assert sorted(set(test['labels'].tolist())) == list(range(10))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UserError, match=r'^--data digits needs scikit-learn: '):
        load_data('digits')
