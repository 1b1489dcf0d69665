"""Whole runs against trajectories of the published scripts, in float64, to 1e-9."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lab.options import override

CLOSE = {'rtol': 1e-9, 'atol': 1e-9}
FLOAT64 = {'device': 'cpu', 'dtype': torch.float64}
PATHS = sorted((Path(__file__).parent / 'golden').glob('*.json'))


@pytest.fixture(params=PATHS, ids=[path.stem for path in PATHS])
def golden(request):
    return json.loads(request.param.read_text())


def golden_sets(golden):
    """The training and the test set of a golden file, each as (images, labels)."""
    g = torch.Generator().manual_seed(golden['seed'])
    n = golden['steps_per_epoch'] * golden['batch_size']
    images = torch.randint(0, 256, (n, 32, 32, 3), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 10, (n,), generator=g)
    test_images = torch.randint(0, 256, (32, 32, 32, 3), generator=g, dtype=torch.uint8)
    return (images, labels), (test_images, torch.zeros(32, dtype=torch.int64))


def set_weights(net, seed):
    for i, p in enumerate(net.parameters()):
        if p.ndim > 1:
            g = torch.Generator().manual_seed(seed * 1000 + i)
            normal = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.data.copy_(normal / math.sqrt(p[0].numel()))


def leave_whitening(layer, images, eps):
    pass


def as_float64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_every_published_script_has_a_trajectory():
    assert [path.stem for path in PATHS] == ['airbench94', 'airbench95', 'airbench96']


def test_golden_trajectory(golden):
    recipe = importlib.import_module(golden['script'])
    settings = {'opt.train_epochs': golden['train_epochs'], 'opt.batch_size': golden['batch_size']}
    settings |= {f'net.widths.{block}': width for block, width in golden['widths'].items()}
    hyp = override(recipe.hyp, [f'{key}={value}' for key, value in settings.items()])
    losses = []

    def make_golden_net(*args, **options):
        net = recipe.make_net(*args, **options)
        set_weights(net, golden['seed'])
        return net

    def recording_compute_loss(*args):
        loss, outputs = recipe.compute_loss(*args)
        losses.append(loss.item())
        return loss, outputs

    train_set, test_set = golden_sets(golden)
    # This loader serves the images in order and without augmentation.
    train_loader = recipe.CifarLoader(*train_set, golden['batch_size'], **FLOAT64)
    test_loader = recipe.CifarLoader(*test_set, **FLOAT64)
    net, _ = recipe.train(
        train_loader,
        test_loader,
        hyp,
        seed=7,
        make_net=make_golden_net,
        init_whitening_conv=leave_whitening,
        compute_loss=recording_compute_loss,
    )

    assert [list(p.shape) for p in net.parameters()] == golden['parameter_shapes']
    assert_close(as_float64(losses), as_float64(golden['losses']), **CLOSE)
    assert list(golden['logits']) == ['0', '1', '2']
    for level, logits in golden['logits'].items():
        assert_close(recipe.infer(net, test_loader, int(level)), as_float64(logits), **CLOSE)
    norms = [p.detach().norm().item() for p in net.parameters()]
    assert norms == pytest.approx(golden['weight_norms'], rel=1e-9, abs=1e-9)
    norms = [b.norm().item() for b in net.buffers() if b.is_floating_point()]
    assert norms == pytest.approx(golden['buffer_norms'], rel=1e-9, abs=1e-9)


def test_default_shapes(golden):
    recipe = importlib.import_module(golden['script'])
    net = recipe.make_net(device='meta', dtype=torch.float16)
    assert [list(p.shape) for p in net.parameters()] == golden['default_parameter_shapes']
