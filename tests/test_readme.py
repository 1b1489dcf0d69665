"""What the READMEs say, and the examples, run as they stand on a small set."""

import ast
import re
from functools import partial

import pytest
import torch
from conftest import NARROW, ROOT, TEST_SET, TRAIN_SET, make_loaders

import airbench94
from examples import many_networks, subset
from lab.__main__ import run_parser
from lab.options import override
from lab.recipes import load_recipe

TEXTS = sorted(path for path in ROOT.glob('**/*.md') if '.venv' not in path.parts)
README = (ROOT / 'README.md').read_text()


@pytest.fixture
def small():
    return override(airbench94.hyp, [*NARROW, 'opt.train_epochs=1'])


def test_the_python_example_runs(small, monkeypatch, capsys):
    (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)

    def read_the_small_set(folder, train):
        assert folder == 'cifar10'
        return TRAIN_SET if train else TEST_SET

    def pick_cpu():
        return torch.device('cpu'), torch.float32

    monkeypatch.setattr(airbench94, 'read_cifar10', read_the_small_set)
    monkeypatch.setattr(airbench94, 'pick_device', pick_cpu)
    for key in ('opt', 'net'):
        monkeypatch.setitem(airbench94.hyp, key, small[key])
    exec(code, {})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_the_subset_example_trains_on_60_percent(small):
    loaders = make_loaders()
    accuracies = subset.train_on_the_hardest(*loaders, small)
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert len(loaders[0].images) == 120


def test_the_example_of_many_networks_keeps_them_apart(small, monkeypatch, capsys):
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    torch._dynamo.reset()
    networks = many_networks.train_many(2, *make_loaders(), small)
    (first, _), (second, _) = networks
    name = '3.layers.0.conv.weight'
    assert not torch.equal(first[name], second[name])
    assert 'seed 1: ' in capsys.readouterr().out


def test_the_set_up_is_what_ci_and_the_recipes_need():
    assert 'pip install -r requirements.txt\n' in README and '`python -m pytest`' in README
    ci = (ROOT / '.ci' / 'run').read_text()
    assert 'pip install --quiet --requirement requirements.txt\n' in ci
    assert ci.endswith('python -m pytest\n')
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    required = [line.split('#')[0].strip() for line in lines]
    assert all('#' in line for line in lines)
    recipes = [*ROOT.glob('*.py'), *ROOT.glob('records/*.py')]
    sources = [path.read_text() for path in recipes]
    (inline,) = {re.search(r'^# dependencies = (.*)$', text, re.MULTILINE)[1] for text in sources}
    assert set(ast.literal_eval(inline)) <= set(required)


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_and_lines_are_readable(path):
    text = path.read_text()
    links = re.findall(r'\]\(([^)]+)\)', text)
    links += re.findall(r'^\[[^]]+\]: (\S+)$', text, re.MULTILINE)
    files = [link.split('#')[0] for link in links if '://' not in link]
    missing = [file for file in files if file and not (path.parent / file).exists()]
    assert missing == []
    assert max(map(len, text.splitlines())) <= 120


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160


def commands(text):
    """The commands of a text's code blocks, without their comments, on one line each."""
    lines = []
    for block in re.findall(r'```bash\n(.*?)```', text, re.DOTALL):
        lines += block.replace('\\\n', ' ').splitlines()
    return [line.split('#')[0].split() for line in lines]


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_readmes_can_be_run(path):
    """Their files exist; the lab knows their options; hyp has their keys."""
    for words in commands(path.read_text()):
        if words[:1] == ['python'] and words[1].endswith('.py'):
            assert (ROOT / words[1]).exists(), words
        if 'lab' not in words or 'run' not in words or '--help' in words:
            continue
        args = run_parser().parse_intermixed_args(words[words.index('run') + 1 :])
        recipe = ROOT / args.recipe
        if args.recipe != 'mine.py':  # the reader's own
            override(load_recipe(recipe).hyp, args.overrides)
