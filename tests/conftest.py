"""What the tests share: random images, settings of a narrow network, and ways to call programs."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['no_proxy'] = os.environ['NO_PROXY'] = '127.0.0.1'  # where the tests' servers are
for name in ('CIFAR10_URL', 'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'TRACEBACK'):
    os.environ.pop(name, None)  # the programs read them
if not torch.cuda.is_available():  # then Triton's interpreter runs this process's kernels
    os.environ['TRITON_INTERPRET'] = '1'

import airbench94  # noqa: E402
import lab.__main__  # noqa: E402
from lab.data import CIFAR_CLASSES  # noqa: E402
from lab.errors import UserError  # noqa: E402
from lab.options import override  # noqa: E402

airbench94.keep_freed_memory()
torch.set_num_threads(1)  # the tests' networks are so small that a second thread would only wait
NARROW = [
    'net.widths.block1=8', 'net.widths.block2=16', 'net.widths.block3=16', 'opt.batch_size=32',
]  # fmt: skip
TINY = ['--device', 'cpu', *NARROW, 'opt.train_epochs=1']
NOBODY = 'http://127.0.0.1:9/cifar-10-python.tar.gz'  # nobody listens there
OFFLINE = os.environ | {'CIFAR10_URL': NOBODY}
ONE_THREAD = OFFLINE | {'OMP_NUM_THREADS': '1'}
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get('CXX', 'g++')),
    reason='needs a C++ compiler, for torch.compile on the CPU',
)
# Its processes have imported torch, recipes and studies when they start.
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([f'studies.{path.stem}' for path in ROOT.glob('studies/*.py')])


def run_rank(function, rank, ranks, port, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(*args)


def on_ranks(ranks, function, *args, seconds=240):
    """Call a function in as many processes as torchrun would start, and wait for all of them."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        call = (function, rank, ranks, port, args)
        processes.append(SERVER.Process(target=run_rank, args=call, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(seconds)
    assert [process.exitcode for process in processes] == [0] * ranks


def random_set(n, seed=0, classes=10):
    """Images and labels that a network can learn: noise, tinted in the colour of the class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=g)
    noise = torch.randint(0, 100, (n, 32, 32, 3), generator=g, dtype=torch.uint8)
    colours = [(30 * c % 150, 70 * c % 150, 110 * c % 150) for c in range(classes)]
    tint = torch.tensor(colours, dtype=torch.uint8)
    return noise + tint[labels, None, None], labels


def save_set(folder, train, test, classes=CIFAR_CLASSES):
    """Write two sets of (images, labels) into `folder`, as a user would. Returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, (images, labels) in (('train', train), ('test', test)):
        content = {'images': images, 'labels': labels, 'classes': list(classes)}
        torch.save(content, folder / f'{name}.pt')
    return folder


TRAIN_SET = random_set(200, seed=1)
TEST_SET = random_set(60, seed=2)


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder with TRAIN_SET and TEST_SET, under CIFAR-10's class names."""
    return save_set(tmp_path_factory.mktemp('set'), TRAIN_SET, TEST_SET)


def make_loaders(device='cpu', dtype=torch.float32, batch_size=32, aug=airbench94.hyp['aug']):
    """(train_loader, test_loader) of TRAIN_SET and TEST_SET."""
    where = {'device': device, 'dtype': dtype}
    train_loader = airbench94.CifarLoader(*TRAIN_SET, batch_size, aug, train=True, **where)
    return train_loader, airbench94.CifarLoader(*TEST_SET, **where)


@pytest.fixture
def narrow():
    """airbench94's hyp with a narrow network, batches of 32 and two epochs."""
    return override(airbench94.hyp, [*NARROW, 'opt.train_epochs=2'])


def call(*args):
    """What `python -m lab` returns for these arguments, in this process. Raises UserError."""
    return lab.__main__.main([str(arg) for arg in args])


def refuse(*args):
    """The one line with which `python -m lab` refuses these arguments, in this process."""
    with pytest.raises(UserError) as error:
        call(*args)
    line = str(error.value)
    assert line and '\n' not in line
    return line


def run_command(*command, cwd, env=ONE_THREAD, **options):
    """Run `python COMMAND` to its end as a user would, in a process of its own."""
    options = {'capture_output': True, 'text': True, 'timeout': 280} | options
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=env | {'PYTHONPATH': str(ROOT)},
        **options,
    )


def load_log(folder):
    return json.loads((folder / 'log.json').read_text())


def figures(run):
    """The part of a run's record that does not depend on the clock."""
    epochs = [epoch | {'seconds': None} for epoch in run['epochs']]
    return [run['seed'], run['val_acc'], run['tta_val_acc'], epochs]
