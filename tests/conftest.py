"""What the tests share: made-up data, a narrow network's settings, and the scripts as subprocesses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ['no_proxy'] = os.environ['NO_PROXY'] = '127.0.0.1'      # the tests' servers are here
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import airbench94

torch.set_num_threads(1)    # the tests' networks are so small that a second thread would only wait
NARROW = ['net.widths.block1=8', 'net.widths.block2=16', 'net.widths.block3=16', 'opt.batch_size=32']
SWAP = ['net.widths.block1=8', 'net.widths.block2=16', 'net.widths.block3=16', 'phase1.batch_size=32', 'phase1.shards=2',
        'phase2.batch_size=20', 'phase2.workers=2', 'statistics.batch_size=50']     # the same for swap94
TINY = ['--device', 'cpu', *NARROW, 'opt.train_epochs=1']
OFFLINE = os.environ | {'CIFAR10_URL': 'http://127.0.0.1:9/cifar-10-python.tar.gz'}     # where nobody listens
ONE_THREAD = OFFLINE | {'OMP_NUM_THREADS': '1'}
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')),
                                    reason='needs a C++ compiler, for torch.compile on the CPU')
if not torch.cuda.is_available():       # then Triton's interpreter runs the kernels of this process, on the CPU
    os.environ['TRITON_INTERPRET'] = '1'


def made_up_split(n, seed=0, classes=airbench94.CIFAR_CLASSES):
    """A learnable split in the cache format: noise, tinted in its class's colour."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(classes), (n,), generator=g)
    noise = torch.randint(0, 100, (n, 32, 32, 3), generator=g, dtype=torch.uint8)
    tint = torch.tensor([(30 * c % 150, 70 * c % 150, 110 * c % 150) for c in range(len(classes))], dtype=torch.uint8)
    return {'images': noise + tint[labels, None, None], 'labels': labels, 'classes': list(classes)}


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder in the cache format: 200 training and 60 test images with CIFAR-10's class names."""
    path = tmp_path_factory.mktemp('set')
    torch.save(made_up_split(200, seed=1), path / 'train.pt')
    torch.save(made_up_split(60, seed=2), path / 'test.pt')
    return path


@pytest.fixture
def loaders(folder):
    """make(dtype=..., device=..., **options) -> (train_loader, test_loader)."""
    def make(device='cpu', dtype=torch.float32, batch_size=32, aug=airbench94.hyp['aug'], **options):
        return (airbench94.CifarLoader(folder, True, batch_size, aug, device=device, dtype=dtype, **options),
                airbench94.CifarLoader(folder, False, device=device, dtype=dtype))
    return make


@pytest.fixture
def narrow():
    """hyp with a narrow network, batches of 32 and two epochs."""
    return airbench94.override(airbench94.hyp, NARROW + ['opt.train_epochs=2'])


@pytest.fixture(autouse=True)
def signal_handlers():
    """main sets its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_script(*args, cwd, script=ROOT / 'airbench94.py', env=None, **options):
    """Run the script to its end as a user would, and return the finished process with its text."""
    return subprocess.run([sys.executable, str(script), *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=280, **options)


def load_log(folder):
    return json.loads((folder / 'log.json').read_text())


def figures(run):
    """What of a run's record does not depend on the clock."""
    return [run['seed'], run['tta_val_acc'], [{**epoch, 'seconds': None} for epoch in run['epochs']]]
