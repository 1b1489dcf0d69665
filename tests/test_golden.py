"""The whole recipe against trajectories of the published scripts: float64, agreement to 1e-9."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import airbench94

GOLDEN = sorted((Path(__file__).parent / 'golden').glob('*.json'))
assert GOLDEN, 'the golden trajectories are missing'


def golden_sets(golden):
    """The training and test set of a golden file, in the cache format."""
    g = torch.Generator().manual_seed(golden['seed'])
    images = torch.randint(0, 256, (golden['steps_per_epoch'] * golden['batch_size'], 32, 32, 3),
                           generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(images),), generator=g)
    test = torch.randint(0, 256, (32, 32, 32, 3), generator=g, dtype=torch.uint8)
    classes = airbench94.CIFAR_CLASSES     # so that CIFAR-10's mean and std apply
    return ({'images': images, 'labels': labels, 'classes': classes},
            {'images': test, 'labels': torch.zeros(32, dtype=torch.int64), 'classes': classes})


def set_weights(net, seed):
    for i, p in enumerate(net.parameters()):
        if p.ndim > 1:
            g = torch.Generator().manual_seed(seed * 1000 + i)
            p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / math.sqrt(p[0].numel()))


@pytest.mark.parametrize('path', GOLDEN, ids=lambda path: path.stem)
def test_golden_trajectory(path, tmp_path, monkeypatch):
    golden = json.loads(path.read_text())
    script = __import__(golden['script'])
    for name, data in zip(('train.pt', 'test.pt'), golden_sets(golden)):
        torch.save(data, tmp_path / name)
    overrides = [f'opt.train_epochs={golden["train_epochs"]}', f'opt.batch_size={golden["batch_size"]}']
    overrides += [f'net.widths.{block}={width}' for block, width in golden['widths'].items()]
    hyp = script.override(script.hyp, overrides)

    losses, make_net, compute_loss = [], script.make_net, script.compute_loss

    def make_golden_net(*args, **kwargs):
        net = make_net(*args, **kwargs)
        set_weights(net, golden['seed'])
        return net

    def recording_compute_loss(*args):
        loss, outputs = compute_loss(*args)
        losses.append(loss.item())
        return loss, outputs

    monkeypatch.setattr(script, 'make_net', make_golden_net)
    monkeypatch.setattr(script, 'init_whitening_conv', lambda *args: None)
    train_loader = script.CifarLoader(tmp_path, batch_size=golden['batch_size'], shuffle=False,
                                      device='cpu', dtype=torch.float64)
    test_loader = script.CifarLoader(tmp_path, train=False, device='cpu', dtype=torch.float64)
    net, _ = script.train(train_loader, test_loader, hyp, seed=7, compute_loss=recording_compute_loss)

    close = {'rtol': 1e-9, 'atol': 1e-9}
    assert [list(p.shape) for p in net.parameters()] == golden['parameter_shapes']
    assert_close(torch.tensor(losses, dtype=torch.float64), torch.tensor(golden['losses'], dtype=torch.float64), **close)
    for level, logits in golden['logits'].items():
        assert_close(script.infer(net, test_loader, int(level)), torch.tensor(logits, dtype=torch.float64), **close)
    norms = [p.detach().norm().item() for p in net.parameters()]
    assert norms == pytest.approx(golden['weight_norms'], rel=1e-9, abs=1e-9)
    norms = [b.norm().item() for b in net.buffers() if b.is_floating_point()]
    assert norms == pytest.approx(golden['buffer_norms'], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize('path', GOLDEN, ids=lambda path: path.stem)
def test_default_shapes(path):
    golden = json.loads(path.read_text())
    net = __import__(golden['script']).make_net(device='meta', dtype=torch.float16)
    assert [list(p.shape) for p in net.parameters()] == golden['default_parameter_shapes']
