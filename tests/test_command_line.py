"""The script as its users call it: what a run prints and logs, and every mistake in one line."""

import contextlib
import fcntl
import hashlib
import importlib
import io
import json
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from argparse import Namespace

import pytest
import torch
from conftest import (
    NARROW,
    NOBODY,
    ONE_THREAD,
    ROOT,
    TINY,
    call,
    load_log,
    made_up_split,
    refuse,
    run_script,
    save_set,
)

import airbench94
from airbench94 import UserError, override, report_errors, summarize

CPU = torch.device('cpu')
TARGETS = [94, 95, 96]


def only_log(folder):
    (path,) = (folder / 'logs').iterdir()
    return load_log(path)


def digest_of(*splits):
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split['images'].numpy().tobytes())
        digest.update(split['labels'].numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Trainings that take no time, in an empty folder: a list of their hyp, seeds and loaders."""
    trained = []

    def train(train_loader, test_loader, hyp, seed=None, on_epoch=None, **functions):
        trained.append((hyp, seed, train_loader, test_loader))
        accuracy = 0.94 + 1e-3 * (seed or 0)
        record = {'seed': seed, 'val_acc': accuracy, 'tta_val_acc': accuracy, 'pflop': 0.36}
        return torch.nn.Linear(2, 2), record | {'seconds': 1.0, 'epochs': []}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(airbench94, 'train', train)
    return trained


class Kept:
    """A finished call of three runs: its arguments, folder, output and log."""

    def __init__(self, path, folder):
        self.data = shutil.copytree(folder, path / 'set')
        self.folder = path / 'kept'
        self.args = ['--data', self.data, '--runs', 3, '--seed', 5, '--save', '--out', self.folder]
        self.argv = ['airbench94.py', *map(str, self.args)]
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            patch.setattr(sys, 'argv', self.argv)
            assert call(*self.args, *TINY) == 0
        self.out = out.getvalue()
        self.log = load_log(self.folder)

    def weights(self, run):
        return self.folder / 'runs' / f'{run:05}.pt'


@pytest.fixture(scope='module')
def kept(tmp_path_factory, folder):
    return Kept(tmp_path_factory.mktemp('call'), folder)


#### Runs ##########################################################################################


def test_digits_reach_95_percent(tmp_path):
    """In a network and a number of epochs that take seconds; the defaults reach 98%."""
    small = ['net.widths.block1=16', 'net.widths.block2=32', 'net.widths.block3=64']
    args = ['--data', 'digits', '--device', 'cpu', *small, 'opt.train_epochs=6']
    done = run_script(*args, cwd=tmp_path, env=ONE_THREAD)
    log = only_log(tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert log['summary']['n'] == 1 and log['summary']['mean'] >= 0.95
    assert log['data']['path'] == 'digits'
    assert (log['data']['train'], log['data']['test']) == (1437, 360)
    assert 'this is no CIFAR-10 figure: the data is digits' in done.stdout
    assert 'one run proves nothing' in done.stdout


@pytest.mark.parametrize('target', TARGETS)
def test_each_script_runs_alone_in_another_folder(target, tmp_path, folder):
    name = f'airbench{target}.py'
    shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(folder, tmp_path / 'cifar10')  # the default folder
    done = run_script(*TINY, cwd=tmp_path, script=tmp_path / name, env=ONE_THREAD)
    assert (done.returncode, done.stderr) == (0, '')
    log = only_log(tmp_path)
    assert (log['script'], log['data']['path']) == (name, 'cifar10')
    assert log['summary']['target'] == target / 100 and f'target 0.{target}:' in done.stdout
    assert log['runs'][0]['commit'] is None  # it is no repository
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, 'cifar10', 'logs'])


def test_a_log_holds_what_is_promised(kept, folder):
    config = json.loads((kept.folder / 'config.json').read_text())
    log = kept.log
    assert list(config) == ['script', 'hyp', 'seed', 'data', 'dtype', 'mode', 'source']
    assert list(log) == [*config, 'runs', 'summary']
    assert {name: log[name] for name in config} == config
    assert config['script'] == 'airbench94.py' and config['seed'] == 5
    assert (config['dtype'], config['mode']) == ('float32', 'eager')
    assert config['source'] == (ROOT / 'airbench94.py').read_text()
    assert config['hyp'] == override(airbench94.hyp, [*NARROW, 'opt.train_epochs=1'])
    splits = [torch.load(folder / name, weights_only=True) for name in ('train.pt', 'test.pt')]
    assert config['data'] == {
        'path': str(kept.data),
        'train': 200,
        'test': 60,
        'classes': airbench94.CIFAR_CLASSES,
        'sha256': digest_of(*splits),
        'is_cifar10': False,  # it has the classes of CIFAR-10, but not the images
    }


def test_a_record_holds_what_is_promised(kept):
    files = [kept.folder / 'runs' / f'{run:05}.json' for run in range(3)]
    assert [json.loads(file.read_text()) for file in files] == kept.log['runs']
    assert [run['seed'] for run in kept.log['runs']] == [5, 6, 7]
    for run in kept.log['runs']:
        assert list(run['epochs'][0]) == ['epoch', 'train_loss', 'train_acc', 'val_acc', 'seconds']
        assert ' cpu, ' in run['device'] and run['device'].endswith(', 1 threads')
        assert (run['kernels'], run['torch']) == ('torch', torch.__version__)
        assert run['argv'] == kept.argv
        assert run['commit'] is None or re.fullmatch('[0-9a-f]{40}(-dirty)?', run['commit'])
    hyp = kept.log['hyp']
    flop, flop_of_view = airbench94.flop_per_image(hyp, 10)
    assert kept.log['runs'][0]['pflop'] == pytest.approx(
        1e-15 * (6 * 32 * flop + 60 * 6 * flop_of_view)  # six batches, six views
    )


def test_a_call_leaves_no_other_files(kept):
    names = {path.name for path in kept.folder.iterdir()}
    assert names - {'config.lock', 'locks'} == {'config.json', 'log.json', 'runs'}
    in_runs = {path.name for path in (kept.folder / 'runs').iterdir()}
    assert in_runs == {f'0000{run}.{kind}' for run in range(3) for kind in ('json', 'pt')}


def test_a_call_prints_what_is_promised(kept):
    out = kept.out
    assert out.startswith(f'{kept.data}: 200 + 60 images; ')
    assert 'float32, eager, kernels of torch\n' in out
    assert f'3 of 3 runs to make; log in {kept.folder}\n' in out
    header, *rows = [line for line in out.splitlines() if line.startswith('|')]
    assert tuple(header.split()[1::2]) == airbench94.COLUMNS
    assert len({len(line) for line in (header, *rows)}) == 1
    records = kept.log['runs']
    evaluations = [row.split() for row in rows if ' eval ' in row]
    accuracies = [(words[1], words[-4]) for words in evaluations]
    assert accuracies == [(str(i), f'{run["tta_val_acc"]:.4f}') for i, run in enumerate(records)]
    assert sum(' eval ' not in row for row in rows) == 3  # an epoch each
    summary = kept.log['summary']
    assert 'runs finished: 3, failed: 0\n' in out
    assert f'mean accuracy with TTA {summary["mean"]:.4f}, target 0.94: ' in out
    assert f'std {summary["std"]:.4f}, 95% interval of the mean ' in out
    assert f'one-sided p = {summary["p_value"]:.2g}\n' in out
    assert 'PFLOP a run' in out and 'on the clock: ' in out


def test_a_run_can_be_made_alone_again(kept, tmp_path):
    again = ['--data', kept.data, '--seed', 6, '--out', tmp_path / 'again', *TINY]
    assert call(*again) == 0
    (run,) = load_log(tmp_path / 'again')['runs']
    then = kept.log['runs'][1]
    assert run['tta_val_acc'] == then['tta_val_acc']
    assert run['epochs'][0]['train_loss'] == then['epochs'][0]['train_loss']


def test_in_a_terminal_a_bar_shows_the_time_left(tmp_path, folder):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
    args = ['--data', folder, '--out', 'log', *TINY]
    done = subprocess.run(
        [sys.executable, ROOT / 'airbench94.py', *args],
        cwd=tmp_path,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        timeout=200,
    )
    os.close(theirs)
    bar = os.read(ours, 100_000).decode()
    assert 'epoch 1:   0%' in bar and '| 0/6 [00:00<?' in bar and 'inference' in bar
    assert 'epoch 1:' not in done.stdout  # a file gets the table alone


def test_a_failed_run_is_logged_and_does_not_count(tmp_path, folder, monkeypatch, capsys):
    diverging = ['--data', folder, *TINY, 'opt.lr=1e9', 'opt.bias_scaler=1e9']
    assert call(*diverging, '--out', tmp_path / 'alone') == 1
    assert 'run 0 failed at step ' in capsys.readouterr().out
    log = load_log(tmp_path / 'alone')
    assert (log['summary']['n'], log['summary']['failed'], log['summary']['mean']) == (0, 1, None)
    assert log['runs'][0]['failed']['step'] > 1 and 'nan' in log['runs'][0]['failed']['reason']
    monkeypatch.setenv('WORLD_SIZE', '2')  # torchrun would start all again
    assert call(*diverging, '--out', tmp_path / 'shared') == 0
    assert load_log(tmp_path / 'shared')['summary']['failed'] == 1


def test_an_accelerator_makes_a_short_warm_up_and_25_runs(quick, folder, monkeypatch, capsys):
    """The CPU, under another name, stands in for the accelerator."""
    loader_class = airbench94.CifarLoader

    def accelerated(*args, device, **options):
        loader = loader_class(*args, device='cpu', **options)
        loader.device = device
        return loader

    def pick_device(name):
        return torch.device('mps')

    monkeypatch.setattr(airbench94, 'CifarLoader', accelerated)
    monkeypatch.setattr(airbench94, 'pick_device', pick_device)
    assert call('--data', folder, '--out', 'log', *NARROW) == 0
    labels = torch.load(folder / 'train.pt')['labels']
    (hyp, _, few, few_tests), *runs = quick
    assert len(few.labels) == 96 and len(few_tests.labels) == 60  # three batches
    assert not torch.equal(few.labels, labels[:96])
    assert set(few.labels.tolist()) == set(range(10))
    assert (hyp['opt']['train_epochs'], hyp['opt']['whiten_bias_epochs']) == (2, 1)
    assert [seed for _, seed, *_ in runs] == list(range(25))
    for hyp, _, train_loader, _ in runs:
        assert hyp['opt']['train_epochs'] == 9.9 and torch.equal(train_loader.labels, labels)
    out = capsys.readouterr().out
    assert out.index('warming up') < out.index('|       run')
    assert 'runs finished: 25, failed: 0' in out
    assert load_log(airbench94.Path('log'))['runs'][0]['warm_up_seconds'] >= 0
    quick.clear()
    assert call('--data', folder, '--out', 'log', *NARROW) == 0
    assert quick == []  # nothing is missing, so that there is nothing to warm up for


def test_a_failed_warm_up_is_said_in_one_line(folder, narrow, loaders, monkeypatch):
    def train(*args, **functions):
        raise RuntimeError('Triton says\nmuch\nmore')

    monkeypatch.setattr(airbench94, 'train', train)
    with pytest.raises(UserError, match=r'^the warm-up run failed: Triton says much$'):
        airbench94.warm_up(*loaders(), narrow, {})


def test_without_git_a_run_has_no_commit(loaders, monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert airbench94.describe_call(loaders()[0])['commit'] is None


#### Data ##########################################################################################


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(airbench94, 'CIFAR_URLS', [NOBODY])


def test_without_a_network_the_bare_command_trains_on_digits(quick, offline, capsys):
    assert call('--device', 'cpu') == 0
    out = capsys.readouterr().out
    assert '*** THIS IS NOT CIFAR-10: ' in out and 'Connection refused' in out
    log = only_log(airbench94.Path())
    assert log['data']['path'] == 'digits' and not log['data']['is_cifar10']
    assert log['hyp'] == override(airbench94.hyp, airbench94.DIGITS)
    assert log['hyp']['aug']['flip'] is False and log['hyp']['opt']['batch_size'] == 64


@pytest.mark.parametrize(
    ('args', 'environment'),
    [
        (['opt.lr=9'], {}),
        (['--load', 'net.pt'], {}),
        ([], {'CIFAR10_URL': NOBODY}),
        (['--out', 'shared'], {'WORLD_SIZE': '2'}),
    ],
)
def test_without_a_network_any_other_call_is_an_error(
    args, environment, quick, offline, narrow, loaders, monkeypatch, capsys
):
    train_loader, _ = loaders()
    net = airbench94.make_net(narrow, device=CPU, dtype=torch.float32)
    airbench94.save_network(airbench94.Path('net.pt'), net, narrow, train_loader)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def main():
        return call('--device', 'cpu', *args)

    monkeypatch.setattr(sys, 'argv', ['airbench94.py'])
    assert report_errors(main) == 2
    printed = capsys.readouterr()
    assert 'THIS IS NOT CIFAR-10' not in printed.out and quick == []
    assert printed.err.startswith('airbench94.py: CIFAR-10 could not be downloaded ')
    assert printed.err.count('\n') == 1


def test_cifar10_is_known_by_its_digest(folder, loaders, narrow, monkeypatch):
    splits = [torch.load(folder / name, weights_only=True) for name in ('train.pt', 'test.pt')]
    monkeypatch.setattr(airbench94, 'CIFAR_SHA256', digest_of(*splits))
    args = Namespace(seed=0, compile=False)
    train_loader, test_loader = loaders()
    recipe = airbench94.describe_recipe(args, 'x', narrow, train_loader, test_loader)
    assert recipe['data']['is_cifar10']
    g = torch.Generator().manual_seed(0)
    train_loader.labels = train_loader.labels[torch.randperm(200, generator=g)]
    shuffled = airbench94.describe_recipe(args, 'x', narrow, train_loader, test_loader)
    assert not shuffled['data']['is_cifar10']
    assert shuffled['data']['sha256'] != recipe['data']['sha256']


def test_sets_of_different_classes_are_refused(tmp_path, quick):
    other = made_up_split(60, classes=[str(digit) for digit in range(10)])
    path = save_set(tmp_path / 'set', made_up_split(200), other)
    line = refuse('--data', path, *TINY)
    assert line == f'{path}: training and test set have different classes'


#### Mistakes ######################################################################################

MISTAKES = [
    (['--runs', '0'], '--runs 0: must be at least 1'),
    (['--runs', 'many'], "argument --runs: invalid int value: 'many'"),
    (['--seed', '-1'], '--seed -1: must be from 0 to 4294967295'),
    (['--fast'], '--fast: no such option'),
    (['--epochs', '5'], '--epochs: no such option; as KEY=VALUE, the nearest are opt.train_epochs'),
    (['--lr', '3'], '--lr: no such option; as KEY=VALUE, the nearest are opt.lr,'),
    (['--lr=3'], '--lr=3: no such option; as KEY=VALUE, the nearest are opt.lr,'),
    (['lr=3'], 'lr: hyp has no such key; the nearest are opt.lr,'),
    (['opt.label_smooth=0.1'], 'no such key; the nearest are opt.label_smoothing,'),
    (['net.widths=3'], 'net.widths: hyp has no such key; the nearest are net.'),
    (['opt.lr'], 'opt.lr: must be of type float, like 11.5'),
    (['opt.lr=fast'], 'opt.lr=fast: must be of type float, like 11.5'),
    (['opt.lr=nan'], 'opt.lr=nan: must be from 1e-09 to 1e+09'),
    (['opt.lr=0'], 'opt.lr=0: must be from 1e-09 to 1e+09'),
    (['opt.momentum=1'], 'opt.momentum=1: must be from 0 to 0.999'),
    (['opt.batch_size=1.5'], 'opt.batch_size=1.5: must be of type int, like 1024'),
    (['opt.batch_size=0'], 'opt.batch_size=0: must be from 1 to '),
    (['aug.flip=maybe'], 'aug.flip=maybe: must be of type bool, like True'),
    (['aug.translate=32'], 'aug.translate=32: must be from 0 to 31'),
    (['net.widths.block3=1000000000'], 'block3=1000000000: must be from 1 to 8192'),
    (['net.batchnorm_eps=0'], 'net.batchnorm_eps=0: must be from 1e-30 to '),
    (['net.tta_level=3'], 'net.tta_level=3: must be from 0 to 2'),
    (['--device', 'cuda:99'], '--device cuda:99: there is no such device here'),
    (['--device', 'meta'], '--device meta: there is no such device here'),
    (['--device', 'cpu', '--dtype', 'float16'], '--dtype float16 needs a GPU'),
    (['--dtype', 'int8'], "argument --dtype: invalid choice: 'int8'"),
    (['--kernels', 'maybe'], "argument --kernels: invalid choice: 'maybe'"),
    (['--data', 'nowhere'], 'no data in nowhere: needed are train.pt and test.pt, or cifar-10-'),
    (['--data', ''], 'no data in : needed are '),
    (['--data', 'a-file'], 'no data in a-file: needed are '),
    (['--data', 'broken'], 'train.pt: holds list; needed is '),
    (['--data', 'digits', 'opt.batch_size=2000'], '1437 images do not fill a batch of 2000'),
    (['--data', 'digits', '--out', 'foreign'], '--out foreign: holds thesis.tex, and no log'),
    (['--data', 'digits', '--out', 'a-file'], '--out a-file: is no folder'),
    (['--out', ''], '--out: must name a folder'),
    (['--load', 'nowhere.pt'], 'nowhere.pt: there is no such file'),
    (['--load', ''], ': there is no such file'),
    (['--load', 'broken/train.pt'], 'broken/train.pt: damaged, or not written by --save'),
    (['--load', 'a-file'], 'a-file: damaged, or not written by --save'),
]


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with things that are no data, no log and no network."""
    path = tmp_path_factory.mktemp('desk')
    (path / 'a-file').write_text('hello\n')
    (path / 'foreign').mkdir()
    (path / 'foreign' / 'thesis.tex').touch()
    save_set(path / 'broken', [1, 2, 3], [1, 2, 3])
    return path


@pytest.mark.parametrize(('args', 'complaint'), MISTAKES, ids=[' '.join(m[0]) for m in MISTAKES])
def test_a_mistake_gets_one_line(args, complaint, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    assert complaint in refuse(*args)
    assert capsys.readouterr().out == ''
    assert {path.name for path in desk.iterdir()} == {'a-file', 'foreign', 'broken'}


def test_from_the_shell_a_mistake_gets_one_line_and_exit_code_2(desk):
    done = run_script('--lr', 3, cwd=desk, env=ONE_THREAD)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('airbench94.py: --lr: no such option; ')
    assert done.stderr.count('\n') == 1


def test_processes_without_a_common_folder_are_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert refuse('--data', 'digits') == '2 processes need one --out DIR, in which they share runs'


def test_kernels_that_are_not_there_are_an_error_when_they_are_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'kernels', None)
    with pytest.raises(UserError, match=r'^--kernels on needs kernels/, Triton and a GPU: '):
        airbench94.load_kernels('on', CPU)
    functions = airbench94.load_kernels('auto', torch.device('cuda'))
    assert functions == (airbench94.augment, {})
    assert "torch's functions instead of Triton's kernels: " in capsys.readouterr().out


def fail_with(error):
    def main():
        raise error

    return main


def test_errors_have_their_exit_codes(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['./airbench94.py'])
    assert report_errors(fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == 'airbench94.py: interrupted\n'
    assert report_errors(fail_with(torch.OutOfMemoryError('no memory\nat\nall'))) == 2
    assert capsys.readouterr().err == 'airbench94.py: no memory at\n'
    assert report_errors(fail_with(OSError(28, 'No space left', 'x.json'))) == 2
    assert "'x.json'" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # an error of ours keeps its traceback
        report_errors(fail_with(ZeroDivisionError()))
    with pytest.raises(SystemExit):
        report_errors(fail_with(SystemExit(143)))
    monkeypatch.setenv('TRACEBACK', '1')
    assert report_errors(fail_with(UserError('wrong'))) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_importing_prints_nothing_and_starts_no_device():
    code = (
        'import torch; torch.cuda._lazy_init = torch.zeros = torch.cuda.is_available = None\n'
        'import airbench94'
    )
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


#### Hyperparameters ###############################################################################


def test_overrides_change_a_copy():
    changed = override(
        airbench94.hyp,
        ['opt.train_epochs=2', 'aug.flip=false', 'net.widths.block1=32', 'opt.momentum=0'],
    )
    assert changed['opt']['train_epochs'] == 2.0
    assert isinstance(changed['opt']['train_epochs'], float)
    assert changed['aug']['flip'] is False
    assert changed['net']['widths']['block1'] == 32
    assert changed['opt']['momentum'] == 0
    assert airbench94.hyp['opt']['train_epochs'] == 9.9 and airbench94.hyp['aug']['flip'] is True


@pytest.mark.parametrize('target', TARGETS)
def test_every_value_of_hyp_keeps_to_its_own_limits(target):
    script = importlib.import_module(f'airbench{target}')
    values = script.flat(script.hyp)
    assert override(script.hyp, [f'{key}={value}' for key, value in values.items()]) == script.hyp


@pytest.mark.parametrize('target', TARGETS)
def test_help_lists_the_keys_with_their_values(target, capsys):
    script = importlib.import_module(f'airbench{target}')
    with pytest.raises(SystemExit) as end:
        script.main(['--help'])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f'airbench{target}: train CIFAR-10 to {target}% in ' in text
    for key, value in script.flat(script.hyp).items():
        assert f'  {key}={value}\n' in text


#### Summary #######################################################################################


def test_summary_against_known_statistics():
    accuracies = [0.939, 0.940, 0.941, 0.942]
    runs = [{'tta_val_acc': accuracy} for accuracy in accuracies]
    failed = {'failed': {}, 'tta_val_acc': None}
    summary = summarize([*runs, failed], target=0.94)
    assert (summary['n'], summary['failed'], summary['target']) == (4, 1, 0.94)
    assert summary['mean'] == pytest.approx(0.9405)
    # t = 0.0005 / (0.00129099 / 2) = 0.774597; by the tables of Student's t with 3 degrees of
    # freedom
    assert summary['std'] == pytest.approx(0.001290994, rel=1e-6)
    assert summary['p_value'] == pytest.approx(0.2475, abs=5e-4)
    width = 3.182446 * 0.000645497
    assert summary['ci95'] == pytest.approx([0.9405 - width, 0.9405 + width])
    assert summarize(runs[:1], 0.94)['p_value'] is None
    assert summarize([runs[0], runs[0]], 0.94)['p_value'] is None
    assert summarize([], 0.94)['mean'] is None


def printed_summary(accuracies, capsys, is_cifar10=True):
    records = [{'tta_val_acc': accuracy, 'seconds': 3.0, 'pflop': 0.36} for accuracy in accuracies]
    data = {'classes': range(10), 'test': 10000, 'path': 'mine', 'is_cifar10': is_cifar10}
    airbench94.print_summary(summarize(records, 0.94), records, data)
    return capsys.readouterr().out


def test_a_mean_no_better_than_chance_is_said(capsys):
    limit = 0.1 + 3 * math.sqrt(0.1 * 0.9 / 10000)
    said = 'that is no better than chance, 0.1000: nothing was learned'
    assert said in printed_summary([limit - 0.002, limit], capsys)
    assert said not in printed_summary([limit + 0.002, limit], capsys)


def test_what_a_summary_says(capsys):
    out = printed_summary([0.94], capsys)
    assert 'one run proves nothing' in out and 'no CIFAR-10 figure' not in out
    assert '3.00 seconds and 0.36 PFLOP a run' in out
    assert 'all runs are equal' in printed_summary([0.94, 0.94], capsys)
    assert 'the data is mine' in printed_summary([0.94], capsys, is_cifar10=False)
    assert printed_summary([], capsys) == 'runs finished: 0, failed: 0\n'


#### Devices #######################################################################################


@pytest.fixture
def with_driver(monkeypatch):
    """set(bool): whether this torch, made for CUDA, finds a driver; there is an NVIDIA device."""

    def glob(path, pattern):
        return iter([path / 'nvidia0'] if str(path) == '/dev' else [])

    monkeypatch.setattr(airbench94.Path, 'glob', glob)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)

    def set_available(available):
        def is_available():
            return available

        monkeypatch.setattr(torch.cuda, 'is_available', is_available)

    return set_available


def test_a_gpu_without_a_driver_is_an_error(with_driver, monkeypatch):
    with_driver(False)
    with pytest.raises(UserError, match='an NVIDIA GPU without a driver for this torch'):
        airbench94.pick_device()
    assert airbench94.pick_device('cpu') == CPU
    for hidden in ('', '-1'):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
        assert airbench94.pick_device().type in ('cpu', 'mps')


def test_each_process_takes_a_gpu_of_its_own(with_driver, monkeypatch):
    with_driver(True)
    current, asked = [], []
    zeros = torch.zeros

    def zeros_on_a_gpu(*shape, device):
        asked.append(device)
        return zeros(*shape)

    monkeypatch.setattr(torch, 'zeros', zeros_on_a_gpu)
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    assert airbench94.pick_device() == torch.device('cuda:0')
    for rank in ('0', '5'):
        monkeypatch.setenv('LOCAL_RANK', rank)
        assert airbench94.pick_device() == torch.device('cuda', int(rank))
    assert airbench94.pick_device('cuda:1') == torch.device('cuda:1')
    assert asked == ['cuda:0', 'cuda:0', 'cuda:5', 'cuda:1']
    assert current == [torch.device(name) for name in asked]


def test_the_dtype_is_the_one_that_is_asked_for_or_that_suits_the_device(monkeypatch, capsys):
    assert airbench94.pick_dtype(None, CPU) == torch.float32
    assert airbench94.pick_dtype(None, torch.device('mps')) == torch.float32
    assert airbench94.pick_dtype(None, torch.device('cuda')) == torch.float16
    assert airbench94.pick_dtype('float32', torch.device('cuda')) == torch.float32
    assert capsys.readouterr().out == ''
    for supported in (True, False):

        def is_supported(supported=supported):
            return supported

        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', is_supported)
        assert airbench94.pick_dtype('bfloat16', CPU) == torch.bfloat16
        out = capsys.readouterr().out
        assert ('imitates' in out) is not supported


#### Saved networks ################################################################################


def test_a_loaded_network_has_the_accuracy_of_its_run(kept, capsys):
    for run, record in enumerate(kept.log['runs']):
        assert call('--load', kept.weights(run), '--data', kept.data, '--device', 'cpu') == 0
        assert capsys.readouterr().out.splitlines() == [
            f'accuracy on 60 images of {kept.data}: {record["val_acc"]:.4f}',
            f'with test-time augmentation, level 2: {record["tta_val_acc"]:.4f}',
        ]


def test_a_saved_network_is_read_from_its_file_alone(kept, loaders):
    options = {'device': CPU, 'dtype': torch.float32}
    net, saved = airbench94.load_network(kept.weights(1), **options)
    assert saved['hyp'] == kept.log['hyp'] and saved['classes'] == airbench94.CIFAR_CLASSES
    _, test_loader = loaders()
    assert airbench94.evaluate(net, test_loader, 2) == kept.log['runs'][1]['tta_val_acc']


def test_other_classes_are_refused(kept, tmp_path):
    split = made_up_split(60, classes=[str(digit) for digit in range(10)])
    other = save_set(tmp_path / 'other', split, split)
    line = refuse('--load', kept.weights(0), '--data', other, '--device', 'cpu')
    assert line == f'--load {kept.weights(0)}: its classes are not those of {other}'


def test_images_are_normalized_as_in_training(kept, tmp_path, monkeypatch):
    """And not by the statistics of the set on which the network is evaluated."""
    saved = torch.load(kept.weights(0), weights_only=True)
    saved |= {'mean': [0.1, 0.2, 0.3], 'std': [0.5, 0.6, 0.7]}
    torch.save(saved, tmp_path / 'net.pt')
    seen = []

    def evaluate(net, loader, *level):
        seen.append((loader.mean, loader.std, loader.pixel_mean.tolist()))
        return 0.5

    monkeypatch.setattr(airbench94, 'evaluate', evaluate)
    assert call('--load', tmp_path / 'net.pt', '--data', kept.data, '--device', 'cpu') == 0
    expected = saved['mean'], saved['std'], pytest.approx([25.5, 51.0, 76.5])
    assert seen == [expected, expected]


@pytest.mark.parametrize('missing', ['weights', 'hyp', 'classes'])
def test_a_file_that_lacks_something_is_refused(missing, kept, tmp_path):
    saved = torch.load(kept.weights(0), weights_only=True)
    del saved[missing]
    torch.save(saved, tmp_path / 'net.pt')
    line = refuse('--load', tmp_path / 'net.pt', '--data', kept.data, '--device', 'cpu')
    assert line == f'{tmp_path / "net.pt"}: damaged, or not written by --save'


def test_weights_that_do_not_fit_the_network_are_refused(kept, tmp_path):
    saved = torch.load(kept.weights(0), weights_only=True)
    saved['hyp']['net']['widths']['block1'] = 9
    torch.save(saved, tmp_path / 'net.pt')
    line = refuse('--load', tmp_path / 'net.pt', '--data', kept.data, '--device', 'cpu')
    assert line == f"{tmp_path / 'net.pt'}: its weights do not fit this script's network"
