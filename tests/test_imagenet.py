"""ImageNet: flips, crops, schedules, damaged pictures, and training on ranks and in parts."""

import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import smoke
import torch
import torchvision
from conftest import SERVER, on_ranks
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import functional as v1

import swap94
from lab.errors import UserError
from studies import imagenet, imagenet_flip, imagenet_swap, pictures
from studies.pictures import TrainingImages

ALONE = swap94.Ranks()
PIXELS = 16
TRAIN, VAL = 24, 10  # pictures


def draw_picture(file, label, seed, size=(PIXELS, PIXELS)):
    """Write a JPEG in the colour of its class, which is darker on the left."""
    noise = np.random.default_rng((label, seed)).integers(0, 40, (*size, 3))
    noise[..., label % 3] += 60
    noise[:, size[1] // 2 :] += 100
    Image.fromarray(noise.astype(np.uint8)).save(file, quality=95)


def draw_pictures(folder, train, val, classes=2, size=(PIXELS, PIXELS)):
    """Draw so many pictures into FOLDER/train/CLASS and FOLDER/val/CLASS. Returns the folder."""
    for part, n in (('train', train), ('val', val)):
        for i in range(n):
            label = i % classes
            of_class = folder / part / f'class{label}'
            of_class.mkdir(parents=True, exist_ok=True)
            draw_picture(of_class / f'{i:04}.JPEG', label, i, size)
    return folder


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    """As many classes as training pictures, so that a label says which picture it is."""
    return draw_pictures(tmp_path_factory.mktemp('pictures'), TRAIN, TRAIN, classes=TRAIN)


@pytest.fixture(scope='module')
def two_classes(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp('classes'), TRAIN, VAL)


def segment(first, last, rates=(0.02, 0.01), least_area=None, shards=2, batch=4, pixels=PIXELS):
    return pictures.segment([first, last], pixels, least_area, shards, batch, list(rates))


SCHEDULE = [segment(0, 1), segment(1, 3, (0.01, 0.001), least_area=0.3)]
SETTINGS = {
    'net': 'resnet18',
    'momentum': 0.9,
    'weight_decay': 1e-4,
    'label_smoothing': 0.1,
    'blurs': True,
}


def make_place(data, folder, workers=0, dtype=torch.float32):
    train, val = pictures.open_data(Path(data))
    return imagenet.Place(SETTINGS, folder, train, val, torch.device('cpu'), dtype, workers)


@pytest.fixture
def place(two_classes, tmp_path):
    return make_place(two_classes, tmp_path)


#### Ranks ####


def train_rank(data, classes, folder):
    """What each rank saw and trained goes into a file of its own."""
    swap94.join_ranks(torch.device('cpu'))
    everyone = swap94.all_ranks()
    seen = mirrored(make_place(data, folder), 'alternating', range(3), everyone)
    record, net = train_network(make_place(classes, folder), everyone, folder / 'network.pt')
    accuracies = imagenet.evaluate(net, (PIXELS, 1.0), make_place(classes, folder), everyone)
    result = {'seen': seen, 'record': record, 'net': net.state_dict(), 'accuracies': accuracies}
    torch.save(result, folder / f'{everyone.rank}.pt')


@pytest.fixture(scope='module')
def of_two_ranks(labelled, two_classes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    on_ranks(2, train_rank, labelled, two_classes, folder)
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


#### Flips and order ####


def mirrored(place, flip, epochs, ranks=ALONE):
    """{(picture, epoch): whether the loader mirrored it}, as one sees from its darker side."""
    images = TrainingImages(place.train, [segment(0, 3)], 7, flip)
    found = {}
    stream = place.batches(images, images.keys(epochs, ranks))
    for epoch in epochs:
        for _ in range(images.steps(epoch) * 2 // ranks.size):
            inputs, labels = next(stream)
            left, right = inputs.chunk(2, dim=-1)
            is_darker = left.mean((1, 2, 3)) < right.mean((1, 2, 3))
            found |= {(i, epoch): not dark for i, dark in zip(labels.tolist(), is_darker.tolist())}
    return found


def test_alternating_flip_turns_over_every_epoch(labelled, tmp_path):
    seen = mirrored(make_place(labelled, tmp_path), 'alternating', range(3))
    assert len(seen) == 3 * TRAIN
    for i in range(TRAIN):
        assert seen[i, 0] != seen[i, 1] != seen[i, 2]
    assert 0 < sum(seen[i, 0] for i in range(TRAIN)) < TRAIN


def test_other_flips_are_none_and_random(labelled, tmp_path):
    place = make_place(labelled, tmp_path)
    assert not any(mirrored(place, 'none', range(1)).values())
    seen = mirrored(place, 'random', range(3))
    changes = sum(seen[i, 0] != seen[i, 1] for i in range(TRAIN))
    assert 0 < changes < TRAIN and seen == mirrored(place, 'random', range(3))


def test_workers_ranks_and_resuming_change_no_flip(labelled, tmp_path, of_two_ranks):
    place = make_place(labelled, tmp_path)
    seen = mirrored(place, 'alternating', range(3))
    assert mirrored(dataclasses.replace(place, workers=2), 'alternating', range(3)) == seen
    resumed = mirrored(place, 'alternating', range(1, 3))
    assert resumed == {key: value for key, value in seen.items() if key[1] >= 1}
    first, second = [result['seen'] for result in of_two_ranks]
    assert first | second == seen and not first.keys() & second.keys()


def test_each_epoch_has_an_order_of_its_own_and_leaves_out_what_fills_no_step(place):
    images = TrainingImages(place.train, [segment(0, 2, shards=1, batch=7)], 3, 'none')
    keys = list(images.keys(range(2), ALONE))
    orders = [[i for batch in keys for i, epoch in batch if epoch == e] for e in range(2)]
    assert len(keys) == 6 and [len(set(order)) for order in orders] == [21, 21]
    assert orders[0] != orders[1]


#### Crops ####


def picture_of(images, index):
    return images.pictures.loader(images.pictures.samples[index][0])


def test_heavy_crops_are_torchvisions(place):
    """Those of its older functions, for the same picture and random numbers."""
    images = TrainingImages(place.train, [segment(0, 3, least_area=0.3)], 5, 'none')
    transform = torchvision.transforms.RandomResizedCrop(PIXELS, scale=(0.3, 1))
    before = torch.get_rng_state()
    views = {(i, epoch): images[i, epoch][0] for i in range(4) for epoch in range(3)}
    assert torch.equal(torch.get_rng_state(), before)
    for (i, epoch), view in views.items():
        stream = np.random.SeedSequence((5, i, 1 + epoch))
        torch.manual_seed(int(stream.generate_state(1, np.uint64)[0]))
        assert view.dtype == torch.uint8
        assert torch.equal(view, v1.pil_to_tensor(transform(picture_of(images, i))))
    assert not torch.equal(views[0, 0], views[0, 1])


def test_light_crops_move_along_the_longer_side(tmp_path):
    place = make_place(draw_pictures(tmp_path / 'data', 4, 1, 1, (20, 40)), tmp_path)
    images = TrainingImages(place.train, [segment(0, 3)], 5, 'none')
    places = set()
    for i, epoch in itertools.product(range(4), range(3)):
        resized = v1.pil_to_tensor(v1.resize(picture_of(images, i), PIXELS))
        crops = [resized[:, :, left : left + PIXELS] for left in range(PIXELS + 1)]
        (left,) = [
            left for left, crop in enumerate(crops) if torch.equal(crop, images[i, epoch][0])
        ]
        places.add(left)
    assert len(places) > 4


def test_test_crops_are_torchvisions(tmp_path):
    place = make_place(draw_pictures(tmp_path / 'data', 1, 1, 1, (30, 50)), tmp_path)
    picture = place.val.loader(place.val.samples[0][0])
    for share, resized in ((0.875, 16), (1.0, 14)):
        view, label = pictures.TestImages(place.val, 14, share)[0]
        expected = v1.center_crop(v1.resize(picture, resized), 14)
        assert torch.equal(view, v1.pil_to_tensor(expected)) and label == 0


def test_inputs_are_normalized(place):
    images = pictures.TestImages(place.val, PIXELS, 1.0)
    inputs, labels = next(place.batches(images, [[0, VAL - 1]]))
    pixels = images[0][0] / 255
    expected = v1.normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert_close(inputs[0], expected)
    assert labels.tolist() == [0, 1]


#### Schedules ####


def schedules():
    for scale, settings in smoke.study_of('imagenet_flip').scales['resnet18'].items():
        for crop, epochs, _ in settings['cells']:
            yield f'flip {scale} {crop} {epochs}', imagenet_flip.schedule_of(crop, epochs, settings)
    for scale, settings in smoke.study_of('imagenet_swap').scales['resnet18'].items():
        for method, phases in imagenet_swap.schedules_of(settings).items():
            yield f'swap {scale} {method}', [part for phase in phases for part in phase]


@pytest.mark.parametrize('schedule', [pytest.param(s, id=name) for name, s in schedules()])
def test_segments_follow_each_other(schedule):
    assert schedule[0]['epochs'][0] == 0
    for part, following in itertools.pairwise(schedule):
        assert part['epochs'][1] == following['epochs'][0]
    for part in schedule:
        first, last = part['epochs']
        assert pictures.rate_at(part, first) == pytest.approx(part['rates'][0])
        assert pictures.rate_at(part, last) == pytest.approx(part['rates'][1])
        middle = sum(part['rates']) / 2
        assert pictures.rate_at(part, (first + last) / 2) == pytest.approx(middle)
        assert pictures.segment_of(schedule, first) is part


#### Network and optimizer ####


def test_blur_pools_stand_before_strided_convolutions(place):
    net = imagenet.make_net(place, 0)
    blurs = [module for module in net.modules() if isinstance(module, imagenet.BlurPool)]
    assert len(blurs) == 6 and net.conv1.stride == (2, 2)
    inputs = torch.randn(2, 64, 9, 9)
    blurred = torch.zeros_like(inputs)
    padded = torch.nn.functional.pad(inputs, (1, 1, 1, 1))
    for i, high in enumerate((1, 2, 1)):
        for j, wide in enumerate((1, 2, 1)):
            blurred += high * wide / 16 * padded[:, :, i : i + 9, j : j + 9]
    assert_close(blurs[0](inputs), blurs[0].conv(blurred))


def test_a_network_depends_on_its_seed_alone(place):
    one, again, other = [imagenet.make_net(place, seed) for seed in (1, 1, 2)]
    assert torch.equal(one.fc.weight, again.fc.weight)
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert one.layer1[0].bn2.weight.count_nonzero() == 0  # each block begins as an identity


def test_only_batch_norm_has_no_weight_decay(place):
    net = imagenet.make_net(place, 0)
    decayed, free = imagenet.make_optimizer(net, 0.9, 1e-4).param_groups
    assert (decayed['weight_decay'], free['weight_decay']) == (1e-4, 0)
    assert len(decayed['params']) == 20 + 2 and len(free['params']) == 2 * 20
    assert {p.ndim for p in free['params']} == {1}


#### Training ####


def train_network(place, ranks, checkpoint):
    images = TrainingImages(place.train, SCHEDULE, 5, 'alternating')
    net = imagenet.make_net(place, 5)
    return imagenet.fit(net, images, place, ranks, checkpoint), net


@pytest.fixture(scope='module')
def undisturbed(two_classes, tmp_path_factory):
    """(record, network), trained in one process."""
    folder = tmp_path_factory.mktemp('undisturbed')
    return train_network(make_place(two_classes, folder), ALONE, folder / 'network.pt')


def test_the_loss_falls(undisturbed):
    losses = undisturbed[0]['losses']
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_two_ranks_train_the_network_of_one(undisturbed, of_two_ranks):
    """BatchNorm normalizes each shard by itself, so only its running statistics may differ."""
    record, net = undisturbed
    first, second = of_two_ranks
    for name, tensor in first['net'].items():
        assert torch.equal(tensor, second['net'][name])
    assert first['record']['losses'] == second['record']['losses']
    assert first['record']['losses'] == pytest.approx(record['losses'], rel=1e-4)
    for name, p in net.named_parameters():
        assert_close(first['net'][name], p.detach(), rtol=1e-3, atol=1e-4)


def test_accuracies_are_those_of_all_ranks(of_two_ranks, place):
    first, second = of_two_ranks
    net = imagenet.make_net(place, 0)
    net.load_state_dict(first['net'])
    assert first['accuracies'] == second['accuracies']
    assert imagenet.evaluate(net, (PIXELS, 1.0), place, ALONE) == first['accuracies']
    images = pictures.TestImages(place.val, PIXELS, 1.0)
    ((inputs, labels),) = place.batches(images, [range(VAL)])
    with torch.no_grad():
        outputs = net(inputs)
        both = outputs + net(inputs.flip(3))
    right = [(values.argmax(1) == labels).double().mean().item() for values in (outputs, both)]
    assert [first['accuracies'][key] for key in ('top1', 'tta_top1')] == pytest.approx(right)
    assert first['accuracies']['top5'] == 1.0  # there are two classes


def train_alone(classes, folder):
    train_network(make_place(classes, folder), ALONE, folder / 'network.pt')


def test_a_killed_training_ends_as_an_undisturbed_one(undisturbed, two_classes, tmp_path, capsys):
    process = SERVER.Process(target=train_alone, args=(two_classes, tmp_path))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / 'network.pt').exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    place = make_place(two_classes, tmp_path)
    record, net = train_network(place, ALONE, tmp_path / 'network.pt')
    assert capsys.readouterr().out.count('epoch ') < 3  # it went on
    assert record['losses'] == undisturbed[0]['losses']
    for ours, theirs in zip(net.state_dict().values(), undisturbed[1].state_dict().values()):
        assert torch.equal(ours, theirs)


def test_bfloat16_trains_weights_in_float32(two_classes, tmp_path):
    place = make_place(two_classes, tmp_path, dtype=torch.bfloat16)
    assert place.memory_format == torch.channels_last
    images = TrainingImages(place.train, [segment(0, 1)], 5, 'none')
    net = imagenet.make_net(place, 5)
    record = imagenet.fit(net, images, place, ALONE, tmp_path / 'network.pt')
    assert 0 < record['losses'][0] < 2
    assert net.fc.weight.dtype == torch.float32


def test_a_network_that_diverges_is_one_line(place):
    images = TrainingImages(place.train, [segment(0, 1, rates=(1e20, 1e20))], 5, 'none')
    checkpoint = place.checkpoint({'crop': 'light'}, 5)
    with pytest.raises(UserError, match=r'^crop=light-seed=5-network diverges in epoch 1$'):
        imagenet.fit(imagenet.make_net(place, 5), images, place, ALONE, checkpoint)


def test_what_was_half_written_is_removed_with_the_checkpoints(place):
    cell = {'crop': 'light'}
    file, other = place.checkpoint(cell, 1), place.checkpoint(cell, 10)
    for path in (file, file.with_suffix('.123.tmp'), other):
        path.touch()
    place.remove_checkpoints(cell, 1)
    assert list(file.parent.iterdir()) == [other]


#### Mistakes and damage ####


def test_other_names_are_other_data(tmp_path):
    data = draw_pictures(tmp_path / 'data', 4, 4, classes=2)
    about = make_place(data, tmp_path).describe_data()
    assert about == make_place(data, tmp_path).describe_data()
    (data / 'train' / 'class0').rename(data / 'train' / 'class9')
    (data / 'val' / 'class0').rename(data / 'val' / 'class9')
    changed = make_place(data, tmp_path).describe_data()
    assert {key for key in about if about[key] != changed[key]} == {'sha256_of_names'}


def test_a_picture_that_claims_to_be_huge_is_damaged(tmp_path):
    data = draw_pictures(tmp_path / 'data', 4, 4, classes=1)
    place = make_place(data, tmp_path)
    path, _ = place.train.samples[0]
    content = bytearray(Path(path).read_bytes())
    size = content.index(b'\xff\xc0') + 5  # height and width in the JPEG's frame header
    content[size : size + 4] = b'\xf0\x00\xf0\x00'
    Path(path).write_bytes(content)
    assert place.train.view(0, None) == path


def test_damaged_pictures_are_named_and_counted(tmp_path, capsys):
    data = draw_pictures(tmp_path / 'data', 1, 1001, classes=1, size=(4, 4))
    first, *others = sorted((data / 'val' / 'class0').iterdir())
    first.write_bytes(first.read_bytes()[:-100])
    place = make_place(data, tmp_path)
    images = pictures.TestImages(place.val, 4, 1.0)
    keys = np.array_split(np.arange(1001), 7)
    assert sum(len(labels) for _, labels in place.batches(images, keys)) == 1000
    assert capsys.readouterr().out == f'{first}: is damaged, so we leave it out\n'
    others[5].write_text('no picture')
    with pytest.raises(UserError, match=r'2 of 1001 pictures are damaged: .*more than one in'):
        list(place.batches(images, keys[:1]))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_batch_without_a_whole_picture_is_one_line(workers, tmp_path):
    data = draw_pictures(tmp_path / 'data', 8, 1001, classes=1, size=(4, 4))
    for file in [*data.glob('train/*/*'), next(data.glob('val/*/*'))]:
        file.write_text('no picture')
    place = make_place(data, tmp_path, workers)
    images = TrainingImages(place.train, [segment(0, 1)], 5, 'none')
    with pytest.raises(UserError, match=r'of 8 pictures are damaged: .*more than one in'):
        imagenet.fit(imagenet.make_net(place, 5), images, place, ALONE, tmp_path / 'network.pt')
    images = pictures.TestImages(place.val, 4, 1.0)
    keys = [[i] for i in range(len(place.val))]
    with pytest.raises(UserError, match=r'all pictures of a batch are damaged: .*; repair'):
        list(place.batches(images, keys))


def test_folders_that_lack_something_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r'needs pictures in train/CLASS: .*No such file'):
        pictures.open_data(tmp_path)
    data = draw_pictures(tmp_path, 4, 4)
    (data / 'val' / 'class2').mkdir()
    with pytest.raises(UserError, match='needs pictures in val/CLASS: Found no valid file'):
        pictures.open_data(data)
    draw_picture(data / 'val' / 'class2' / '0.JPEG', 2, 0)
    with pytest.raises(UserError, match='only one of train and val has class2'):
        pictures.open_data(data)


def test_shards_and_steps_that_cannot_be_are_one_line(place):
    images = TrainingImages(place.train, [segment(0, 1, shards=3, batch=TRAIN)], 0, 'none')
    net = imagenet.make_net(place, 0)
    for size in (2, 4, 6):  # also where a rank would have none
        with pytest.raises(UserError, match=rf"{size} ranks cannot share a step's shards \(3\)"):
            imagenet.fit(net, images, place, swap94.Ranks(0, size), None)
    with pytest.raises(UserError, match=f'has {TRAIN} pictures, and a step needs {3 * TRAIN}'):
        imagenet.fit(net, images, place, ALONE, None)


@pytest.mark.parametrize('has_bfloat16, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_mixed_precision_is_what_the_device_computes(has_bfloat16, dtype, monkeypatch):
    def supported():
        return has_bfloat16

    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', supported)
    assert imagenet.pick_autocast(None, torch.device('cpu')) == dtype
    with pytest.raises(UserError, match='float16 needs a GPU'):
        imagenet.pick_autocast('float16', torch.device('cpu'))
