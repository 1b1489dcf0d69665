"""`lab run` in one process: what it prints and logs, its data, its mistakes, and saved networks."""

import contextlib
import copy
import fcntl
import hashlib
import io
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from conftest import (
    NARROW,
    OFFLINE,
    ONE_THREAD,
    ROOT,
    TEST_SET,
    TINY,
    TRAIN_SET,
    call,
    load_log,
    random_set,
    refuse,
    run_command,
    save_set,
)
from PIL import Image

import airbench94
from lab import training
from lab.data import CIFAR_CLASSES
from lab.errors import report_errors
from lab.flops import costs_of_run, flop_per_image
from lab.options import override
from lab.recipes import load_recipe
from lab.runs import checksum, read_json

RECIPE = ROOT / 'airbench94.py'
RUN = ['run', RECIPE]


def only_log(folder):
    (path,) = (folder / 'logs').iterdir()
    return load_log(path)


def digest_of(*sets):
    digest = hashlib.sha256()
    for images, labels in sets:
        digest.update(images.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Trainings that take no time, in an empty folder: a list of their hyp, seeds and loaders."""
    trained = []

    def train(train_loader, test_loader, hyp, seed=None, on_epoch=None, **faster):
        trained.append((hyp, seed, train_loader, test_loader))
        accuracy = 0.94 + 1e-3 * (seed or 0)
        record = {'seed': seed, 'val_acc': accuracy, 'tta_val_acc': accuracy, 'seconds': 1.0}
        return torch.nn.Linear(2, 2), record | {'epochs': []}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(airbench94, 'train', train)
    return trained


class Kept:
    """A finished command of three runs: its arguments, folder, output and log."""

    def __init__(self, path, folder):
        self.data = shutil.copytree(folder, path / 'set')
        self.folder = path / 'kept'
        self.args = ['--data', self.data, '--runs', 3, '--seed', 5, '--save', '--out', self.folder]
        self.argv = ['lab', *map(str, self.args)]
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            patch.setattr(sys, 'argv', self.argv)
            assert call(*RUN, *self.args, *TINY) == 0
        self.out = out.getvalue()
        self.log = load_log(self.folder)

    def weights(self, run):
        return self.folder / 'runs' / f'{run:05}.pt'


@pytest.fixture(scope='module')
def kept(tmp_path_factory, folder):
    return Kept(tmp_path_factory.mktemp('command'), folder)


#### What a command leaves and says ################################################################


def test_a_log_holds_what_is_promised(kept):
    config = read_json(kept.folder / 'config.json')
    log = read_json(kept.folder / 'log.json')
    assert kept.log == log | {'checksum': checksum(log)}
    assert list(config) == ['script', 'hyp', 'seed', 'data', 'dtype', 'mode', 'source']
    assert list(log) == [*config, 'runs', 'summary']
    commonest = max(TEST_SET[1].tolist().count(label) for label in range(10))
    assert log['summary']['chance'] == commonest / 60
    assert {name: log[name] for name in config} == config
    assert config['script'] == 'airbench94.py' and config['seed'] == 5
    assert (config['dtype'], config['mode']) == ('float32', 'eager')
    assert config['source'] == RECIPE.read_text()
    assert config['hyp'] == override(airbench94.hyp, [*NARROW, 'opt.train_epochs=1'])
    assert config['data'] == {
        'path': str(kept.data),
        'train': 200,
        'test': 60,
        'classes': CIFAR_CLASSES,
        'sha256': digest_of(TRAIN_SET, TEST_SET),
        'is_cifar10': False,  # it has the classes of CIFAR-10, but not the images
    }


def test_a_record_holds_what_is_promised(kept):
    files = [kept.folder / 'runs' / f'{run:05}.json' for run in range(3)]
    assert [read_json(file) for file in files] == kept.log['runs']
    assert [run['seed'] for run in kept.log['runs']] == [5, 6, 7]
    of_training, of_view = flop_per_image(airbench94, kept.log['hyp'], 10)
    for run in kept.log['runs']:
        assert list(run['epochs'][0]) == ['epoch', 'train_loss', 'train_acc', 'val_acc', 'seconds']
        assert ' cpu, ' in run['device'] and run['device'].endswith(', 1 threads')
        assert (run['kernels'], run['torch']) == ('torch', torch.__version__)
        assert run['argv'] == kept.argv
        assert run['commit'] is None or re.fullmatch('[0-9a-f]{40}(-dirty)?', run['commit'])
        # Six batches, and six views of each test image.
        assert run['pflop'] == pytest.approx(1e-15 * (6 * 32 * of_training + 60 * 6 * of_view))


def test_a_command_leaves_no_other_files(kept):
    names = {path.name for path in kept.folder.iterdir()}
    assert names - {'config.lock', 'locks'} == {'config.json', 'log.json', 'runs'}
    in_runs = {path.name for path in (kept.folder / 'runs').iterdir()}
    assert in_runs == {f'0000{run}.{kind}' for run in range(3) for kind in ('json', 'pt')}


def test_a_command_prints_what_is_promised(kept):
    out = kept.out
    assert out.startswith(f'{kept.data}: 200 training and 60 test images; ')
    assert 'float32, eager, torch kernels\n' in out
    assert f'3 of 3 runs left; log in {kept.folder}\n' in out
    header, *rows = [line for line in out.splitlines() if line.startswith('|')]
    assert header.split()[1::2] == list(training.COLUMNS)
    assert len({len(line) for line in (header, *rows)}) == 1
    records = kept.log['runs']
    evaluations = [row.split() for row in rows if ' eval ' in row]
    accuracies = [(words[1], words[-4]) for words in evaluations]
    assert accuracies == [(str(i), f'{run["tta_val_acc"]:.4f}') for i, run in enumerate(records)]
    assert sum(' eval ' not in row for row in rows) == 3  # one epoch each
    summary = kept.log['summary']
    assert 'runs finished: 3, failed: 0\n' in out
    assert f'mean accuracy with TTA {summary["mean"]:.4f}, target 0.94: ' in out
    assert f'std {summary["std"]:.4f}, 95% interval of the mean ' in out
    assert f'one-sided p = {summary["p_value"]:.2g}\n' in out
    assert 'PFLOP a run' in out


def test_a_run_can_be_made_again_alone(kept, tmp_path):
    again = ['--data', kept.data, '--seed', 6, '--out', tmp_path / 'again', *TINY]
    assert call(*RUN, *again) == 0
    (run,) = load_log(tmp_path / 'again')['runs']
    then = kept.log['runs'][1]
    assert run['tta_val_acc'] == then['tta_val_acc']
    assert run['epochs'][0]['train_loss'] == then['epochs'][0]['train_loss']


def test_in_a_terminal_a_bar_shows_the_time_left(tmp_path, folder):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
    args = [RECIPE, '--data', folder, '--out', 'log', *TINY]
    options = {'capture_output': False, 'stdout': subprocess.PIPE, 'stderr': theirs}
    done = run_command('-m', 'lab', 'run', *args, cwd=tmp_path, **options)
    os.close(theirs)
    bar = os.read(ours, 100_000).decode()
    assert 'epoch 1:   0%' in bar and '| 0/6 [00:00<?' in bar and 'inference' in bar
    assert 'epoch 1:' not in done.stdout  # a file gets the table alone


def test_a_failed_run_is_logged_and_does_not_count(tmp_path, folder, monkeypatch, capsys):
    # The weight decay makes the weights overflow on every CPU; a large rate alone may not.
    diverging = ['--data', folder, *TINY, 'opt.lr=1e9', 'opt.weight_decay=1e9']
    assert call(*RUN, *diverging, '--out', tmp_path / 'alone') == 1
    assert 'run 0 failed: the loss is ' in capsys.readouterr().out
    log = load_log(tmp_path / 'alone')
    assert (log['summary']['n'], log['summary']['failed'], log['summary']['mean']) == (0, 1, None)
    assert log['runs'][0]['failed'].startswith('the loss is nan at step ')
    monkeypatch.setenv('WORLD_SIZE', '2')  # torchrun would start everything again
    assert call(*RUN, *diverging, '--out', tmp_path / 'shared') == 0
    assert load_log(tmp_path / 'shared')['summary']['failed'] == 1


def break_statistics(net, *args, **options):
    """Stands in for `evaluate`. Statistics may be infinite in fp16, although no loss was."""
    net[2].layers[0].norm.running_var[3] = math.inf
    return 0.1


def test_a_network_that_is_not_finite_is_a_failed_run(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(airbench94, 'evaluate', break_statistics)
    assert call(*RUN, '--data', folder, '--out', tmp_path / 'log', *TINY) == 1
    (run,) = load_log(tmp_path / 'log')['runs']
    assert run['failed'] == '2.layers.0.norm.running_var is not finite'
    assert f'run 0 failed: {run["failed"]}\n' in capsys.readouterr().out


#### Any recipe, anywhere ##########################################################################


@pytest.mark.parametrize('name', ['airbench95', 'airbench96', 'record94', 'record95'])
def test_every_recipe_runs_in_another_folder(name, tmp_path, folder, monkeypatch):
    """As a copy in a folder of its own, with the default folder's data."""
    monkeypatch.chdir(tmp_path)
    (source,) = [*ROOT.glob(f'{name}.py'), *ROOT.glob(f'records/{name}.py')]
    shutil.copy(source, tmp_path)
    shutil.copytree(folder, tmp_path / 'cifar10')
    assert call('run', f'{name}.py', *TINY) == 0
    log = only_log(tmp_path)
    assert (log['script'], log['data']['path']) == (f'{name}.py', 'cifar10')
    assert log['runs'][0]['pflop'] > 0
    assert {path.name for path in tmp_path.iterdir()} - {'__pycache__'} == {
        f'{name}.py', 'cifar10', 'logs',
    }  # fmt: skip


def test_images_that_shrink_to_nothing_are_refused(tmp_path, folder):
    args = [ROOT / 'records/record94.py', '--data', folder, '--out', tmp_path / 'log', *TINY]
    for kernel in (3, 9):
        line = refuse('run', *args, f'net.whiten_kernel={kernel}')
        assert line.startswith('this network cannot take images of 16 x 16 pixels: ')
    assert call('run', *args, 'net.whiten_kernel=3', 'growth.size=20') == 0


def edit(source, *changes):
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    return source


def test_an_edited_copy_has_its_own_keys_and_its_own_code(tmp_path, folder, capsys):
    source = edit(
        RECIPE.read_text(),
        ("'label_smoothing': 0.2,", "'label_smoothing': 0.2, 'bonus': 0.5,"),
        (
            "record['tta_val_acc'] = evaluate(",
            "record['tta_val_acc'] = opt['bonus'] + 0 * evaluate(",
        ),
    )
    (tmp_path / 'edited.py').write_text(source)
    args = [tmp_path / 'edited.py', '--data', folder, '--out', tmp_path / 'log', *TINY]
    assert call('run', *args, 'opt.bonus=0.25') == 0
    log = load_log(tmp_path / 'log')
    assert log['script'] == 'edited.py' and log['source'] == source
    assert log['hyp']['opt']['bonus'] == 0.25 and log['runs'][0]['tta_val_acc'] == 0.25
    assert 'nearest are opt.bonus,' in refuse('run', *args, 'opt.bonuss=1')
    assert 'hyp.opt.bonus is 0.25 there, and 0.5 here' in refuse('run', *args)


def test_operations_that_cannot_be_counted_are_left_out(tmp_path, folder, capsys):
    """A loss with a branch that depends on the data cannot be computed on the meta device."""
    loss = '    loss = losses.sum('
    source = edit(RECIPE.read_text(), (loss, f'    float(losses.detach().max())\n{loss}'))
    (tmp_path / 'uncountable.py').write_text(source)
    args = [tmp_path / 'uncountable.py', '--data', folder, '--out', tmp_path / 'log', *TINY]
    assert call('run', *args) == 0
    assert load_log(tmp_path / 'log')['runs'][0]['pflop'] is None
    out = capsys.readouterr().out
    assert 'seconds a run' in out and 'PFLOP' not in out
    assert call('report', tmp_path / 'log') == 0


# The paper's airbench96 (Jordan 2024, section 4).
OF_PAPER96 = ['opt.train_epochs=40', 'net.widths.block2=512', 'net.widths.block3=512']


@pytest.mark.parametrize(
    ('name', 'changes', 'published'),
    [
        ('airbench94', [], 0.36),
        ('airbench95', [], 1.39),
        ('airbench96', [], 4.91),
        ('airbench96', OF_PAPER96, 7.2),
    ],
)
def test_pflop_a_run_is_what_was_published(name, changes, published):
    recipe = load_recipe(ROOT / f'{name}.py')
    hyp = override(recipe.hyp, changes)
    pflop = costs_of_run(recipe, hyp, 50000, 10000, 10, {})['pflop']
    assert pflop == pytest.approx(published, rel=0.02)
    hyp['aug']['flip'] = False  # one view of each test image
    assert 0.9 * pflop < costs_of_run(recipe, hyp, 50000, 10000, 10, {})['pflop'] < pflop


@pytest.mark.parametrize(
    ('name', 'views', 'pflop'), [('record94', 28_000, 0.1619), ('record95', 19_000, 0.6229)]
)
def test_pflop_a_run_is_what_the_records_say(name, views, pflop):
    """A count by hand gave the same. 10,000 views of record94 have 0.0014 PFLOP."""
    recipe = load_recipe(ROOT / 'records' / f'{name}.py')
    costs = costs_of_run(recipe, recipe.hyp, 50000, 10000, 10, {'views': views})
    assert costs['pflop'] == pytest.approx(pflop, abs=1e-4)


#### Warm-up, compiling, kernels ###################################################################


def test_an_accelerator_gets_a_warm_up_and_25_runs(quick, folder, monkeypatch, capsys):
    """The CPU, under another name, replaces the accelerator."""

    class AcceleratedLoader(airbench94.CifarLoader):
        def __init__(self, *args, device, **options):
            super().__init__(*args, device='cpu', **options)
            self.device = device

    def pick_device(name):
        return torch.device('mps')

    monkeypatch.setattr(airbench94, 'CifarLoader', AcceleratedLoader)
    monkeypatch.setattr('lab.__main__.pick_device', pick_device)
    args = [*RUN, '--data', folder, '--out', 'log', *NARROW]
    assert call(*args) == 0
    (hyp, _, few, _), *runs = quick
    assert len(few.labels) == 96 and hyp['opt']['train_epochs'] == 2  # three batches
    assert not torch.equal(few.labels, TRAIN_SET[1][:96])
    assert [seed for _, seed, *_ in runs] == list(range(25))
    for hyp, _, train_loader, _ in runs:
        assert hyp['opt']['train_epochs'] == 9.9 and torch.equal(train_loader.labels, TRAIN_SET[1])
    out = capsys.readouterr().out
    assert out.index('warming up') < out.index('|   run')
    assert 'runs finished: 25, failed: 0' in out
    assert load_log(Path('log'))['runs'][0]['warm_up_seconds'] >= 0
    quick.clear()
    assert call(*args) == 0
    assert quick == []  # nothing is missing, so there is nothing to warm up for


COMPILE_ERROR = """backend='inductor' raised:
CppCompileError: C++ compile error

Command:
g++ /my cache/x.cpp -o /my cache/x.so

Output:
g++: error: cache/x.cpp: No such file or directory
"""


def test_a_failed_warm_up_names_what_failed(quick, folder, monkeypatch):
    def train(*args, **faster):
        raise RuntimeError(COMPILE_ERROR)

    def fast_path(train_loader, hyp):
        return {}

    monkeypatch.setattr(airbench94, 'train', train)
    monkeypatch.setattr(airbench94, 'fast_path', fast_path)
    line = refuse(*RUN, '--data', folder, '--compile', *TINY)
    assert line.startswith('the warm-up run failed: ')
    assert 'CppCompileError: C++ compile error: g++: error: cache/x.cpp: No such file' in line
    assert line.endswith('; TRACEBACK=1 shows more')


def test_compiled_functions_are_warmed_up_and_used(tmp_path, folder, monkeypatch):
    """On a CPU too. Whether torch.compile changes results is tested in test_compile.py."""
    calls = []

    def forward(net, inputs):
        calls.append(len(inputs))
        return net(inputs)

    def fast_path(train_loader, hyp):
        return {'forward': forward, 'fused': True}

    monkeypatch.setattr(airbench94, 'fast_path', fast_path)
    assert call(*RUN, '--data', folder, *TINY, '--out', tmp_path, '--compile') == 0
    log = load_log(tmp_path)
    assert log['mode'] == 'compiled' and log['runs'][0]['warm_up_seconds'] > 0
    # Views of the test set: the warm-up validates twice, the run once, and each uses TTA's six.
    assert calls == [60] * (2 + 6 + 1 + 6)


def test_without_the_folder_kernels_compiling_is_an_error(quick, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'kernels', None)
    assert refuse(*RUN, '--data', folder, '--compile', *TINY).startswith('--compile: ')
    line = refuse(*RUN, '--data', folder, '--kernels', 'on', *TINY)
    assert line.startswith('--kernels on needs a GPU, Triton, kernels/')
    assert 'flip_crop, the Triton kernel, is not used: ' in capsys.readouterr().out
    assert call(*RUN, '--data', folder, *TINY) == 0  # a CPU does not need them


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU"
)
def test_kernels_on_uses_the_kernel(tmp_path, folder):
    """Triton's interpreter runs it here. It gives the same bits."""
    pytest.importorskip('triton')
    args = ['--data', folder, *TINY]
    for choice in ('on', 'off'):
        assert call(*RUN, *args, '--out', tmp_path / choice, '--kernels', choice) == 0
    logs = [load_log(tmp_path / choice) for choice in ('on', 'off')]
    assert [log['runs'][0]['kernels'] for log in logs] == ['Triton', 'torch']
    losses = [log['runs'][0]['epochs'][0]['train_loss'] for log in logs]
    assert losses[0] == losses[1]


def test_an_edited_augmentation_is_not_replaced(tmp_path, folder, capsys):
    source = edit(RECIPE.read_text(), ('width - 1 - x, x)', 'x, width - 1 - x)'))
    (tmp_path / 'mirrored.py').write_text(source)
    args = [tmp_path / 'mirrored.py', '--data', folder, *TINY, '--out', tmp_path / 'log']
    assert '--kernels on needs a GPU, Triton, kernels/' in refuse('run', *args, '--kernels', 'on')
    assert 'flip_crop, the Triton kernel, is not used: ' in capsys.readouterr().out


#### Data ##########################################################################################


def test_without_a_network_the_bare_command_trains_on_digits(tmp_path):
    """In a process of its own, and with a copy of the recipe that is quick."""
    quick = edit(
        RECIPE.read_text(),
        ("{'train_epochs': 5.0, 'batch_size': 64}", "{'train_epochs': 0.1, 'batch_size': 64}"),
    )
    (tmp_path / 'quick.py').write_text(quick)
    env = ONE_THREAD | {'CUDA_VISIBLE_DEVICES': ''}
    done = run_command('-m', 'lab', 'run', 'quick.py', cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, '')
    assert '*** THIS IS NOT CIFAR-10: ' in done.stdout and 'Connection refused' in done.stdout
    assert 'this is not a CIFAR-10 result: the data is digits' in done.stdout
    assert 'one run proves nothing' in done.stdout
    assert 'not significantly better than always answering the commonest class' in done.stdout
    log = only_log(tmp_path)
    assert (log['data']['path'], log['data']['is_cifar10']) == ('digits', False)
    assert (log['data']['train'], log['data']['test']) == (1437, 360)
    assert log['hyp']['aug']['flip'] is False and log['hyp']['opt']['batch_size'] == 64


@pytest.mark.parametrize(
    ('args', 'environment'),
    [(['opt.lr=9'], {}), (['--load', 'net.pt'], {}), (['--out', 'shared'], {'WORLD_SIZE': '2'})],
)
def test_without_a_network_any_other_command_is_an_error(
    args, environment, quick, kept, monkeypatch, capsys
):
    shutil.copy(kept.weights(0), 'net.pt')
    for name, value in ({'CIFAR10_URL': OFFLINE['CIFAR10_URL']} | environment).items():
        monkeypatch.setenv(name, value)
    assert report_errors('lab', call, *RUN, '--device', 'cpu', *args) == 2
    printed = capsys.readouterr()
    assert 'THIS IS NOT CIFAR-10' not in printed.out and quick == []
    assert printed.err.startswith('lab: CIFAR-10 could not be downloaded; put ')
    assert printed.err.count('\n') == 1


def test_a_set_of_your_own_has_its_own_statistics_and_classes(tmp_path, quick):
    """A class that only the test set has an image of counts too."""
    train, test = random_set(200, classes=3), random_set(60, classes=4)
    data = save_set(tmp_path / 'set', train, test, classes='abcd')
    assert call(*RUN, '--data', data, *TINY) == 0
    (_, _, train_loader, test_loader) = quick[0]
    pixels = train[0].double().flatten(0, 2)
    for loader in (train_loader, test_loader):
        assert loader.num_classes == 4
        assert loader.mean.tolist() == pytest.approx(pixels.mean(0).tolist())
        std = pixels.std(0, correction=0).tolist()
        assert (1 / loader.scale).tolist() == pytest.approx(std)


#### Mistakes ######################################################################################

DIGITS = ['--data', 'digits']
MISTAKES = [
    (['--runs', '0'], '--runs 0: must be at least 1'),
    (['--runs', 'many'], "argument --runs: invalid int value: 'many'"),
    (['--seed', '-1'], '--seed -1: must be from 0 to 4294967295'),
    (['--fast'], '--fast: no such option'),
    (['--epochs', '5'], '--epochs: no such option; as KEY=VALUE, the nearest are opt.train_epochs'),
    (['--lr=3'], '--lr=3: no such option; as KEY=VALUE, the nearest are opt.lr,'),
    (['lr=3'], 'lr: hyp has no such key; the nearest are opt.lr,'),
    (['--device', 'cuda:99'], '--device cuda:99: there is no such device here'),
    (['--device', 'meta'], '--device meta: there is no such device here'),
    (['--device', 'cpu', '--dtype', 'float16'], '--dtype float16 needs a GPU'),
    (['--dtype', 'int8'], "argument --dtype: invalid choice: 'int8'"),
    (['--kernels', 'maybe'], "argument --kernels: invalid choice: 'maybe'"),
    (['--data', 'nowhere'], '--data nowhere: there is no such folder'),
    (['--data', ''], '--data : there is no such folder'),
    (['--data', 'a-file'], '--data a-file: there is no such folder'),
    (['--data', 'broken'], 'train.pt: holds list; expected '),
    ([*DIGITS, 'opt.batch_size=2000'], '1437 images are less than a batch of 2000'),
    ([*DIGITS, '--out', 'foreign'], '--out foreign: holds thesis.tex, and no log'),
    ([*DIGITS, '--out', 'a-file'], '--out a-file: is not a folder'),
    (['--out', ''], '--out: must name a folder'),
    (['--load', 'nowhere.pt'], 'nowhere.pt: there is no such file'),
    (['--load', ''], ': there is no such file'),
    (['--load', 'broken/train.pt'], 'broken/train.pt: is damaged, or not written by --save'),
    (['--load', 'a-file'], 'a-file: is damaged, or not written by --save'),
]


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with things that are not data, not a log and not a network."""
    path = tmp_path_factory.mktemp('desk')
    (path / 'a-file').write_text('hello\n')
    (path / 'foreign').mkdir()
    (path / 'foreign' / 'thesis.tex').touch()
    (path / 'broken').mkdir()
    for name in ('train.pt', 'test.pt'):
        torch.save([1, 2, 3], path / 'broken' / name)
    return path


@pytest.mark.parametrize(('args', 'complaint'), MISTAKES, ids=[' '.join(m[0]) for m in MISTAKES])
def test_a_mistake_gets_one_line(args, complaint, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    assert complaint in refuse(*RUN, *args)
    assert capsys.readouterr().out == ''
    assert {path.name for path in desk.iterdir()} == {'a-file', 'foreign', 'broken'}


def test_other_mistakes_get_one_line():
    commands = 'run, report, data, predict, check'
    assert refuse('fly') == f'fly: no such command; the commands are {commands}'
    assert refuse('run').startswith('the following arguments are required: RECIPE; see ')
    assert refuse('data', 'nowhere', 'x').startswith(
        'nowhere: is neither a folder of pictures nor '
    )
    assert refuse('data', 'pictures').startswith('DEST must name a folder; see ')


def test_processes_without_a_common_folder_are_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    line = refuse(*RUN, *DIGITS)
    assert line == '2 processes need one --out DIR, in which they share runs'


#### Saved networks ################################################################################


def load_args(weights, data):
    return [*RUN, '--load', weights, '--data', data, '--device', 'cpu']


def test_a_loaded_network_has_the_accuracy_of_its_run(kept, capsys):
    for run, record in enumerate(kept.log['runs']):
        assert call(*load_args(kept.weights(run), kept.data)) == 0
        assert capsys.readouterr().out.splitlines() == [
            f'accuracy on 60 images of {kept.data}: {record["val_acc"]:.4f}',
            f'with test-time augmentation, level 2: {record["tta_val_acc"]:.4f}',
        ]


def change_network(kept, path, **changes):
    saved = torch.load(kept.weights(0), weights_only=True) | changes
    torch.save({name: value for name, value in saved.items() if value is not None}, path)
    return path


def test_a_network_is_tested_as_it_was_trained(kept, tmp_path, monkeypatch, capsys):
    """Its own mean and std normalize the images, and without flips there are no mirrored views."""
    hyp = override(kept.log['hyp'], ['aug.flip=False'])
    changes = {'mean': [0.1, 0.2, 0.3], 'std': [0.5, 0.6, 0.7], 'hyp': hyp}
    file = change_network(kept, tmp_path / 'net.pt', **changes)
    seen = []

    def evaluate(net, loader, tta_level=0):
        seen.append((loader.mean.tolist(), (1 / loader.scale).tolist(), tta_level))
        return 0.5

    monkeypatch.setattr(airbench94, 'evaluate', evaluate)
    assert call(*load_args(file, kept.data)) == 0
    mean, std = pytest.approx([25.5, 51.0, 76.5]), pytest.approx([127.5, 153.0, 178.5])
    assert seen == [(mean, std, 0)] * 2
    assert 'with test-time augmentation, level 0: ' in capsys.readouterr().out


def test_other_classes_are_refused(kept, tmp_path):
    other = save_set(tmp_path / 'other', TEST_SET, TEST_SET, classes='0123456789')
    line = refuse(*load_args(kept.weights(0), other))
    assert line == f'--load {kept.weights(0)}: its classes are not those of {other}'


@pytest.mark.parametrize('missing', ['weights', 'hyp', 'classes', 'recipe'])
def test_a_file_that_lacks_something_is_refused(missing, kept, tmp_path):
    file = change_network(kept, tmp_path / 'net.pt', **{missing: None})
    assert refuse(*load_args(file, kept.data)) == f'{file}: is damaged, or not written by --save'


def test_weights_that_do_not_fit_the_network_are_refused(kept, tmp_path):
    hyp = override(kept.log['hyp'], ['net.widths.block1=9'])
    file = change_network(kept, tmp_path / 'net.pt', hyp=hyp)
    fits = 'its weights, made by airbench94.py, do not fit the network of airbench94.py'
    assert refuse(*load_args(file, kept.data)) == f'{file}: {fits}'


def test_a_network_of_an_older_recipe_is_refused(kept, tmp_path):
    hyp = copy.deepcopy(kept.log['hyp'])
    del hyp['net']['depth']
    file = change_network(kept, tmp_path / 'net.pt', hyp=hyp)
    lacks = "airbench94.py wrote no 'depth' into its hyp, which airbench94.py needs"
    assert refuse(*load_args(file, kept.data)) == f'{file}: {lacks}'


def write_picture(path, number):
    """A test image, as a file. PNG keeps every pixel."""
    Image.fromarray(TEST_SET[0][number].numpy()).save(path)
    return path


def test_predict_says_what_the_network_says(kept, tmp_path, capsys):
    pictures = [write_picture(tmp_path / f'{i}.png', i) for i in range(3)]
    assert call('predict', kept.weights(1), *pictures) == 0
    lines = capsys.readouterr().out.splitlines()
    net = airbench94.make_net(kept.log['hyp'], device='cpu', dtype=torch.float32)
    net.load_state_dict(torch.load(kept.weights(1), weights_only=True)['weights'])
    where = {'device': 'cpu', 'dtype': torch.float32}
    loader = airbench94.CifarLoader(TEST_SET[0][:3], TEST_SET[1][:3], **where)
    for line, row, picture in zip(lines, airbench94.infer(net, loader, 2).softmax(1), pictures):
        best = row.topk(3)
        names = [CIFAR_CLASSES[i] for i in best.indices]
        shares = [f'{name} {p:.1%}' for name, p in zip(names, best.values.tolist())]
        assert line == f'{picture}: {", ".join(shares)}'


def test_predict_finds_the_recipe_that_made_the_network(kept, tmp_path, capsys):
    """Where it was, or with the same name in this repository."""
    picture = write_picture(tmp_path / 'a.png', 0)
    moved = change_network(kept, tmp_path / 'moved.pt', recipe='/nowhere/airbench94.py')
    assert call('predict', moved, picture) == 0
    changed = change_network(kept, tmp_path / 'changed.pt', source='an older text')
    assert 'has changed' not in capsys.readouterr().out
    assert call('predict', changed, picture) == 0
    assert f'airbench94.py has changed since it made {changed}' in capsys.readouterr().out
    lost = change_network(kept, tmp_path / 'lost.pt', recipe='/nowhere/mine.py')
    line = refuse('predict', lost, picture)
    assert line == f'{lost}: was made by /nowhere/mine.py, which is not here any more'


def test_predict_refuses_what_is_not_a_picture(kept, tmp_path):
    (tmp_path / 'cat.png').write_text('cat')
    line = refuse('predict', kept.weights(0), tmp_path / 'cat.png')
    assert line.startswith(f'{tmp_path / "cat.png"}: cannot be read as a picture: ')
    assert 'nowhere.png: cannot be read' in refuse('predict', kept.weights(0), 'nowhere.png')
