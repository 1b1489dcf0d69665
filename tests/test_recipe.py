"""Network, whitening, optimizer, evaluation and training, on made-up data."""

import math
import re

import pytest
import torch
from conftest import ROOT

import airbench94
import airbench95
import airbench96
from airbench94 import (
    ConvGroup,
    count_pflop,
    evaluate,
    first_images,
    infer,
    init_whitening_conv,
    learning_rate_share,
    lookahead,
    make_net,
    make_optimizer,
    train,
    tta_views,
)

ON_CPU = {'device': 'cpu', 'dtype': torch.float32}


def whitened(loader, eps):
    """A layer that whitens the loader's images, in float64.

    Returns (layer, second moment of its outputs, eigenvalues of the patches' in descending order).
    """
    layer = make_net(device='cpu', dtype=torch.float64)[0]
    images = loader.normalize(loader.images)
    init_whitening_conv(layer, images, eps)
    outputs = layer(images).transpose(0, 1).flatten(1)
    moment = outputs @ outputs.T / outputs.shape[1]
    patches = torch.nn.functional.unfold(images, 2).transpose(0, 1).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1])
    return layer, moment.detach(), eigenvalues.flip(0)


@pytest.mark.parametrize('eps', [5e-4, 0])
def test_whitening_makes_the_second_moment_diagonal(eps, loaders):
    layer, moment, eigenvalues = whitened(loaders(dtype=torch.float64)[0], eps)
    expected = torch.diag(eigenvalues / (eigenvalues + eps))
    torch.testing.assert_close(moment[:12, :12], expected, rtol=0, atol=1e-9)
    assert torch.equal(layer.weight[12:], -layer.weight[:12])
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad and not layer.bias.any()


def test_whitening_signs_follow_the_stated_rule(loaders):
    layer, _, _ = whitened(loaders(dtype=torch.float64)[0], 5e-4)
    for entries in layer.weight[:12].flatten(1).tolist():
        half = max(map(abs, entries)) / 2
        assert next(entry for entry in entries if abs(entry) >= half) > 0


def test_initial_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_net(seed=0, **ON_CPU).state_dict()
    again = make_net(seed=0, **ON_CPU).state_dict()
    other = make_net(seed=1, **ON_CPU).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first['3.layers.0.conv.weight'], other['3.layers.0.conv.weight'])
    assert torch.equal(torch.get_rng_state(), before)


def test_convolutions_begin_as_partial_identities():
    conv = make_net(**ON_CPU)[3].layers[0].conv  # 64 to 256 channels
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(conv(x)[:, :64], x)
    assert conv(x)[:, 64:].abs().sum() > 0


@pytest.mark.parametrize('depth', [2, 3, 5])
def test_a_group_has_its_depth_and_its_residual_connection(depth):
    settings = {'depth': depth, 'batchnorm_momentum': 0.6, 'batchnorm_eps': 1e-12}
    x, activ = torch.randn(4, 3, 8, 8), torch.nn.GELU()
    for residual in (False, True):
        group = ConvGroup(3, 6, residual=residual, **settings).eval()
        assert len(group.layers) == depth and group(x).shape == (4, 6, 4, 4)
        torch.nn.init.zeros_(group.layers[-1].conv.weight)
        expected = torch.zeros(4, 6, 4, 4)
        if residual:
            expected = activ(activ(group.layers[0](x)))
        torch.testing.assert_close(group(x), expected)


def test_the_learning_rate_has_its_corners():
    schedule = {'start': 0.2, 'peak_at': 0.23, 'end': 0.07}
    shares = [learning_rate_share(step, 100, schedule) for step in (0, 23, 100)]
    assert shares == [0.2, 1.0, 0.07]
    assert learning_rate_share(11.5, 100, schedule) == pytest.approx(0.6)
    assert learning_rate_share(61.5, 100, schedule) == pytest.approx(0.535)
    at_once = schedule | {'peak_at': 0.0}
    assert learning_rate_share(0, 100, at_once) == 1.0


def test_tta_weights_and_views():
    x = torch.arange(2 * 3 * 5 * 5.0).view(2, 3, 5, 5)
    expected = [[1], [1 / 2] * 2, [1 / 4, 1 / 8, 1 / 8] * 2]
    for level, weights in enumerate(expected):
        views = tta_views(x, level)
        assert [weight for weight, _ in views] == weights
        assert len(views) == airbench94.TTA_VIEWS[level]
        assert torch.equal(views[0][1], x)
        half = len(views) // 2
        for (_, plain), (_, mirrored) in zip(views[:half], views[half:]):
            assert torch.equal(mirrored, plain.flip(-1))
    up_left, down_right = views[1][1], views[2][1]
    assert torch.equal(up_left[:, :, :-1, :-1], x[:, :, 1:, 1:])
    assert torch.equal(down_right[:, :, 1:, 1:], x[:, :, :-1, :-1])
    # The border is reflected, and not repeated.
    assert torch.equal(up_left[:, :, -1, :-1], x[:, :, -2, 1:])


def test_infer_is_the_weighted_mean_over_batches(loaders, narrow):
    _, loader = loaders(dtype=torch.float64)
    net = make_net(narrow, device='cpu', dtype=torch.float64).eval()
    loader.batch_size = 25
    views = tta_views(loader.normalize(loader.images), 2)
    with torch.no_grad():
        expected = sum(weight * net(view) for weight, view in views)
    torch.testing.assert_close(infer(net, loader, 2), expected)
    correct = infer(net, loader).argmax(1) == loader.labels
    assert evaluate(net, loader) == correct.double().mean().item()


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

    narrow['opt']['train_epochs'] = 2.5  # of 6 steps
    net, _ = train(*loaders(), narrow, lookahead=recording_lookahead)
    averaged = net.state_dict()
    for name in list(averaged):
        if name.endswith('num_batches_tracked'):
            del averaged[name]
    assert '3.layers.0.norm.running_var' in averaged and '0.bias' in averaged
    decays = [0.95**5 * (step / 15) ** 3 for step in (5, 10, 15)] + [1.0]
    assert [decay for decay, *_ in calls] == pytest.approx(decays)
    for _, places, n in calls:  # the network's own tensors
        assert places == [v.data_ptr() for v in averaged.values()] and n == len(averaged)


def test_without_decay_there_is_no_lookahead(loaders, narrow):
    narrow['opt']['train_epochs'] = 1
    narrow['opt']['lookahead']['decay'] = 0.0
    _, record = train(*loaders(), narrow, lookahead=None)  # a call would fail
    assert record['tta_val_acc'] is not None


def test_training_learns_is_recorded_and_repeats_to_the_last_bit(loaders, narrow):
    narrow['opt']['train_epochs'] = 11.5
    rows = []
    net, record = train(*loaders(), narrow, seed=3, on_epoch=rows.append)
    assert record['tta_val_acc'] > 0.3 and 'failed' not in record
    assert record['seed'] == 3
    assert [epoch['epoch'] for epoch in record['epochs']] == list(range(1, 13))
    assert record['val_acc'] == record['epochs'][-1]['val_acc']
    seconds = [epoch['seconds'] for epoch in record['epochs']] + [record['seconds']]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert rows == record['epochs']

    narrow['opt']['train_epochs'] = 1.5
    net, _ = train(*loaders(), narrow, seed=3)
    train_loader, test_loader = loaders(seed=99)
    list(train_loader)  # a loader that is in use starts anew, with the run's seed
    again, _ = train(train_loader, test_loader, narrow, seed=3)
    weights, weights_again = net.state_dict(), again.state_dict()
    assert all(torch.equal(weights[key], weights_again[key]) for key in weights)
    other, _ = train(train_loader, test_loader, narrow, seed=4)
    assert not torch.equal(net[7].weight, other[7].weight)


def test_a_network_that_is_given_is_overwritten(loaders, narrow):
    narrow['opt']['train_epochs'] = 1
    given = make_net(narrow, seed=77, **ON_CPU)
    net, _ = train(*loaders(), narrow, seed=3, net=given)
    fresh, _ = train(*loaders(), narrow, seed=3)
    assert net is given
    assert torch.equal(net[7].weight, fresh[7].weight)


def test_the_whitening_bias_is_frozen_after_its_epochs(loaders, narrow, monkeypatch):
    biases = []
    train_step = airbench94.train_step

    def recording_step(net, *args):
        result = train_step(net, *args)
        biases.append(net[0].bias.detach().clone())
        return result

    monkeypatch.setattr(airbench94, 'train_step', recording_step)
    narrow['opt'] |= {'train_epochs': 3, 'whiten_bias_epochs': 1}
    narrow['opt']['lookahead']['decay'] = 0.0
    train_loader, test_loader = loaders()
    train(train_loader, test_loader, narrow)
    last = len(train_loader) - 1
    assert not torch.equal(biases[0], biases[last])
    assert all(torch.equal(bias, biases[last]) for bias in biases[last:])


def test_without_momentum_it_is_plain_sgd(loaders, narrow):
    narrow['opt'] |= {'momentum': 0.0, 'train_epochs': 1}
    net = make_net(narrow, **ON_CPU)
    optimizer, _ = make_optimizer(net, narrow, total_steps=10)
    assert {(group['momentum'], group['nesterov']) for group in optimizer.param_groups} == {
        (0.0, False)
    }
    _, record = train(*loaders(), narrow)
    assert 'failed' not in record and math.isfinite(record['epochs'][0]['train_loss'])


def test_a_loss_that_is_not_finite_ends_the_run(loaders, narrow):
    narrow['opt']['lr'] = 1e30
    _, record = train(*loaders(), narrow)
    assert 1 < record['failed']['step'] <= 6 and 'nan' in record['failed']['reason']
    assert record['tta_val_acc'] is None and record['epochs'] == []


def test_bfloat16_keeps_weights_in_fp32_and_learns(loaders, narrow):
    narrow['opt']['train_epochs'] = 10
    train_loader, test_loader = loaders(dtype=torch.bfloat16, aug=None)
    few = first_images(train_loader, 32)  # a CPU may have to imitate bfloat16, which takes long
    few_tests = first_images(test_loader, 16)
    net, record = train(few, few_tests, narrow)
    assert next(iter(few))[0].dtype == torch.bfloat16
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert record['epochs'][-1]['train_acc'] > 0.5

    logits = infer(net, few_tests)
    in_fp32 = make_net(narrow, **ON_CPU)
    in_fp32.load_state_dict(net.state_dict())
    expected = infer(in_fp32, first_images(loaders()[1], 16))
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.03)


README = (ROOT / 'README.md').read_text()
PAPER96 = re.search(r'^python airbench96\.py (opt\.train_epochs=40 .*?)```', README, re.M | re.S)[1]
OF_PAPER96 = airbench96.override(airbench96.hyp, PAPER96.replace('\\', '').split())


@pytest.mark.parametrize(
    ('hyp', 'published'),
    [(airbench94.hyp, 0.36), (airbench95.hyp, 1.39), (airbench96.hyp, 4.91), (OF_PAPER96, 7.2)],
    ids=['94', '95', '96', 'paper96'],
)
def test_pflop_a_run_is_what_was_published(hyp, published, loaders):
    train_loader, test_loader = loaders(batch_size=1024)
    train_loader.images = torch.empty(50000, 32, 32, 3, dtype=torch.uint8, device='meta')
    test_loader.images = torch.empty(10000, 32, 32, 3, dtype=torch.uint8, device='meta')
    assert count_pflop(train_loader, test_loader, hyp) == pytest.approx(published, rel=0.02)
