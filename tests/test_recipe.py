"""airbench94's network, whitening, optimizer, evaluation and training, on random images."""

import copy
import math
import re

import pytest
import torch
from conftest import make_loaders

import airbench94
import swap94
from airbench94 import (
    ConvGroup,
    evaluate,
    infer,
    init_whitening_conv,
    learning_rate_share,
    lookahead,
    make_net,
    make_optimizer,
    train,
    tta_views,
)
from records import record94

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
def test_whitening_makes_the_second_moment_diagonal(eps):
    layer, moment, eigenvalues = whitened(make_loaders(dtype=torch.float64)[0], eps)
    expected = torch.diag(eigenvalues / (eigenvalues + eps))
    torch.testing.assert_close(moment[:12, :12], expected, rtol=0, atol=1e-9)
    assert torch.equal(layer.weight[12:], -layer.weight[:12])
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad and not layer.bias.any()


def test_whitening_signs_follow_the_stated_rule():
    layer, _, _ = whitened(make_loaders(dtype=torch.float64)[0], 5e-4)
    for entries in layer.weight[:12].flatten(1).tolist():
        half = max(map(abs, entries)) / 2
        assert next(entry for entry in entries if abs(entry) >= half) > 0


def test_initial_weights_depend_only_on_the_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_net(seed=0, **ON_CPU).state_dict()
    again = make_net(seed=0, **ON_CPU).state_dict()
    other = make_net(seed=1, **ON_CPU).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first['3.layers.0.conv.weight'], other['3.layers.0.conv.weight'])
    assert torch.equal(torch.get_rng_state(), before)


def test_convolutions_start_as_partial_identities():
    conv = make_net(**ON_CPU)[3].layers[0].conv  # 64 to 256 channels
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(conv(x)[:, :64], x)
    assert conv(x)[:, 64:].abs().sum() > 0


@pytest.mark.parametrize('depth', [2, 3, 5])
def test_a_conv_group_has_its_depth_and_its_residual_connection(depth):
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


def test_the_learning_rate_goes_through_the_corners_of_its_schedule():
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
        assert torch.equal(views[0][1], x)
        half = len(views) // 2
        for (_, plain), (_, mirrored) in zip(views[:half], views[half:]):
            assert torch.equal(mirrored, plain.flip(-1))
    up_left, down_right = views[1][1], views[2][1]
    assert torch.equal(up_left[:, :, :-1, :-1], x[:, :, 1:, 1:])
    assert torch.equal(down_right[:, :, 1:, 1:], x[:, :, :-1, :-1])
    # The border is reflected, not repeated.
    assert torch.equal(up_left[:, :, -1, :-1], x[:, :, -2, 1:])


def test_infer_is_the_weighted_mean_of_the_views(narrow):
    _, loader = make_loaders(dtype=torch.float64)
    net = make_net(narrow, device='cpu', dtype=torch.float64).eval()
    loader.batch_size = 25
    views = tta_views(loader.normalize(loader.images), 2)
    with torch.no_grad():
        expected = sum(weight * net(view) for weight, view in views)
    torch.testing.assert_close(infer(net, loader, 2), expected)
    correct = infer(net, loader).argmax(1) == loader.labels
    assert evaluate(net, loader) == correct.double().mean().item()


def test_lookahead_moves_averages_and_copies_them_into_weights():
    weights = [torch.ones(2, 3), torch.full((4,), 3.0, dtype=torch.float64)]
    averages = [torch.zeros_like(w) for w in weights]
    lookahead(averages, weights, decay=0.75)
    assert averages[0].eq(0.25).all() and averages[1].eq(0.75).all()
    assert all(torch.equal(a, w) for a, w in zip(averages, weights))
    weights[0].add_(1)
    lookahead(averages, weights, decay=1.0)
    assert weights[0].eq(0.25).all()


def test_torch_never_copies_lists_of_mixed_dtypes(monkeypatch):
    """torch 2.9 and 2.10 copy them wrongly."""
    calls = []
    copy_lists = torch._foreach_copy_

    def checked_copy(targets, sources):
        calls.append({tensor.dtype for tensor in [*targets, *sources]})
        copy_lists(targets, sources)

    monkeypatch.setattr(torch, '_foreach_copy_', checked_copy)
    dtypes = [torch.float16, torch.float32, torch.float16]
    weights = [torch.full((3,), i + 1, dtype=dtype) for i, dtype in enumerate(dtypes)]
    averages = [torch.zeros_like(weight) for weight in weights]
    lookahead(averages, weights, decay=0.5)
    assert [weight[0].item() for weight in weights] == [0.5, 1.0, 1.5]
    assert calls == [{torch.float16}, {torch.float32}]


def test_training_averages_weights_and_running_statistics(narrow):
    calls = []

    def recording_lookahead(averages, weights, decay):
        calls.append((decay, [w.data_ptr() for w in weights], len(averages)))
        lookahead(averages, weights, decay)

    narrow['opt']['train_epochs'] = 2.5  # of 6 steps
    net, _ = train(*make_loaders(), narrow, lookahead=recording_lookahead)
    averaged = net.state_dict()
    for name in list(averaged):
        if name.endswith('num_batches_tracked'):
            del averaged[name]
    assert '3.layers.0.norm.running_var' in averaged and '0.bias' in averaged
    decays = [0.95**5 * (step / 15) ** 3 for step in (5, 10, 15)] + [1.0]
    assert [decay for decay, *_ in calls] == pytest.approx(decays)
    for _, places, n in calls:  # the network's own tensors
        assert places == [v.data_ptr() for v in averaged.values()] and n == len(averaged)


def test_without_decay_there_is_no_lookahead(narrow):
    narrow['opt']['train_epochs'] = 1
    narrow['opt']['lookahead']['decay'] = 0.0
    _, record = train(*make_loaders(), narrow, lookahead=None)  # a call would fail
    assert record['tta_val_acc'] is not None


def test_training_learns_is_recorded_and_repeats_to_the_last_bit(narrow):
    narrow['opt']['train_epochs'] = 11.5
    rows = []
    net, record = train(*make_loaders(), narrow, seed=3, on_epoch=rows.append)
    assert record['tta_val_acc'] > 0.3 and 'failed' not in record
    assert record['seed'] == 3
    assert [epoch['epoch'] for epoch in record['epochs']] == list(range(1, 13))
    assert record['val_acc'] == record['epochs'][-1]['val_acc']
    seconds = [epoch['seconds'] for epoch in record['epochs']] + [record['seconds']]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert rows == record['epochs']

    narrow['opt']['train_epochs'] = 1.5
    net, _ = train(*make_loaders(), narrow, seed=3)
    train_loader, test_loader = make_loaders()
    train_loader.seed = 99
    list(train_loader)  # a used loader starts anew, with the run's seed
    again, _ = train(train_loader, test_loader, narrow, seed=3)
    weights, weights_again = net.state_dict(), again.state_dict()
    assert all(torch.equal(weights[key], weights_again[key]) for key in weights)
    other, _ = train(train_loader, test_loader, narrow, seed=4)
    assert not torch.equal(net[7].weight, other[7].weight)


def test_a_given_network_is_used_again(narrow):
    narrow['opt']['train_epochs'] = 1
    given = make_net(narrow, seed=77, **ON_CPU)
    net, _ = train(*make_loaders(), narrow, seed=3, net=given)
    fresh, _ = train(*make_loaders(), narrow, seed=3)
    assert net is given
    assert torch.equal(net[7].weight, fresh[7].weight)


def test_functions_can_be_replaced(narrow):
    narrow['opt']['train_epochs'] = 1
    called = []

    def noted(name):
        original = getattr(airbench94, name)

        def call(*args, **options):
            called.append(name)
            return original(*args, **options)

        return call

    names = ['make_net', 'make_optimizer', 'init_whitening_conv', 'compute_loss', 'forward']
    train(*make_loaders(), narrow, **{name: noted(name) for name in names})
    views = 1 + 6  # of the test images: validation, and test-time augmentation
    assert called == names[:3] + ['compute_loss'] * 6 + ['forward'] * views


def test_the_whitening_bias_is_frozen_after_its_epochs(narrow):
    biases = []  # before each step

    def recording_loss(net, *args):
        biases.append(net[0].bias.detach().clone())
        return airbench94.compute_loss(net, *args)

    narrow['opt'] |= {'train_epochs': 3, 'whiten_bias_epochs': 1}
    narrow['opt']['lookahead']['decay'] = 0.0
    train_loader, test_loader = make_loaders()
    train(train_loader, test_loader, narrow, compute_loss=recording_loss)
    frozen = biases[len(train_loader) :]
    assert not torch.equal(biases[0], frozen[0])
    assert len(frozen) == 12 and all(torch.equal(bias, frozen[0]) for bias in frozen)


def test_without_momentum_it_is_plain_sgd(narrow):
    narrow['opt'] |= {'momentum': 0.0, 'train_epochs': 1}
    net = make_net(narrow, **ON_CPU)
    optimizer, _ = make_optimizer(net, narrow, total_steps=10)
    assert {(group['momentum'], group['nesterov']) for group in optimizer.param_groups} == {
        (0.0, False)
    }
    _, record = train(*make_loaders(), narrow)
    assert 'failed' not in record and math.isfinite(record['epochs'][0]['train_loss'])


def test_a_loss_that_is_not_finite_ends_the_run(narrow):
    narrow['opt']['lr'] = 1e30
    _, record = train(*make_loaders(), narrow)
    assert re.fullmatch(r'the loss is nan at step [2-6]', record['failed'])
    assert record['tta_val_acc'] is None and record['epochs'] == []


def test_mirrored_views_are_only_for_networks_that_have_seen_mirrored_images(narrow):
    """The others are worse on mirrored images, for example of digits."""
    narrow['opt']['train_epochs'] = 1
    narrow['aug']['flip'] = False
    forwards = []

    def recording_forward(net, inputs):
        forwards.append(inputs)
        return net(inputs)

    _, record = train(*make_loaders(aug=narrow['aug']), narrow, forward=recording_forward)
    assert len(forwards) == 2 and record['tta_val_acc'] == record['val_acc']


def first_images(loader, n):
    """A copy of the loader with only its first n images."""
    loader = copy.copy(loader)
    loader.images = loader.images[:n]
    loader.labels = loader.labels[:n]
    return loader


def test_bfloat16_keeps_weights_in_fp32_and_learns(narrow):
    narrow['opt']['train_epochs'] = 10
    train_loader, test_loader = make_loaders(dtype=torch.bfloat16, aug=None)
    few = first_images(train_loader, 32)  # some CPUs have to imitate bfloat16, which is slow
    few_tests = first_images(test_loader, 16)
    net, record = train(few, few_tests, narrow)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert record['epochs'][-1]['train_acc'] > 0.5

    logits = infer(net, few_tests)
    in_fp32 = make_net(narrow, **ON_CPU)
    in_fp32.load_state_dict(net.state_dict())
    expected = infer(in_fp32, first_images(make_loaders()[1], 16))
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize('recipe', [airbench94, record94, swap94])
def test_bfloat16_whitens_images_in_fp32(recipe):
    """Whitening would magnify the rounding errors of pixels."""
    outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        loader = first_images(make_loaders(dtype=dtype)[1], 8)
        images = loader.normalize(loader.images)
        net = recipe.make_net(device='cpu', dtype=dtype)
        recipe.init_whitening_conv(net[0], images, eps=5e-4)
        net[0].register_forward_hook(lambda layer, images, output: outputs.append(output))
        net(images)
    assert torch.equal(*outputs)
