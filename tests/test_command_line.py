"""The script as its users run it: right runs, and every mistake as one line and exit code 2."""

import fcntl
import hashlib
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import airbench94
from airbench94 import UserError, leaves, override, summarize
from conftest import NARROW, OFFLINE, ONE_THREAD, ROOT, TINY, figures, load_log, made_up_split, run_script


def only_log(folder):
    (path,) = folder.iterdir()
    return path, load_log(path)


def test_digits_reach_95_percent(tmp_path):
    done = run_script('--data', 'digits', '--device', 'cpu', cwd=tmp_path)
    path, log = only_log(tmp_path / 'logs')
    assert done.returncode == 0 and done.stderr == ''
    assert log['summary']['n'] == 1 and log['summary']['mean'] >= 0.95
    assert log['data']['path'] == 'digits' and log['data']['train'] + log['data']['test'] == 1797
    assert 'this is no CIFAR-10 figure' in done.stdout and 'one run proves nothing' in done.stdout


def test_a_call_prints_and_logs_all_that_is_promised(tmp_path, folder):
    shutil.copytree(folder, tmp_path / 'set')
    done = run_script('--data', 'set', '--runs', 3, '--seed', 5, '--log', 'kept', *TINY, cwd=tmp_path, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    path, log = only_log(tmp_path / 'kept')
    assert list(log) == ['script', 'argv', 'source', 'hyp', 'seed', 'data', 'device', 'dtype', 'versions', 'kernels',
                         'mode', 'commit', 'pflop', 'ranks', 'wanted', 'resumed', 'runs', 'summary']
    assert (log['seed'], log['wanted'], log['ranks'], log['resumed']) == (5, 3, 1, [])
    assert log['script'] == 'airbench94.py' and log['argv'][1:4] == ['--data', 'set', '--runs']
    assert log['source'] == (ROOT / 'airbench94.py').read_text() == (path / 'airbench94.py').read_text()
    assert log['hyp'] == override(airbench94.hyp, [*NARROW, 'opt.train_epochs=1'])
    assert log['versions']['torch'] == torch.__version__ and log['dtype'] == 'float32'
    assert [run['seed'] for run in log['runs']] == [5, 6, 7]
    assert [json.loads((path / 'runs' / f'0000{i}.json').read_text()) for i in range(3)] == log['runs']
    accs = torch.tensor([run['tta_val_acc'] for run in log['runs']], dtype=torch.float64)
    assert log['summary']['n'] == 3 and log['summary']['failed'] == 0 and log['summary']['target'] == 0.94
    assert log['summary']['mean'] == pytest.approx(accs.mean().item())
    assert log['summary']['std'] == pytest.approx(accs.std().item())
    header, *rows = [line for line in done.stdout.splitlines() if line.startswith('|')]
    assert log['device'].endswith(', 1 threads') and log['pflop'] > 0
    assert log['commit'] is None or len(log['commit'].removesuffix('-dirty')) == 40
    splits = [torch.load(folder / name, weights_only=True) for name in ('train.pt', 'test.pt')]
    values = b''.join(split[key].numpy().tobytes() for split in splits for key in ('images', 'labels'))
    assert log['data'] == {'path': 'set', 'train': 200, 'test': 60, 'classes': airbench94.CIFAR_CLASSES,
                           'sha256': hashlib.sha256(values).hexdigest(),
                           'is_cifar10': False}     # the classes are CIFAR-10's, but it is not the whole
    assert header.split()[1::2] == ['run', 'epoch', 'train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'seconds']
    assert len(rows) == 6 and len({len(line) for line in rows}) == 1
    assert f"std {log['summary']['std']:.4f}, 95% interval" in done.stdout and 'on the clock' in done.stdout
    assert f"one-sided p = {log['summary']['p_value']:.2g}" in done.stdout

    again = run_script('--data', 'set', '--seed', 6, '--log', 'again', *TINY, cwd=tmp_path, env=ONE_THREAD)
    assert again.returncode == 0
    (repeated,) = only_log(tmp_path / 'again')[1]['runs']
    assert figures(repeated) == figures(log['runs'][1])


def test_without_a_network_it_trains_on_digits_and_says_so(tmp_path):
    done = run_script(*TINY, cwd=tmp_path, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert 'THIS IS NOT CIFAR-10' in done.stdout and 'Connection refused' in done.stdout
    log = only_log(tmp_path / 'logs')[1]
    assert log['data']['path'] == 'digits' and log['hyp']['aug']['flip'] is False
    assert log['hyp']['opt']['batch_size'] == 64        # here the digits' settings go before the user's
    assert log['hyp']['net']['widths']['block1'] == 8


@pytest.mark.parametrize('target', [94, 95, 96])
def test_each_script_runs_alone_in_another_folder(target, tmp_path, folder):
    name = f'airbench{target}'
    shutil.copy(ROOT / f'{name}.py', tmp_path)
    shutil.copytree(folder, tmp_path / 'cifar10')       # the default folder
    done = run_script(*TINY, cwd=tmp_path, script=tmp_path / f'{name}.py', env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    path, log = only_log(tmp_path / 'logs')
    assert log['data']['path'] == 'cifar10' and log['script'] == f'{name}.py' and name in path.name
    assert log['summary']['target'] == target / 100 and f'target 0.{target}:' in done.stdout
    for mistake, complaint in ((['--runs', '0'], '--runs must be'), (['--kernels', 'on'], "--kernels on needs kernels/")):
        done = run_script(*mistake, cwd=tmp_path, script=tmp_path / f'{name}.py')
        assert done.returncode == 2 and done.stderr.startswith(f'{name}.py: {complaint}')
    assert f'{name}: train CIFAR-10 to {target}% in ' in run_script('--help', cwd=tmp_path, script=tmp_path / f'{name}.py').stdout


MISTAKES = [
    (['--runs', '0'], '--runs must be at least 1'),
    (['--runs', 'many'], "argument --runs: invalid int value: 'many'"),
    (['--seed', '-1'], '--seed from 0'),
    (['--fast'], 'unrecognized arguments: --fast'),
    (['opt.learning_rate=3'], 'opt.learning_rate=3: hyp has no such key; the nearest are '),
    (['net.widths.block1=-32'], 'net.widths.block1=-32: must be of type int, like 64, from 1 to '),
    (['opt.batch_size=1.5'], 'opt.batch_size=1.5: must be of type int, like 1024, from 1 to '),
    (['--device', 'cuda:99'], '--device cuda:99: there is no such device here'),
    (['--kernels', 'maybe'], "argument --kernels: invalid choice: 'maybe'"),
    (['--kernels', 'on', '--device', 'cpu', '--data', 'digits'], 'Triton and a GPU: the device is cpu'),
    (['--data', 'nowhere'], 'no data in nowhere: looked for train.pt + test.pt, cifar-10-batches-py and cifar-10-python.tar.gz'),
    (['--data', ''], 'no data in : looked for '),
    (['--data', 'a-file'], 'cannot read a-file: '),
    (['--data', 'digits', 'opt.batch_size=2000'], 'a batch of 2000 is larger than the set of 1437 images'),
    (['--data', 'digits', '--log', 'a-file'], 'Not a directory'),
    (['--data', 'bad-labels'], 'bad-labels, training set: labels go from 0 to 10, for 10 classes'),
    (['--data', 'digits', '--resume', 'broken'], '--resume broken: neither a log nor an empty folder'),
    (['--data', 'broken'], 'broken, training set: must be a dict with images, labels and a list of classes'),
]


@pytest.fixture(scope='module')
def mistaken(tmp_path_factory):
    """The finished processes of all MISTAKES, two at a time, and the folder that they ran in."""
    folder = tmp_path_factory.mktemp('mistakes')
    (folder / 'a-file').touch()
    (folder / 'broken').mkdir()
    for name in ('train.pt', 'test.pt'):
        torch.save([1, 2, 3], folder / 'broken' / name)
    (folder / 'bad-labels').mkdir()
    for name in ('train.pt', 'test.pt'):
        torch.save(made_up_split(20) | {'labels': torch.arange(20) % 11}, folder / 'bad-labels' / name)
    with ThreadPoolExecutor(2) as pool:
        return folder, list(pool.map(lambda case: run_script(*case[0], cwd=folder, env=OFFLINE), MISTAKES))


@pytest.mark.parametrize('case', range(len(MISTAKES)), ids=[' '.join(args) for args, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_exit_code_2(case, mistaken):
    folder, processes = mistaken
    assert (processes[case].returncode, processes[case].stdout) == (2, '')
    (line,) = processes[case].stderr.splitlines()
    assert line.startswith('airbench94.py: ') and MISTAKES[case][1] in line
    assert not (folder / 'logs').exists()


def test_in_a_terminal_a_bar_shows_the_time_left(tmp_path, folder):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
    command = [sys.executable, ROOT / 'airbench94.py', '--data', folder, *TINY]
    with subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        out = process.communicate(timeout=200)[0]
    bar = os.read(ours, 100_000).decode()
    assert 'epoch 1:   0%' in bar and '| 0/6 [00:00<?' in bar and 'inference' in bar
    assert 'epoch 1' not in out     # a file gets the table alone


def test_ctrl_c_keeps_the_finished_runs(tmp_path, folder):
    command = [sys.executable, ROOT / 'airbench94.py', '--data', folder, '--runs', '100000', *TINY]
    with subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob('logs/*/runs/00001.json')) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and 'interrupted; the finished runs are kept' in out
    path, log = only_log(tmp_path / 'logs')
    assert log['summary']['n'] == len(log['runs']) == len(list(path.glob('runs/*.json'))) >= 2


def test_a_failed_run_is_logged_and_does_not_count(tmp_path, folder):
    done = run_script('--data', folder, *TINY, 'opt.lr=1e9', 'opt.bias_scaler=1e9', cwd=tmp_path, env=ONE_THREAD)
    log = only_log(tmp_path / 'logs')[1]
    assert done.returncode == 1 and 'run 0 failed at step' in done.stdout
    assert log['summary']['n'] == 0 and log['summary']['failed'] == 1 and log['summary']['mean'] is None
    assert log['runs'][0]['failed']['step'] > 1 and 'nan' in log['runs'][0]['failed']['reason']


def test_an_accelerator_warms_up_on_random_labels_and_makes_25_runs(tmp_path, folder, monkeypatch, capsys):
    """The CPU, under another name, stands in for the accelerator."""
    calls = []

    def train(train_loader, test_loader, hyp, seed=None, on_epoch=None, **functions):
        calls.append((seed, torch.equal(train_loader.labels, torch.load(folder / 'train.pt')['labels'])))
        return None, {'seed': seed, 'tta_val_acc': 0.94 + 1e-3 * (seed or 0), 'seconds': 1.0, 'epochs': []}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(airbench94, 'train', train)
    loader = airbench94.CifarLoader

    def accelerated(*args, device, **kwargs):
        on_cpu = loader(*args, device='cpu', **kwargs)
        on_cpu.device = device
        return on_cpu
    monkeypatch.setattr(airbench94, 'CifarLoader', accelerated)
    monkeypatch.setattr(airbench94, 'count_pflop', lambda *args: 0.36)
    monkeypatch.setattr(airbench94, 'pick_device', lambda name: (torch.device('mps'), torch.float32))
    assert airbench94.main(['--data', str(folder), *NARROW]) == 0
    assert calls == [(None, False)] + [(seed, True) for seed in range(25)]
    assert 'runs finished: 25, failed: 0' in capsys.readouterr().out


def test_an_error_in_the_middle_keeps_the_finished_runs(tmp_path, folder, monkeypatch):
    def train(train_loader, test_loader, hyp, seed, on_epoch, **functions):
        if seed == 2:
            raise RuntimeError('out of memory')
        return None, {'seed': seed, 'tta_val_acc': 0.9, 'seconds': 1.0, 'epochs': []}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(airbench94, 'train', train)
    with pytest.raises(RuntimeError, match='out of memory'):
        airbench94.main(['--data', str(folder), '--device', 'cpu', '--runs', '5', *NARROW])
    log = only_log(tmp_path / 'logs')[1]
    assert log['summary']['n'] == 2 and [run['seed'] for run in log['runs']] == [0, 1]


def test_sets_of_different_classes_are_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / 'set')
    torch.save(torch.load(folder / 'test.pt') | {'classes': [str(i) for i in range(10)]}, tmp_path / 'set' / 'test.pt')
    with pytest.raises(UserError, match='different classes'):
        airbench94.main(['--data', str(tmp_path / 'set'), '--device', 'cpu', *NARROW])


def test_importing_prints_nothing_and_starts_no_device():
    code = 'import torch; torch.cuda._lazy_init = torch.zeros = torch.cuda.is_available = None; import airbench94'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_overrides_change_a_copy():
    changed = override(airbench94.hyp, ['opt.train_epochs=2', 'aug.flip=False', 'net.widths.block1=32'])
    assert changed['opt']['train_epochs'] == 2.0 and isinstance(changed['opt']['train_epochs'], float)
    assert changed['aug']['flip'] is False and changed['net']['widths']['block1'] == 32
    assert airbench94.hyp['opt']['train_epochs'] == 9.9 and airbench94.hyp['aug']['flip'] is True


@pytest.mark.parametrize('assignment, complaint', [
    ('opt.lr', 'of type float'), ('opt.lr=fast', 'of type float'), ('opt.lr=nan', 'to 1000000000'),
    ('opt.lr=inf', 'to 1000000000'), ('opt.lr=0', 'from 1e-09'), ('aug.flip=2', 'of type bool'),
    ('opt.batch_size=0', 'from 1 '), ('net.batchnorm_eps=-1', 'from 0 '),
    ('opt.momentum=1', 'from 0.001 to 0.999'), ('aug.translate=32', 'from 0 to 31'), ('net.tta_level=3', 'from 0 to 2'),
    ('opt.label_smooth=0.1', 'the nearest are opt.label_smoothing'), ('net.widths=3', 'the nearest are net.'),
])
def test_overrides_that_do_not_fit(assignment, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        override(airbench94.hyp, [assignment])
    assert '\n' not in str(error.value)


def test_every_number_in_hyp_keeps_to_its_own_limits():
    override(airbench94.hyp, [f'{key}={group[name]}' for key, (group, name) in leaves(airbench94.hyp)])


def test_summary_against_known_statistics():
    runs = [{'tta_val_acc': acc} for acc in (0.939, 0.940, 0.941, 0.942)] + [{'failed': {}, 'tta_val_acc': None}]
    summary = summarize(runs, target=0.94)
    assert (summary['n'], summary['failed'], summary['mean']) == (4, 1, pytest.approx(0.9405))
    # t = 0.0005 / (0.00129099 / 2) = 0.774597; by the tables of Student's t with 3 degrees of freedom
    assert summary['std'] == pytest.approx(0.001290994, rel=1e-6)
    assert summary['p_value'] == pytest.approx(0.2475, abs=5e-4)
    assert summary['ci95'] == pytest.approx([0.9405 - 3.182446 * 0.000645497, 0.9405 + 3.182446 * 0.000645497])
    assert summarize(runs[:1], 0.94)['p_value'] is None and summarize([], 0.94)['mean'] is None
