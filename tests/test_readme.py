"""What the README says, and the examples, run as they stand on a small set."""

import ast
import re
import shutil
from functools import partial

import pytest
import torch
from conftest import NARROW, ROOT
from PIL import Image

import airbench94
from examples import many_networks, predict, subset

TEXTS = sorted(path for path in ROOT.glob('**/*.md') if '.venv' not in path.parts)
README = (ROOT / 'README.md').read_text()


@pytest.fixture
def small():
    return airbench94.override(airbench94.hyp, [*NARROW, 'opt.train_epochs=1'])


def test_the_python_example_runs(small, tmp_path, folder, monkeypatch, capsys):
    (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    shutil.copytree(folder, tmp_path / 'cifar10')
    monkeypatch.chdir(tmp_path)
    for key in ('opt', 'net'):
        monkeypatch.setitem(airbench94.hyp, key, small[key])
    monkeypatch.setattr(airbench94, 'pick_device', lambda: torch.device('cpu'))
    exec(code, {})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_the_subset_is_trained_on(small, folder):
    accuracies = subset.train_on_the_hardest(folder, small, torch.device('cpu'), torch.float32)
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)


def test_many_networks_are_kept_apart(small, folder, monkeypatch, capsys):
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    torch._dynamo.reset()
    networks = many_networks.train_many(2, folder, small, torch.device('cpu'), torch.float32)
    (first, _), (second, _) = networks
    name = '3.layers.0.conv.weight'
    assert not torch.equal(first[name], second[name])
    assert 'seed 1: ' in capsys.readouterr().out


def test_an_image_gets_the_class_that_its_network_gives_it(small, loaders, tmp_path, capsys):
    train_loader, test_loader = loaders()
    net, _ = airbench94.train(train_loader, test_loader, small)
    airbench94.save_network(tmp_path / 'net.pt', net, small, train_loader)
    pixels = test_loader.images[7].numpy()
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    assert predict.main([str(tmp_path / 'net.pt'), str(tmp_path / 'image.png')]) == 0
    logits = airbench94.infer(net, test_loader, small['net']['tta_level'])[7]
    expected = train_loader.classes[logits.argmax()]
    assert capsys.readouterr().out.splitlines()[0].split()[1] == expected
    wide = predict.load_image(tmp_path / 'image.png')
    assert torch.equal(wide[0], test_loader.images[7])


def test_an_image_of_any_size_serves(tmp_path):
    Image.new('L', (200, 90)).save(tmp_path / 'wide.png')
    assert predict.load_image(tmp_path / 'wide.png').shape == (1, 32, 32, 3)


def test_the_set_up_is_what_ci_and_the_script_need():
    for line in ('python airbench94.py', 'python -m pytest'):
        assert f'pip install -r requirements.txt && {line}\n' in README
    ci = (ROOT / '.ci' / 'run').read_text()
    assert 'pip install --quiet --requirement requirements.txt\n' in ci
    assert ci.endswith('python -m pytest\n')
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    required = [line.split('#')[0].strip() for line in lines]
    assert all('#' in line for line in lines)
    sources = [path.read_text() for path in ROOT.glob('*.py')]
    (inline,) = {re.search(r'^# dependencies = (.*)$', text, re.MULTILINE)[1] for text in sources}
    assert set(ast.literal_eval(inline)) <= set(required)


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_and_lines_are_readable(path):
    text = path.read_text()
    links = re.findall(r'\]\(([^)]+)\)', text) + re.findall(
        r'^\[[^]]+\]: (\S+)$', text, re.MULTILINE
    )
    files = [link.split('#')[0] for link in links if '://' not in link]
    missing = [file for file in files if file and not (path.parent / file).exists()]
    assert missing == []
    assert max(map(len, text.splitlines())) <= 120


def test_every_option_in_the_readme_is_there():
    known = airbench94.parse_args(['--out', 'x'])
    for line in re.findall(r'^python airbench9\d\.py (.*)$', README, re.MULTILINE):
        words = line.split('#')[0].replace('\\', '').split()
        args = airbench94.parse_args(words)
        airbench94.override(airbench94.hyp, args.overrides)
        assert vars(args).keys() == vars(known).keys()
