"""Augmentation against a slow reference, and what the loader draws and serves."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import made_up_split, save_set

from airbench94 import CIFAR_MEAN, CIFAR_STD, CifarLoader, UserError, augment

MEAN = torch.tensor([125.5, 60.25, 33.0])  # in units of a pixel
SCALE = 1 / torch.tensor([64.0, 50.0, 77.0])
NORMALIZE = {'mean': MEAN, 'scale': SCALE}
WITH_CUTOUT = {'flip': True, 'translate': 4, 'cutout': 12}


def slow_reflect(position, size):
    while not 0 <= position < size:
        position = -position if position < 0 else 2 * (size - 1) - position
    return position


def slow_augment(images, index, flip, shift, corner=None, size=0):
    """`augment`, pixel by pixel, as its specification reads; fp32."""
    height, width = images.shape[1:3]
    out = np.empty((len(index), 3, height, width), np.float32)
    for b, n in enumerate(index.tolist()):
        dy, dx = shift[b].tolist()
        top, left = corner[b].tolist() if size else (0, 0)
        for y in range(height):
            for x in range(width):
                mirrored = width - 1 - x if flip[b] else x
                row, column = slow_reflect(y + dy, height), slow_reflect(mirrored + dx, width)
                pixel = images[n, row, column].numpy().astype(np.float32)
                out[b, :, y, x] = (pixel - MEAN.numpy()) * SCALE.numpy()
                if top <= y < top + size and left <= x < left + size:
                    out[b, :, y, x] = 0
    return torch.from_numpy(out)


def random_images(n, height, width):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, height, width, 3), generator=g, dtype=torch.uint8)


def unmoved(n):
    """flip and shift that leave n images as they are."""
    return torch.zeros(n, dtype=torch.bool), torch.zeros(n, 2, dtype=torch.int64)


def assert_same_batches(loader, other):
    for (inputs, labels), (other_inputs, other_labels) in zip(loader, other, strict=True):
        assert torch.equal(inputs, other_inputs) and torch.equal(labels, other_labels)


@pytest.mark.parametrize(('height', 'width'), [(4, 4), (3, 5)])
def test_augment_equals_the_slow_reference_for_every_shift_and_flip(height, width):
    images = random_images(7, height, width)
    cases = [
        (flip, dy, dx)
        for flip in (False, True)
        for dy in range(1 - height, height)
        for dx in range(1 - width, width)
    ]
    flip = torch.tensor([case[0] for case in cases])
    shift = torch.tensor([case[1:] for case in cases])
    index = torch.arange(len(cases)) % len(images)
    got = augment(images, index, flip, shift, **NORMALIZE, dtype=torch.float32)
    assert torch.equal(got, slow_augment(images, index, flip, shift))


@pytest.mark.parametrize('size', [1, 2, 4])
def test_cutout_equals_the_slow_reference_at_every_corner(size):
    images = random_images(3, 4, 5)
    corner = torch.tensor([(y, x) for y in range(4 - size + 1) for x in range(5 - size + 1)])
    g = torch.Generator().manual_seed(0)
    index = torch.arange(len(corner)) % 3
    flip = torch.rand(len(corner), generator=g) < 0.5
    shift = torch.randint(-3, 4, (len(corner), 2), generator=g)
    draws = index, flip, shift, corner, size
    got = augment(images, *draws, **NORMALIZE, dtype=torch.float32)
    assert torch.equal(got, slow_augment(images, *draws))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_augment_without_draws_only_normalizes_and_is_channels_last(loaders):
    loader, _ = loaders()
    index = torch.tensor([5, 0, 199])
    normalize = {'mean': loader.pixel_mean, 'scale': loader.pixel_scale}
    still = augment(loader.images, index, *unmoved(3), **normalize, dtype=torch.float32)
    assert torch.equal(still, loader.normalize(loader.images[index]))
    assert still.is_contiguous(memory_format=torch.channels_last)
    pixels = loader.images[index].double() / 255
    plain = (pixels - torch.tensor(CIFAR_MEAN)) / torch.tensor(CIFAR_STD)
    torch.testing.assert_close(still.double(), plain.permute(0, 3, 1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_fp32_rounded_once(dtype):
    images = random_images(4, 8, 8)
    flip = torch.tensor([True, False, True, False])
    shift = torch.tensor([[1, -2], [0, 0], [-7, 7], [2, 2]])
    draws = torch.arange(4), flip, shift
    half = augment(images, *draws, **NORMALIZE, dtype=dtype)
    single = augment(images, *draws, **NORMALIZE, dtype=torch.float32)
    assert half.dtype == dtype and torch.equal(half, single.to(dtype))


def test_a_loader_in_float64_normalizes_in_float64(loaders):
    loader, _ = loaders(dtype=torch.float64)
    mean, std = torch.tensor([loader.mean, loader.std], dtype=torch.float64)
    plain = (loader.images.double() / 255 - mean) / std
    got = loader.normalize(loader.images)
    torch.testing.assert_close(got, plain.permute(0, 3, 1, 2), rtol=1e-13, atol=1e-13)


def test_draws_are_a_function_of_seed_and_epoch_alone(loaders):
    one, two = loaders(seed=3)[0], loaders(seed=3)[0]
    list(one)  # serving an epoch changes no draw
    for epoch in (0, 1, 5):
        a, b = one.draw(epoch), two.draw(epoch)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    first, second, other = one.draw(0), one.draw(1), loaders(seed=4)[0].draw(0)
    for name in ('order', 'flip', 'shift'):
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])


def test_draws_have_the_promised_form(loaders):
    draws = loaders(aug=WITH_CUTOUT)[0].draw(0)
    assert {name: (v.dtype, tuple(v.shape), v.device.type) for name, v in draws.items()} == {
        'order': (torch.int64, (200,), 'cpu'),
        'flip': (torch.bool, (200,), 'cpu'),
        'shift': (torch.int64, (200, 2), 'cpu'),
        'corner': (torch.int64, (200, 2), 'cpu'),
    }
    assert sorted(draws['order'].tolist()) == list(range(200))
    assert set(draws['shift'].flatten().tolist()) == set(range(-4, 5))
    assert 60 < draws['flip'].sum() < 140
    assert set(draws['corner'].flatten().tolist()) == set(range(21))  # the square is inside


def test_a_corner_is_drawn_with_cutout_alone(loaders):
    assert loaders()[0].draw(0).keys() == {'order', 'flip', 'shift'}


def test_alternating_flip(loaders):
    flips = [loaders()[0].draw(epoch)['flip'] for epoch in range(4)]
    for now, then in pairwise(flips):
        assert torch.equal(now, ~then)


def test_order_and_augmentation_are_drawn_apart(loaders):
    shuffled = loaders(aug=WITH_CUTOUT)[0].draw(1)
    ordered = loaders(aug=WITH_CUTOUT, shuffle=False)[0].draw(1)
    assert ordered['order'].tolist() == list(range(200)) != shuffled['order'].tolist()
    for name in ('flip', 'shift', 'corner'):
        assert torch.equal(shuffled[name], ordered[name])


def test_no_augmentation_draws_none(loaders):
    draws = loaders(aug=None)[0].draw(1)
    assert not draws['flip'].any() and not draws['shift'].any()


def test_an_epoch_serves_what_was_drawn(loaders):
    loader, _ = loaders(seed=5, aug=WITH_CUTOUT)
    options = {'mean': loader.pixel_mean, 'scale': loader.pixel_scale, 'dtype': torch.float32}
    for epoch in range(2):
        draws = loader.draw(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 200 // 32
        for i, (inputs, labels) in enumerate(batches):
            index = draws['order'][32 * i : 32 * (i + 1)]
            of_batch = [draws[name][index] for name in ('flip', 'shift', 'corner')]
            assert torch.equal(labels, loader.labels[index])
            assert torch.equal(inputs, augment(loader.images, index, *of_batch, size=12, **options))
            assert ((inputs == 0).all(1).sum((1, 2)) == 144).all()


def test_draws_that_were_sent_ahead_are_used(loaders, monkeypatch):
    loader, _ = loaders()
    drawn = []
    draw = loader.draw

    def recording_draw(epoch):
        drawn.append(epoch)
        return draw(epoch)

    monkeypatch.setattr(loader, 'draw', recording_draw)
    for _ in range(3):
        list(loader)
    assert drawn == [0, 1, 2, 3]


def another_seed(loader):
    loader.seed = 9


def rewind(loader):
    loader.epoch = 0


def fewer_images(loader):
    loader.images, loader.labels = loader.images[50:], loader.labels[50:]


def other_images(loader):
    loader.images, loader.labels = loader.images.flip(0), loader.labels.flip(0)


def another_augmentation(loader):
    loader.aug = WITH_CUTOUT


def no_shuffling(loader):
    loader.shuffle = False


@pytest.mark.parametrize(
    'change', [another_seed, rewind, fewer_images, other_images, another_augmentation, no_shuffling]
)
def test_draws_that_were_sent_ahead_are_dropped_when_they_do_not_fit(change, loaders):
    used, fresh = loaders()[0], loaders()[0]
    list(used)
    fresh.epoch = 1
    change(used)
    change(fresh)
    assert used.draws_key is not None and fresh.draws_key is None
    assert_same_batches(used, fresh)


def test_an_epoch_that_was_left_early_is_over(loaders):
    left, fresh = loaders()[0], loaders()[0]
    next(iter(left))
    fresh.epoch = 1
    assert_same_batches(left, fresh)


def test_test_sets_are_served_whole_and_in_order(loaders):
    _, loader = loaders()
    loader.batch_size = 25
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [25, 25, 10] and len(loader) == 3
    assert torch.equal(torch.cat([labels for _, labels in batches]), loader.labels)
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert torch.equal(inputs, loader.normalize(loader.images))


def test_a_subset_can_be_selected(loaders):
    loader, _ = loaders()
    mask = loader.labels < 5
    loader.images, loader.labels = loader.images[mask], loader.labels[mask]
    assert len(loader) == mask.sum() // 32
    assert all((labels < 5).all() for _, labels in loader)


@pytest.mark.parametrize(
    ('wrong', 'complaint'),
    [
        ({'aug': {'mirror': True}}, 'may have flip, translate and cutout'),
        ({'aug': {'translate': 32}}, 'from 0 to 31'),
        ({'aug': {'cutout': -1}}, 'from 0 to 31'),
        ({'batch_size': 0}, 'batch_size=0: must be at least 1'),
    ],
)
def test_wrong_augmentation_and_batch_sizes_are_errors(wrong, complaint, loaders):
    with pytest.raises(UserError, match=complaint):
        loaders(**wrong)


def test_a_batch_that_is_not_filled_is_an_error(loaders):
    loader, _ = loaders(batch_size=201)
    with pytest.raises(UserError, match='200 images do not fill a batch of 201'):
        list(loader)


@pytest.mark.parametrize(
    ('name', 'value', 'complaint'),
    [
        ('labels', torch.zeros(199, dtype=torch.int64), '200 images and 199 labels'),
        ('labels', torch.zeros(200, dtype=torch.int32), r'labels is int32 \(200,\); needed is '),
        ('labels', torch.zeros(200, 10, dtype=torch.int64), r'labels is int64 \(200, 10\)'),
        ('labels', [0] * 200, 'labels is list'),
        ('images', torch.zeros(200, 32, 32, 3), r'images is float32 \(200, 32, 32, 3\)'),
        ('images', torch.zeros(200, 3, 32, 32, dtype=torch.uint8), r'uint8 \(200, 3, 32, 32\)'),
        ('images', np.zeros((200, 32, 32, 3), np.uint8), 'images is ndarray'),
    ],
)
def test_images_and_labels_that_do_not_fit_are_noticed_when_an_epoch_starts(
    name, value, complaint, loaders
):
    loader, _ = loaders()
    setattr(loader, name, value)
    with pytest.raises(UserError, match=complaint):
        next(iter(loader))


def test_other_sets_are_normalized_by_the_statistics_of_their_training_images(tmp_path):
    train = made_up_split(40, classes=['a', 'b', 'c'])
    save_set(tmp_path, train, made_up_split(20, seed=1, classes=['a', 'b', 'c']))
    pixels = train['images'].double().flatten(0, 2) / 255
    for is_train in (True, False):
        loader = CifarLoader(tmp_path, is_train, device='cpu', dtype=torch.float64)
        assert loader.mean == pytest.approx(pixels.mean(0).tolist(), rel=1e-5)
        assert loader.std == pytest.approx(pixels.std(0, correction=0).tolist(), rel=1e-5)
        assert loader.classes == ['a', 'b', 'c']


def test_sets_with_the_classes_of_cifar10_are_normalized_by_its_statistics(loaders):
    for loader in loaders():
        assert (loader.mean, loader.std) == (list(CIFAR_MEAN), list(CIFAR_STD))


def test_images_and_labels_that_are_scattered_in_memory_are_laid_out(tmp_path):
    split = made_up_split(20)
    images = split['images'].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    labels = torch.stack([split['labels'], split['labels']], dim=1)[:, 0]
    assert not images.is_contiguous() and not labels.is_contiguous()
    scattered = split | {'images': images, 'labels': labels}
    save_set(tmp_path, scattered, scattered)
    loader = CifarLoader(tmp_path, device='cpu', dtype=torch.float32)
    assert loader.images.is_contiguous() and torch.equal(loader.images, split['images'])
    assert loader.labels.is_contiguous() and torch.equal(loader.labels, split['labels'])


def test_a_constant_channel_stays_finite(tmp_path):
    split = made_up_split(20, classes=['a', 'b'])
    split['images'][..., 1] = 7
    save_set(tmp_path, split, split)
    loader = CifarLoader(tmp_path, device='cpu', dtype=torch.float32)
    assert loader.normalize(loader.images).isfinite().all()
