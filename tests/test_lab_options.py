"""KEY=VALUE, recipes from anywhere, devices, and errors in one line."""

import importlib
import sys

import pytest
import torch
from conftest import ROOT, call, refuse

import airbench94
from lab.errors import UserError, report_errors
from lab.machine import describe_machine, pick_device, pick_dtype, process_count
from lab.options import flat, override
from lab.recipes import load_recipe

CPU = torch.device('cpu')
RECIPES = [
    'airbench94.py', 'airbench95.py', 'airbench96.py', 'swap94.py',
    'records/record94.py', 'records/record95.py',
]  # fmt: skip

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


@pytest.mark.parametrize('path', RECIPES)
def test_every_recipe_loads_and_keeps_to_the_limits(path):
    recipe = load_recipe(ROOT / path)
    for hyp in (recipe.hyp, recipe.digits_hyp()):
        assert override(hyp, [f'{key}={value}' for key, value in flat(hyp).items()]) == hyp
    types, of_digits = [
        {key: type(value) for key, value in flat(hyp).items()}
        for hyp in (recipe.hyp, recipe.digits_hyp())
    ]
    assert of_digits == types
    if path == 'airbench94.py':
        assert recipe is airbench94


@pytest.mark.parametrize(
    ('assignment', 'complaint'),
    [
        ('lr=3', 'lr: hyp has no such key; the nearest are opt.lr,'),
        ('opt.label_smooth=0.1', 'no such key; the nearest are opt.label_smoothing,'),
        ('net.widths=3', 'net.widths: hyp has no such key; the nearest are net.'),
        ('opt.lr', 'opt.lr: must be of type float, like 11.5'),
        ('opt.lr=fast', 'opt.lr=fast: must be of type float, like 11.5'),
        ('opt.lr=nan', 'opt.lr=nan: must be a finite number'),
        ('opt.lr=0', 'opt.lr=0: must be from 1e-09 to 1e+09'),
        ('opt.momentum=1', 'opt.momentum=1: must be from 0 to 0.999'),
        ('opt.batch_size=1.5', 'opt.batch_size=1.5: must be of type int, like 1024'),
        ('opt.batch_size=0', 'opt.batch_size=0: must be from 2 to '),
        ('opt.lookahead.every=0', 'opt.lookahead.every=0: must be from 1 to '),
        ('aug.flip=maybe', 'aug.flip=maybe: must be of type bool, like True'),
        ('aug.translate=32', 'aug.translate=32: must be from 0 to 31'),
        ('net.widths.block3=1000000000', 'block3=1000000000: must be from 1 to 8192'),
        ('net.batchnorm_eps=0', 'net.batchnorm_eps=0: must be from 1e-30 to '),
        ('net.tta_level=3', 'net.tta_level=3: must be from 0 to 2'),
    ],
)
def test_a_wrong_assignment_gets_one_line(assignment, complaint):
    with pytest.raises(UserError) as error:
        override(airbench94.hyp, [assignment])
    assert complaint in str(error.value) and '\n' not in str(error.value)


def test_a_recipe_may_have_keys_of_its_own():
    hyp = {'mine': {'steps': 0, 'shift': -3, 'kind': 'a', 'betas': (0.9, 0.99)}, 'target': 0.5}
    changed = override(hyp, ['mine.steps=2', 'mine.shift=-4', 'mine.kind=b'])
    assert changed['mine'] == {'steps': 2, 'shift': -4, 'kind': 'b', 'betas': (0.9, 0.99)}
    with pytest.raises(UserError, match=r'mine\.betas is no number or text; edit hyp'):
        override(hyp, ['mine.betas=1'])


#### Recipes #######################################################################################


@pytest.mark.parametrize(
    ('name', 'source', 'complaint'),
    [
        ('nowhere.py', None, 'there is no such file; the first argument must be a recipe'),
        ('notes.txt', 'hello', 'a recipe is a Python file'),
        ('broken_recipe.py', 'hyp = {', 'cannot be imported: SyntaxError: '),
        ('needy_recipe.py', 'import nothing_like_it', 'cannot be imported: ModuleNotFoundError: '),
        ('empty_recipe.py', 'hyp = {}', 'lacks digits_hyp, CIFAR_MEAN, '),
        ('random.py', 'hyp = {}', 'another Python module is called random; rename the recipe'),
        ('pytest.py', 'hyp = {}', 'another Python module is called pytest; rename the recipe'),
    ],
)
def test_a_file_that_is_no_recipe_gets_one_line(name, source, complaint, tmp_path):
    if source is not None:
        (tmp_path / name).write_text(source)
    line = refuse('run', tmp_path / name, '--data', 'digits')
    assert line.startswith(f'{tmp_path / name}: {complaint}')
    assert 'broken_recipe' not in sys.modules and sys.modules['pytest'] is pytest


def test_a_recipe_finds_what_lies_next_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))
    (tmp_path / 'helper_of_mine.py').write_text('lr = 7.0\n')
    source = 'import helper_of_mine\nfrom airbench94 import *\nhyp = {"lr": helper_of_mine.lr}\n'
    (tmp_path / 'recipe-of-mine.py').write_text(source)
    recipe = load_recipe(tmp_path / 'recipe-of-mine.py')
    assert recipe.hyp == {'lr': 7.0} and recipe.__name__ == 'recipe-of-mine'


@pytest.mark.parametrize('path', RECIPES)
def test_help_lists_the_keys_with_their_values(path, capsys):
    assert call('run', ROOT / path, '--help') == 0
    text = capsys.readouterr().out
    for key, value in flat(load_recipe(ROOT / path).hyp).items():
        assert f'  {key}={value}\n' in text


@pytest.mark.parametrize('args', [[], ['--help'], ['run', '--help'], ['report', '-h']])
def test_help_needs_no_recipe(args, capsys):
    try:
        code = call(*args)
    except SystemExit as end:
        code = end.code
    assert code == 0 and 'python -m lab' in capsys.readouterr().out


#### Errors ########################################################################################


def fail(error):
    raise error


def test_errors_have_their_exit_codes(capsys, monkeypatch):
    assert report_errors('lab', fail, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == 'lab: interrupted\n'
    assert report_errors('lab', fail, torch.OutOfMemoryError('no memory\nat\nall')) == 2
    assert capsys.readouterr().err == 'lab: no memory at\n'
    assert report_errors('lab', fail, OSError(28, 'No space left', 'x.json')) == 2
    assert "'x.json'" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        report_errors('lab', fail, ZeroDivisionError())
    with pytest.raises(SystemExit):
        report_errors('lab', fail, SystemExit(143))
    monkeypatch.setenv('TRACEBACK', '1')
    assert report_errors('lab', fail, UserError('wrong')) == 2
    assert 'Traceback' in capsys.readouterr().err


#### Machine #######################################################################################


@pytest.fixture
def with_driver(monkeypatch):
    """set(bool): whether this torch, built for CUDA, finds a driver. There is an NVIDIA GPU."""
    machine = importlib.import_module('lab.machine')

    def glob(path, pattern):
        return iter([path / 'nvidia0'] if str(path) == '/dev' else [])

    monkeypatch.setattr(machine.Path, 'glob', glob)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)

    def set_available(available):
        def is_available():
            return available

        monkeypatch.setattr(torch.cuda, 'is_available', is_available)

    return set_available


def test_a_gpu_without_a_driver_is_an_error(with_driver, monkeypatch):
    with_driver(False)
    with pytest.raises(UserError, match='finds no driver for the NVIDIA GPU'):
        pick_device()
    assert pick_device('cpu') == CPU
    for hidden in ('', '-1'):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
        assert pick_device().type in ('cpu', 'mps')


def test_each_process_takes_a_gpu_of_its_own(with_driver, monkeypatch):
    with_driver(True)
    current, asked = [], []
    zeros = torch.zeros

    def zeros_on_a_gpu(*shape, device):
        asked.append(device)
        return zeros(*shape)

    monkeypatch.setattr(torch, 'zeros', zeros_on_a_gpu)
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    assert pick_device() == torch.device('cuda:0')
    for rank in ('0', '5', ''):
        monkeypatch.setenv('LOCAL_RANK', rank)
        assert pick_device() == torch.device('cuda', int(rank or 0))
    assert pick_device('cuda:1') == torch.device('cuda:1')
    assert asked == ['cuda:0', 'cuda:0', 'cuda:5', 'cuda:0', 'cuda:1']
    assert current == [torch.device(name) for name in asked]


def test_the_dtype_is_the_one_asked_for_or_suits_the_device(monkeypatch, capsys):
    assert pick_dtype(None, CPU) == torch.float32
    assert pick_dtype(None, torch.device('mps')) == torch.float32
    assert pick_dtype(None, torch.device('cuda')) == torch.float16
    assert pick_dtype('float32', torch.device('cuda')) == torch.float32
    assert capsys.readouterr().out == ''
    for supported in (True, False):

        def is_supported(supported=supported):
            return supported

        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', is_supported)
        assert pick_dtype('bfloat16', CPU) == torch.bfloat16
        assert ('emulating' in capsys.readouterr().out) is not supported


def test_an_empty_world_size_means_one_process(monkeypatch):
    assert process_count() == 1
    for text, count in (('', 1), ('1', 1), ('8', 8)):
        monkeypatch.setenv('WORLD_SIZE', text)
        assert process_count() == count
    monkeypatch.setenv('WORLD_SIZE', 'many')
    with pytest.raises(UserError, match='WORLD_SIZE=many in the environment: must be a number'):
        process_count()


def test_without_git_a_run_has_no_commit(monkeypatch):
    monkeypatch.setenv('PATH', '')
    about = describe_machine(CPU)
    assert list(about) == ['argv', 'device', 'commit', 'python', 'torch']
    assert about['commit'] is None and about['torch'] == torch.__version__
