"""Augmentation against a slow reference, and what the loader draws and serves."""

import numpy as np
import pytest
import torch

from airbench94 import CIFAR_MEAN, CIFAR_STD, CifarLoader, UserError, augment
from conftest import made_up_split

DRAWS = ('order', 'flip', 'shift', 'corner')
MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.2, 0.3)


def slow_reflect(position, size):
    while not 0 <= position < size:
        position = -position if position < 0 else 2 * (size - 1) - position
    return position


def slow_augment(images, index, flip, shift, mean, std, corner=None, size=0):
    """augment, pixel by pixel, as its specification reads; fp32."""
    height, width = images.shape[1:3]
    out = np.empty((len(index), 3, height, width), np.float32)
    for b, n in enumerate(index.tolist()):
        dy, dx = shift[b].tolist()
        top, left = corner[b].tolist() if size else (0, 0)
        for y in range(height):
            for x in range(width):
                mirrored = width - 1 - x if flip[b] else x
                for c in range(3):
                    value = images[n, slow_reflect(y + dy, height), slow_reflect(mirrored + dx, width), c].item()
                    offset, scale = np.float32(255) * np.float32(mean[c]), np.float32(255) * np.float32(std[c])
                    blank = top <= y < top + size and left <= x < left + size
                    out[b, c, y, x] = 0 if blank else (np.float32(value) - offset) * (np.float32(1) / scale)
    return torch.from_numpy(out)


def random_images(n, height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, 3), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize('height, width', [(4, 4), (3, 5)])
def test_augment_equals_the_slow_reference_for_every_shift_and_flip(height, width):
    images = random_images(7, height, width)
    cases = [(flip, dy, dx) for flip in (False, True)
             for dy in range(1 - height, height) for dx in range(1 - width, width)]
    flip = torch.tensor([case[0] for case in cases])
    shift = torch.tensor([case[1:] for case in cases])
    index = torch.arange(len(cases)) % len(images)
    got = augment(images, index, flip, shift, mean=MEAN, std=STD, dtype=torch.float32)
    assert torch.equal(got, slow_augment(images, index, flip, shift, MEAN, STD))


@pytest.mark.parametrize('size', [1, 2, 4])
def test_cutout_equals_the_slow_reference_at_every_corner(size):
    images = random_images(3, 4, 5)
    corner = torch.tensor([(y, x) for y in range(4 - size + 1) for x in range(5 - size + 1)])
    g = torch.Generator().manual_seed(0)
    index, flip = torch.arange(len(corner)) % 3, torch.rand(len(corner), generator=g) < 0.5
    shift = torch.randint(-3, 4, (len(corner), 2), generator=g)
    got = augment(images, index, flip, shift, corner, size, mean=MEAN, std=STD, dtype=torch.float32)
    assert torch.equal(got, slow_augment(images, index, flip, shift, MEAN, STD, corner, size))
    assert ((got == 0).all(1).sum((1, 2)) >= size * size).all() and got.is_contiguous(memory_format=torch.channels_last)


def test_augment_without_draws_only_normalizes_and_is_channels_last(loaders):
    loader, _ = loaders()
    index = torch.tensor([5, 0, 199])
    still = augment(loader.images, index, torch.zeros(3, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.int64),
                    mean=loader.mean, std=loader.std, dtype=torch.float32)
    assert torch.equal(still, loader.normalize(loader.images[index]))
    assert still.shape == (3, 3, 32, 32) and still.is_contiguous(memory_format=torch.channels_last)
    plain = (loader.images[index].double() / 255 - torch.tensor(CIFAR_MEAN)) / torch.tensor(CIFAR_STD)
    torch.testing.assert_close(still.double(), plain.permute(0, 3, 1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_fp32_rounded_once(dtype):
    images, index = random_images(4, 8, 8), torch.arange(4)
    draws = torch.tensor([True, False, True, False]), torch.tensor([[1, -2], [0, 0], [-7, 7], [2, 2]])
    half, single = (augment(images, index, *draws, mean=MEAN, std=STD, dtype=d) for d in (dtype, torch.float32))
    assert half.dtype == dtype and torch.equal(half, single.to(dtype))


def test_float64_normalizes_in_float64():
    images = random_images(2, 4, 4)
    got = augment(images, torch.arange(2), torch.zeros(2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int64),
                  mean=MEAN, std=STD, dtype=torch.float64)
    plain = (images.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD, dtype=torch.float64)
    torch.testing.assert_close(got, plain.permute(0, 3, 1, 2), rtol=1e-14, atol=1e-14)


def test_draws_are_a_function_of_seed_and_epoch_alone(loaders):
    one, two = loaders(seed=3)[0], loaders(seed=3)[0]
    list(one)       # serving an epoch changes no draw
    for epoch in (0, 1, 5):
        a, b = one.draw(epoch), two.draw(epoch)
        assert all(torch.equal(a[key], b[key]) for key in DRAWS)
    assert not torch.equal(one.draw(0)['order'], one.draw(1)['order'])
    assert not torch.equal(one.draw(0)['shift'], one.draw(1)['shift'])
    other = loaders(seed=4)[0].draw(0)
    assert not any(torch.equal(other[key], one.draw(0)[key]) for key in DRAWS)


def test_draws_have_the_promised_form(loaders):
    draws = loaders()[0].draw(0)
    assert {key: (v.dtype, tuple(v.shape), v.device.type) for key, v in draws.items()} == {
        'order': (torch.int64, (200,), 'cpu'), 'flip': (torch.bool, (200,), 'cpu'),
        'shift': (torch.int64, (200, 2), 'cpu'), 'corner': (torch.int64, (200, 2), 'cpu')}
    assert sorted(draws['order'].tolist()) == list(range(200))
    assert set(draws['shift'].flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert 60 < draws['flip'].sum() < 140
    corners = loaders(aug={'cutout': 27})[0].draw(0)['corner']      # so that the square is inside the image
    assert set(corners.flatten().tolist()) == {0, 1, 2, 3, 4, 5}


def test_alternating_flip(loaders):
    flips = [loaders()[0].draw(epoch)['flip'] for epoch in range(4)]
    for now, then in zip(flips, flips[1:]):
        assert torch.equal(now, ~then)
    assert torch.equal(flips[2], flips[0])


def test_order_and_augmentation_are_drawn_apart(loaders):
    shuffled, ordered = loaders()[0].draw(1), loaders(shuffle=False)[0].draw(1)
    assert ordered['order'].tolist() == list(range(200)) != shuffled['order'].tolist()
    assert all(torch.equal(shuffled[key], ordered[key]) for key in ('flip', 'shift', 'corner'))


def test_no_augmentation_draws_none(loaders):
    draws = loaders(aug=None)[0].draw(1)
    assert not draws['flip'].any() and not draws['shift'].any()


def test_an_epoch_serves_what_was_drawn(loaders):
    loader, _ = loaders(seed=5, aug={'flip': True, 'translate': 4, 'cutout': 12})
    for epoch in range(2):
        draws = loader.draw(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 200 // 32
        for i, (inputs, labels) in enumerate(batches):
            index = draws['order'][32 * i:32 * (i + 1)]
            assert torch.equal(labels, loader.labels[index])
            of_batch = [draws[key][index] for key in ('flip', 'shift', 'corner')]
            assert torch.equal(inputs, augment(loader.images, index, *of_batch, size=12, mean=loader.mean,
                                               std=loader.std, dtype=torch.float32))
            assert ((inputs == 0).all(1).sum((1, 2)) == 144).all()


def test_test_sets_are_served_whole_and_in_order(loaders):
    _, loader = loaders()
    loader.batch_size = 25
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [25, 25, 10] and len(loader) == 3
    assert torch.equal(torch.cat([labels for _, labels in batches]), loader.labels)


def test_a_subset_can_be_selected(loaders):
    loader, _ = loaders()
    mask = loader.labels < 5
    loader.images, loader.labels = loader.images[mask], loader.labels[mask]
    assert len(loader.draw(0)['order']) == mask.sum()
    assert all((labels < 5).all() for _, labels in loader)


def test_wrong_augmentation_and_batch_sizes_are_errors(loaders):
    for wrong in ({'aug': {'mirror': True}}, {'aug': {'translate': 32}}, {'aug': {'cutout': -1}}, {'batch_size': 0}):
        with pytest.raises(UserError, match='flip, translate, cutout; 0 to 31'):
            loaders(**wrong)
    loader, _ = loaders(batch_size=201)
    with pytest.raises(UserError, match='larger than the set'):
        list(loader)


def test_other_sets_are_normalized_by_their_own_statistics(tmp_path):
    train = made_up_split(40, classes=['a', 'b', 'c'])
    torch.save(train, tmp_path / 'train.pt')
    torch.save(made_up_split(20, classes=['a', 'b', 'c']), tmp_path / 'test.pt')
    for is_train in (True, False):      # the test set too by those of the training images
        loader = CifarLoader(tmp_path, is_train, device='cpu', dtype=torch.float64)
        pixels = train['images'].double() / 255
        torch.testing.assert_close(loader.mean, pixels.mean((0, 1, 2)), rtol=1e-5, atol=0)
        torch.testing.assert_close(loader.std, pixels.flatten(0, 2).std(0, correction=0), rtol=1e-5, atol=0)
        assert loader.classes == ['a', 'b', 'c']


def test_images_that_are_not_contiguous_are_made_so_once(tmp_path):
    split = made_up_split(20)
    scattered = split | {'images': split['images'].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)}
    for name in ('train.pt', 'test.pt'):
        torch.save(scattered, tmp_path / name)
    loader = CifarLoader(tmp_path, device='cpu', dtype=torch.float32)
    assert loader.images.is_contiguous() and torch.equal(loader.images, split['images'])


def test_a_constant_channel_stays_finite(tmp_path):
    split = made_up_split(20, classes=['a', 'b'])
    split['images'][..., 1] = 7
    for name in ('train.pt', 'test.pt'):
        torch.save(split, tmp_path / name)
    loader = CifarLoader(tmp_path, device='cpu', dtype=torch.float32)
    assert loader.normalize(loader.images).isfinite().all()
