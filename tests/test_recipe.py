"""Network, whitening, test-time augmentation and training, on made-up data."""

import math
import re

import pytest
import torch

import airbench94
import airbench95
import airbench96
from airbench94 import ConvGroup, count_pflop, evaluate, infer, init_whitening_conv, lookahead, make_net, train, tta_views
from conftest import ROOT


def whitened(loader, eps):
    """(layer, normalized images, second moment of the layer's outputs, eigenvalues in descending order), float64."""
    layer = make_net(device='cpu', dtype=torch.float64)[0]
    images = loader.normalize(loader.images)
    init_whitening_conv(layer, images, eps)
    outputs = layer(images).transpose(0, 1).flatten(1)
    moment = outputs @ outputs.T / outputs.shape[1]
    patches = torch.nn.functional.unfold(images, 2).transpose(0, 1).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1]).flip(0)
    return layer, moment.detach(), eigenvalues


@pytest.mark.parametrize('eps', [5e-4, 0])
def test_whitening_makes_the_second_moment_diagonal(loaders, eps):
    layer, moment, eigenvalues = whitened(loaders(dtype=torch.float64)[0], eps)
    expected = torch.diag(eigenvalues / (eigenvalues + eps)) if eps else torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(moment[:12, :12], expected, rtol=0, atol=1e-9)
    assert torch.equal(layer.weight[12:], -layer.weight[:12])
    assert not layer.weight.requires_grad and layer.bias.requires_grad and not layer.bias.any()


def test_whitening_signs_follow_the_stated_rule(loaders):
    layer, _, _ = whitened(loaders(dtype=torch.float64)[0], 5e-4)
    for filter in layer.weight[:12].flatten(1).tolist():
        half = max(map(abs, filter)) / 2
        assert next(entry for entry in filter if abs(entry) >= half) > 0


def test_initial_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (make_net(seed=seed, device='cpu', dtype=torch.float32).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a['3.layers.0.conv.weight'], c['3.layers.0.conv.weight'])
    assert torch.equal(torch.get_rng_state(), before)


def test_convolutions_begin_as_partial_identities():
    conv = make_net(device='cpu', dtype=torch.float32)[3].layers[0].conv     # 64 to 256 channels
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(conv(x)[:, :64], x)
    assert conv(x)[:, 64:].abs().sum() > 0


def test_tta_weights_and_views():
    x = torch.arange(2 * 3 * 5 * 5.).view(2, 3, 5, 5)
    for level, weights in enumerate([[1], [1/2] * 2, [1/4] * 2 + [1/8] * 4]):
        views = tta_views(x, level)
        assert [weight for weight, _ in views] == weights
        assert torch.equal(views[0][1], x)
        for (_, plain), (_, mirrored) in zip(views[::2], views[1::2]):
            assert torch.equal(mirrored, plain.flip(-1))
    up_left, down_right = views[2][1], views[4][1]
    assert torch.equal(up_left[:, :, :-1, :-1], x[:, :, 1:, 1:])
    assert torch.equal(down_right[:, :, 1:, 1:], x[:, :, :-1, :-1])
    assert torch.equal(up_left[:, :, -1, :-1], x[:, :, -2, 1:])     # reflected, the border not repeated


def test_infer_is_the_weighted_mean_over_batches(loaders, narrow):
    _, loader = loaders(dtype=torch.float64)
    net = make_net(narrow, device='cpu', dtype=torch.float64).eval()
    loader.batch_size = 25
    views = tta_views(loader.normalize(loader.images), 2)
    torch.testing.assert_close(infer(net, loader, 2), sum(weight * net(view) for weight, view in views))
    assert evaluate(net, loader) == (infer(net, loader).argmax(1) == loader.labels).double().mean().item()


def test_lookahead_moves_averages_and_resets_weights_to_them():
    weights = [torch.ones(2, 3), torch.full((4,), 3.0, dtype=torch.float64)]
    averages = [torch.zeros_like(w) for w in weights]
    lookahead(averages, weights, decay=0.75)
    assert averages[0].eq(0.25).all() and averages[1].eq(0.75).all()
    assert all(torch.equal(a, w) for a, w in zip(averages, weights))
    weights[0].add_(1)
    lookahead(averages, weights, decay=1.0)
    assert weights[0].eq(0.25).all()


def test_training_averages_weights_and_running_statistics(loaders, narrow):
    calls = []

    def recording_lookahead(averages, weights, decay):
        calls.append((decay, [w.data_ptr() for w in weights], len(averages)))
        lookahead(averages, weights, decay)

    narrow['opt']['train_epochs'] = 2.5     # of 6 steps
    net, _ = train(*loaders(), narrow, lookahead=recording_lookahead)
    averaged = {name: v for name, v in net.state_dict().items() if not name.endswith('num_batches_tracked')}
    assert '3.layers.0.norm.running_var' in averaged and '0.bias' in averaged
    assert [decay for decay, *_ in calls] == pytest.approx([0.95**5 * (step / 15)**3 for step in (5, 10, 15)] + [1.0])
    for _, places, n in calls:      # the network's own tensors, all but its counters
        assert places == [v.data_ptr() for v in averaged.values()] and n == len(averaged)


def test_training_learns_is_recorded_and_repeats_to_the_last_bit(loaders, narrow):
    narrow['opt']['train_epochs'] = 15.5
    rows = []
    net, record = train(*loaders(), narrow, seed=3, on_epoch=rows.append)
    assert record['tta_val_acc'] > 0.3 and 'failed' not in record
    assert record['seed'] == 3 and [e['epoch'] for e in record['epochs']] == list(range(1, 17))
    assert record['val_acc'] == record['epochs'][-1]['val_acc']
    seconds = [e['seconds'] for e in record['epochs']] + [record['seconds']]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert rows == record['epochs']

    train_loader, test_loader = loaders(seed=99)
    list(train_loader)      # a loader that is in use is rewound and gets the run's seed
    again, _ = train(train_loader, test_loader, narrow, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    other, _ = train(train_loader, test_loader, narrow, seed=4)
    assert not torch.equal(net[7].weight, other[7].weight)


def test_the_whitening_bias_is_frozen_after_its_epochs(loaders, narrow):
    seen = []
    narrow['opt'].update(train_epochs=3, whiten_bias_epochs=1)
    train_loader, test_loader = loaders()

    original = airbench94.train_step

    def spying_step(net, *args):
        result = original(net, *args)
        seen.append(net[0].bias.detach().clone())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(airbench94, 'train_step', spying_step)
        train(train_loader, test_loader, narrow, lookahead=lambda averages, weights, decay: None)
    steps = len(train_loader)
    assert not torch.equal(seen[0], seen[steps - 1])
    assert all(torch.equal(bias, seen[steps - 1]) for bias in seen[steps:])


def test_a_loss_that_is_not_finite_ends_the_run(loaders, narrow):
    narrow['opt']['lr'] = 1e30
    net, record = train(*loaders(), narrow)
    assert 1 < record['failed']['step'] <= 6 and 'nan' in record['failed']['reason']
    assert record['tta_val_acc'] is None and record['epochs'] == []


PAPER96 = re.search(r'^python airbench96.py (.*net.widths.*)$', (ROOT / 'README.md').read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize('hyp, published', [
    (airbench94.hyp, 0.36), (airbench95.hyp, 1.39), (airbench96.hyp, 4.91),
    (airbench94.override(airbench96.hyp, PAPER96.split()), 7.2),    # the README's command line
], ids=['94', '95', '96', 'paper96'])
def test_pflop_a_run_is_what_was_published(hyp, published, loaders):
    train_loader, test_loader = loaders(batch_size=1024)
    train_loader.images = torch.empty(50000, 32, 32, 3, dtype=torch.uint8, device='meta')
    test_loader.images = torch.empty(10000, 32, 32, 3, dtype=torch.uint8, device='meta')
    assert math.isclose(count_pflop(train_loader, test_loader, hyp), published, rel_tol=0.02)


@pytest.mark.parametrize('depth', [2, 3, 5])
def test_a_group_has_its_depth_and_its_residual_connection(depth):
    settings = {'depth': depth, 'batchnorm_momentum': 0.6, 'batchnorm_eps': 1e-12}
    x, activ = torch.randn(4, 3, 8, 8), torch.nn.GELU()
    for residual in (False, True):
        group = ConvGroup(3, 6, residual=residual, **settings).eval()
        assert len(group.layers) == depth and group(x).shape == (4, 6, 4, 4)
        torch.nn.init.zeros_(group.layers[-1].conv.weight)
        expected = activ(activ(group.layers[0](x))) if residual else torch.zeros(4, 6, 4, 4)
        torch.testing.assert_close(group(x), expected)
