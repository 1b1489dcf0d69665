"""The whole recipe against trajectories of the published scripts: float64, agreement to 1e-9."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import save_set
from torch.testing import assert_close

import airbench94

CLOSE = {'rtol': 1e-9, 'atol': 1e-9}
PATHS = sorted((Path(__file__).parent / 'golden').glob('*.json'))
assert len(PATHS) == 3, 'golden trajectories are missing'


@pytest.fixture(params=PATHS, ids=[path.stem for path in PATHS])
def golden(request):
    return json.loads(request.param.read_text())


def golden_sets(golden):
    """The training and the test set of a golden file."""
    g = torch.Generator().manual_seed(golden['seed'])
    n = golden['steps_per_epoch'] * golden['batch_size']
    images = torch.randint(0, 256, (n, 32, 32, 3), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 10, (n,), generator=g)
    test_images = torch.randint(0, 256, (32, 32, 32, 3), generator=g, dtype=torch.uint8)
    test_labels = torch.zeros(32, dtype=torch.int64)
    classes = airbench94.CIFAR_CLASSES  # so that CIFAR-10's mean and std apply
    return (
        {'images': images, 'labels': labels, 'classes': classes},
        {'images': test_images, 'labels': test_labels, 'classes': classes},
    )


def set_weights(net, seed):
    for i, p in enumerate(net.parameters()):
        if p.ndim > 1:
            g = torch.Generator().manual_seed(seed * 1000 + i)
            normal = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.data.copy_(normal / math.sqrt(p[0].numel()))


def as_float64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_golden_trajectory(golden, tmp_path, monkeypatch):
    script = importlib.import_module(golden['script'])
    save_set(tmp_path, *golden_sets(golden))
    settings = {'opt.train_epochs': golden['train_epochs'], 'opt.batch_size': golden['batch_size']}
    settings |= {f'net.widths.{block}': width for block, width in golden['widths'].items()}
    hyp = script.override(script.hyp, [f'{key}={value}' for key, value in settings.items()])
    losses = []
    make_net = script.make_net

    def make_golden_net(*args, **kwargs):
        net = make_net(*args, **kwargs)
        set_weights(net, golden['seed'])
        return net

    def leave_whitening(layer, images, eps):
        pass

    def recording_compute_loss(*args):
        loss, outputs = script.compute_loss(*args)
        losses.append(loss.item())
        return loss, outputs

    monkeypatch.setattr(script, 'make_net', make_golden_net)
    monkeypatch.setattr(script, 'init_whitening_conv', leave_whitening)
    options = {'device': 'cpu', 'dtype': torch.float64}
    batch_size = golden['batch_size']
    train_loader = script.CifarLoader(tmp_path, True, batch_size, shuffle=False, **options)
    test_loader = script.CifarLoader(tmp_path, False, **options)
    net, _ = script.train(
        train_loader, test_loader, hyp, seed=7, compute_loss=recording_compute_loss
    )

    assert [list(p.shape) for p in net.parameters()] == golden['parameter_shapes']
    assert_close(as_float64(losses), as_float64(golden['losses']), **CLOSE)
    assert list(golden['logits']) == ['0', '1', '2']
    for level, logits in golden['logits'].items():
        assert_close(script.infer(net, test_loader, int(level)), as_float64(logits), **CLOSE)
    norms = [p.detach().norm().item() for p in net.parameters()]
    assert norms == pytest.approx(golden['weight_norms'], rel=1e-9, abs=1e-9)
    norms = [b.norm().item() for b in net.buffers() if b.is_floating_point()]
    assert norms == pytest.approx(golden['buffer_norms'], rel=1e-9, abs=1e-9)


def test_default_shapes(golden):
    script = importlib.import_module(golden['script'])
    net = script.make_net(device='meta', dtype=torch.float16)
    assert [list(p.shape) for p in net.parameters()] == golden['default_parameter_shapes']
