"""What the tests share: made-up data, a narrow network's settings, and ways to call the scripts."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['no_proxy'] = os.environ['NO_PROXY'] = '127.0.0.1'  # the tests' servers are here
for name in ('CIFAR10_URL', 'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'TRACEBACK'):
    os.environ.pop(name, None)  # the scripts read them

import airbench94  # noqa: E402

airbench94.keep_freed_memory()
torch.set_num_threads(1)  # for networks as small as the tests', a second thread would only wait
NARROW = [
    'net.widths.block1=8', 'net.widths.block2=16', 'net.widths.block3=16', 'opt.batch_size=32',
]  # fmt: skip
TINY = ['--device', 'cpu', *NARROW, 'opt.train_epochs=1']
NOBODY = 'http://127.0.0.1:9/cifar-10-python.tar.gz'  # where nobody listens
OFFLINE = os.environ | {'CIFAR10_URL': NOBODY}
ONE_THREAD = OFFLINE | {'OMP_NUM_THREADS': '1'}
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get('CXX', 'g++')),
    reason='needs a C++ compiler, for torch.compile on the CPU',
)
# Its processes have imported torch, scripts and studies when they start.
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([f'studies.{path.stem}' for path in ROOT.glob('studies/*.py')])
if not torch.cuda.is_available():  # then Triton's interpreter runs this process's kernels
    os.environ['TRITON_INTERPRET'] = '1'


def made_up_split(n, seed=0, classes=airbench94.CIFAR_CLASSES):
    """A split that can be learned: noise, tinted in its class's colour."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(classes), (n,), generator=g)
    noise = torch.randint(0, 100, (n, 32, 32, 3), generator=g, dtype=torch.uint8)
    colours = [(30 * c % 150, 70 * c % 150, 110 * c % 150) for c in range(len(classes))]
    tint = torch.tensor(colours, dtype=torch.uint8)
    images = noise + tint[labels, None, None]
    return {'images': images, 'labels': labels, 'classes': list(classes)}


def save_set(folder, train, test):
    """Write a set's two splits into `folder`, as a user would. Returns the folder."""
    folder.mkdir(exist_ok=True)
    torch.save(train, folder / 'train.pt')
    torch.save(test, folder / 'test.pt')
    return folder


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder with a set: 200 training and 60 test images with CIFAR-10's class names."""
    path = tmp_path_factory.mktemp('set')
    return save_set(path, made_up_split(200, seed=1), made_up_split(60, seed=2))


@pytest.fixture
def loaders(folder):
    """make(dtype=..., device=..., **options) -> (train_loader, test_loader)."""

    def make(
        device='cpu', dtype=torch.float32, batch_size=32, aug=airbench94.hyp['aug'], **options
    ):
        where = {'device': device, 'dtype': dtype}
        train_loader = airbench94.CifarLoader(folder, True, batch_size, aug, **options, **where)
        return train_loader, airbench94.CifarLoader(folder, False, **where)

    return make


@pytest.fixture
def narrow():
    """hyp with a narrow network, batches of 32 and two epochs."""
    return airbench94.override(airbench94.hyp, [*NARROW, 'opt.train_epochs=2'])


def call(*args, script=airbench94):
    """What a script's main returns for these arguments, in this process."""
    return script.main([str(arg) for arg in args])


def refuse(*args, script=airbench94):
    """The one line that says why a script refuses these arguments, in this process."""
    with pytest.raises(script.UserError) as error:
        call(*args, script=script)
    line = str(error.value)
    assert line and '\n' not in line
    return line


def run_script(*args, cwd, script=ROOT / 'airbench94.py', env=None, **options):
    """Run the script to its end as a user would, and return the finished process with its text."""
    command = [sys.executable, str(script), *map(str, args)]
    options = {'capture_output': True, 'text': True, 'timeout': 280} | options
    return subprocess.run(command, cwd=cwd, env=env, **options)


def load_log(folder):
    return json.loads((folder / 'log.json').read_text())


def figures(run):
    """What of a run's record does not depend on the clock."""
    epochs = [epoch | {'seconds': None} for epoch in run['epochs']]
    return [run['seed'], run['val_acc'], run['tta_val_acc'], epochs]
