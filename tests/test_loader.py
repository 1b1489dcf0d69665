"""Augmentation against a slow reference, and what the loader draws and serves."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TRAIN_SET, make_loaders, random_set

from airbench94 import CIFAR_MEAN, CIFAR_STD, CifarLoader, augment

MEAN = torch.tensor([125.5, 60.25, 33.0])  # in units of a pixel
SCALE = 1 / torch.tensor([64.0, 50.0, 77.0])
NORMALIZE = {'mean': MEAN, 'scale': SCALE}
WITH_CUTOUT = {'flip': True, 'translate': 4, 'cutout': 12}


def make_loader(seed=0, **options):
    """A loader of the training set."""
    loader, _ = make_loaders(**options)
    loader.seed = seed
    return loader


def slow_reflect(position, size):
    while not 0 <= position < size:
        position = -position if position < 0 else 2 * (size - 1) - position
    return position


def slow_augment(images, index, flip, shift, corner=None, size=0):
    """`augment`, pixel by pixel, as its docstring says; fp32."""
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
    """The flip and shift that leave n images as they are."""
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


def test_augment_without_draws_only_normalizes_and_is_channels_last():
    loader = make_loader()
    index = torch.tensor([5, 0, 199])
    normalize = {'mean': loader.mean, 'scale': loader.scale}
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


def test_a_loader_in_float64_normalizes_in_float64():
    loader = make_loader(dtype=torch.float64)
    mean, std = torch.tensor([CIFAR_MEAN, CIFAR_STD], dtype=torch.float64)
    plain = (loader.images.double() / 255 - mean) / std
    got = loader.normalize(loader.images)
    torch.testing.assert_close(got, plain.permute(0, 3, 1, 2), rtol=1e-13, atol=1e-13)


def test_a_loader_normalizes_with_the_statistics_that_it_is_given():
    options = {'device': 'cpu', 'dtype': torch.float32, 'mean': (0.0, 0.5, 1.0)}
    loader = CifarLoader(*TRAIN_SET, **options, std=(1.0, 0.5, 0.25))
    red, green, blue = loader.normalize(torch.full((1, 32, 32, 3), 51, dtype=torch.uint8))[0]
    for channel, value in ((red, 0.2), (green, -0.6), (blue, -3.2)):
        torch.testing.assert_close(channel, torch.full((32, 32), value))


def test_draws_depend_only_on_seed_and_epoch():
    one, two = make_loader(seed=3), make_loader(seed=3)
    list(one)  # serving an epoch changes no draw
    for epoch in (0, 1, 5):
        a, b = one.draw(epoch), two.draw(epoch)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    first, second, other = one.draw(0), one.draw(1), make_loader(seed=4).draw(0)
    for name in ('order', 'flip', 'shift'):
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])


def test_draws_have_the_promised_form():
    draws = make_loader(aug=WITH_CUTOUT).draw(0)
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


def test_a_corner_is_drawn_only_with_cutout():
    assert make_loader().draw(0).keys() == {'order', 'flip', 'shift'}


def test_alternating_flip():
    flips = [make_loader().draw(epoch)['flip'] for epoch in range(4)]
    for now, then in pairwise(flips):
        assert torch.equal(now, ~then)


def test_order_and_augmentation_are_drawn_apart():
    shuffled, ordered = make_loader(aug=WITH_CUTOUT), make_loader(aug=WITH_CUTOUT)
    ordered.train = False
    shuffled, ordered = shuffled.draw(1), ordered.draw(1)
    assert ordered['order'].tolist() == list(range(200)) != shuffled['order'].tolist()
    for name in ('flip', 'shift', 'corner'):
        assert torch.equal(shuffled[name], ordered[name])


def test_without_augmentation_nothing_is_flipped_or_shifted():
    draws = make_loader(aug=None).draw(1)
    assert not draws['flip'].any() and not draws['shift'].any()


def test_an_epoch_serves_what_was_drawn():
    loader = make_loader(seed=5, aug=WITH_CUTOUT)
    options = {'mean': loader.mean, 'scale': loader.scale, 'dtype': torch.float32}
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


def test_draws_can_be_edited_before_they_are_served():
    loader, untouched = make_loader(), make_loader()
    draws = loader.next_draws()
    draws['order'] = draws['order'][:70]
    few = list(loader.batches(draws))
    assert len(few) == 2  # of 32; the rest would not fill a batch
    assert_same_batches(few, list(untouched)[:2])
    assert loader.epoch == 1
    assert_same_batches(loader, untouched)


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
    loader.train = False


@pytest.mark.parametrize(
    'change', [another_seed, rewind, fewer_images, other_images, another_augmentation, no_shuffling]
)
def test_a_used_loader_can_be_changed(change):
    used, fresh = make_loader(), make_loader()
    list(used)
    fresh.epoch = 1
    change(used)
    change(fresh)
    assert_same_batches(used, fresh)


def test_an_epoch_that_was_left_early_is_over():
    left, fresh = make_loader(), make_loader()
    next(iter(left))
    fresh.epoch = 1
    assert_same_batches(left, fresh)


def test_test_sets_are_served_whole_and_in_order():
    _, loader = make_loaders()
    loader.batch_size = 25
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [25, 25, 10] and len(loader) == 3
    assert torch.equal(torch.cat([labels for _, labels in batches]), loader.labels)
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert torch.equal(inputs, loader.normalize(loader.images))


def test_a_subset_can_be_selected():
    loader = make_loader()
    mask = loader.labels < 5
    loader.images, loader.labels = loader.images[mask], loader.labels[mask]
    assert len(loader) == mask.sum() // 32
    assert all((labels < 5).all() for _, labels in loader)


def test_images_that_do_not_fill_a_batch_are_an_error():
    loader = make_loader(batch_size=201)
    with pytest.raises(ValueError, match='200 images are less than a batch of 201'):
        len(loader)


def test_images_lie_in_memory_pixel_by_pixel():
    """Otherwise each batch would copy the whole set, as with the transposed one of torchvision."""
    images, labels = random_set(8)
    transposed = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not transposed.is_contiguous()
    loader = CifarLoader(transposed, labels, device='cpu', dtype=torch.float32)
    assert loader.images.is_contiguous() and torch.equal(loader.images, images)
